"""Seconds that a device takes for the work of a step: tables of what was measured.

A step is a decode step of all rows, calls that prefill, or a mixed call of both. Each streams the
weights once, computes its tokens and reads the KV they attend to.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

type Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CallWork:
    """One prefill call. tokens: of its size, padding included.

    pairs: (token, token it attends to), over all tokens of the call; see `attention_pairs`.
    """

    tokens: int
    pairs: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a plan has the device do.

    rows: of the decode batch, padding included; 0: none decodes. context: KV tokens that all of
    them read in the first step, one more per row in each further one. decoding: rows without
    padding. steps: decode steps. calls: prefill calls. mixed: the one call that does it all, its
    tokens those of its size; then `calls` is empty.
    """

    rows: int = 0
    decoding: int = 0
    context: int = 0
    steps: int = 1
    calls: tuple[CallWork, ...] = ()
    mixed: CallWork | None = None


def attention_pairs(start: int, tokens: int) -> int:
    """Pairs of a chunk of so many tokens behind `start` others of its prompt."""
    return tokens * start + tokens * (tokens + 1) // 2


@dataclass(frozen=True)
class Curve:
    """A function through points, straight between them; past the last with its last slope.

    Before the first point it is flat. points: (x, y), x ascending, at least one.
    """

    points: tuple[tuple[float, float], ...]

    @cached_property
    def _xs(self) -> list[float]:
        return [x for x, _ in self.points]

    def __call__(self, x: float) -> float:
        """The value at x."""
        return sum(share * self.points[index][1] for index, share in self.shares(x))

    def shares(self, x: float) -> list[tuple[int, float]]:
        """The value at x as a sum of shares of the points' values: (index, share)."""
        after = bisect_right(self._xs, x)
        if after == 0 or len(self.points) == 1:
            return [(0, 1.0)]
        after = min(after, len(self.points) - 1)
        left, right = self._xs[after - 1], self._xs[after]
        share = (x - left) / (right - left)
        return [(after - 1, 1.0 - share), (after, share)]


@dataclass(frozen=True)
class CostModel:
    """Seconds of steps.

    decode_s: of a decode step without its KV, by rows. read_s: per token of KV that a decode step
    reads, by rows. call_s: of a prefill call without attention, by tokens. mixed_s: the same of a
    mixed call; None: as a prefill call. pair_s: per pair of attention in a call. plan_s: of each
    plan, whatever is in it.
    """

    decode_s: Curve
    read_s: Curve
    call_s: Curve
    pair_s: float
    mixed_s: Curve | None = None
    plan_s: float = 0.0

    def seconds(self, work: StepWork) -> float:
        """Of a whole plan."""
        total = self.plan_s
        if work.mixed is not None:
            total += (self.mixed_s or self.call_s)(work.mixed.tokens)
            total += self.pair_s * work.mixed.pairs
            if work.decoding:
                total += self.read_s(work.rows) * work.context
            return total
        if work.rows:
            fixed, read = self.decode_s(work.rows), self.read_s(work.rows)
            further = work.decoding * (work.steps * (work.steps - 1) // 2)
            total += work.steps * fixed + read * (work.steps * work.context + further)
        for call in work.calls:
            total += self.call_s(call.tokens) + self.pair_s * call.pairs
        return total


class DecodeTimes:
    """Decode steps of a batch as fast as they can be looked up.

    buckets: rows that programs are compiled for, ascending.
    """

    def __init__(self, model: CostModel, buckets: Sequence[int]) -> None:
        self._plan_s = model.plan_s
        self._by_rows = [(0.0, 0.0)]
        for bucket in buckets:
            cost = (model.decode_s(bucket), model.read_s(bucket))
            self._by_rows += [cost] * (bucket + 1 - len(self._by_rows))

    def step(self, rows: int, context: int) -> float:
        """Seconds of one step in which so many rows read so many tokens of KV in all."""
        fixed, read = self._by_rows[rows]
        return self._plan_s + (fixed + read * context)

    def series(self, rows: int, context: int, steps: int) -> Float64:
        """Seconds of each of so many steps, float64 [steps]: to the last bit those of `step`."""
        fixed, read = self._by_rows[rows]
        contexts = context + rows * np.arange(steps, dtype=np.float64)
        return self._plan_s + (fixed + read * contexts)
