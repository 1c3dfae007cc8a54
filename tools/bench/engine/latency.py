"""From times of tokens and steps to quantiles, histograms and a table of steps."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.bench.engine.receipts import Receipt
from tools.bench.engine.step_clock import StepTime

_QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 98, 99, 99.5, 99.9)
_BINS_PER_DECADE = 20
_PREFILL_EDGES = (0, 1, 257, 513, 1025, 2049, 4097)

Floats = npt.NDArray[np.float64]


def gaps_ms(receipts: Sequence[Receipt]) -> Floats:
    """Between consecutive tokens of each request, those of all requests together.

    A delivery of several tokens gives the gap before it once, and 0 for each further token.
    """
    found = [1e3 * np.diff(receipt.times) for receipt in receipts if len(receipt.times) > 1]
    return np.concatenate(found) if found else np.zeros(0)


def percentile(values: Floats, percent: float) -> float:
    """By linear interpolation."""
    return float(np.percentile(values, percent))


def quantiles(values: Floats) -> dict[str, float]:
    """p1 to p99.9, mean, max: enough to see the whole distribution. Empty for no values."""
    if not values.size:
        return {}
    found = np.percentile(values, _QUANTILES)
    named = {f"p{percent:g}": value for percent, value in zip(_QUANTILES, found, strict=True)}
    named |= {"mean": values.mean(), "max": values.max()}
    return {name: float(f"{value:.5g}") for name, value in named.items()}


def histogram(values: Floats) -> dict[str, Any]:
    """Counts in bins of equal ratio, `_BINS_PER_DECADE` to a power of ten.

    first: exponent e of the first bin, which is from 10 ** (e / bins_per_decade) up to the next.
    zero: values that are 0 (or less): further tokens of one delivery.
    """
    some = values[values > 0]
    zero = int(values.size - some.size)
    if not some.size:
        return {"bins_per_decade": _BINS_PER_DECADE, "first": 0, "counts": [], "zero": zero}
    bins = np.floor(np.log10(some) * _BINS_PER_DECADE).astype(int)
    first = int(bins.min())
    counts = np.bincount(bins - first).tolist()
    return {"bins_per_decade": _BINS_PER_DECADE, "first": first, "counts": counts, "zero": zero}


@dataclass(frozen=True, slots=True)
class StepKind:
    """Steps that prefill a number of tokens in one range. share: of the time of all steps."""

    prefill: str
    count: int
    share: float
    median_ms: float
    p99_ms: float
    most_ms: float
    decode_rows: float


def step_kinds(steps: Sequence[StepTime]) -> list[StepKind]:
    """How long steps take, by how much they prefill: from result to result, while rows decode."""
    pairs = [
        (step, 1e3 * (step.at_s - before.at_s))
        for before, step in itertools.pairwise(steps)
        if before.decode_rows and step.decode_rows  # else the loop may have waited for work
    ]
    if not pairs:
        return []
    times = np.array([ms for _, ms in pairs])
    tokens = np.array([step.prefill_tokens for step, _ in pairs])
    rows = np.array([step.decode_rows for step, _ in pairs])
    kinds = []
    for low, high in zip(_PREFILL_EDGES, (*_PREFILL_EDGES[1:], None), strict=True):
        mine = (tokens >= low) & (tokens < high if high is not None else True)
        if mine.any():
            name = "no" if high == 1 else f"{low} or more" if high is None else f"{low}-{high - 1}"
            kinds.append(
                StepKind(
                    name, int(mine.sum()), _short(times[mine].sum() / times.sum()),
                    _short(np.median(times[mine])), _short(np.percentile(times[mine], 99)),
                    _short(times[mine].max()), _short(rows[mine].mean()),
                )
            )  # fmt: skip
    return kinds


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
