"""Fits a cost model to measured steps; points that were held out say how well it foretells.

Seconds are linear in what is sought (the values at the curves' points and the price of a pair), so
it is a least-squares problem; nothing takes negative time, and errors count relative to what was
measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from serving.errors import ConfigurationError
from serving.sim.cost_model import CostModel, Curve, Float64, StepWork


@dataclass(frozen=True, slots=True)
class Measured:
    """A step that was measured: its work, seconds of every repetition, and whether to hold it out
    of the fit.
    """

    work: StepWork
    samples: tuple[float, ...]
    held_out: bool = False

    @property
    def seconds(self) -> float:
        """The median."""
        return float(np.median(self.samples))


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative errors over steps: how many, the mean and the largest."""

    points: int
    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A model, and its errors on what it was fitted to and on what was held out (None: nothing)."""

    model: CostModel
    fitted: FitError
    held_out: FitError | None


def fit(measured: Sequence[Measured]) -> Fit:
    """Fit all curves, with a point wherever something was measured that is not held out.

    Raises ConfigurationError unless decode steps and prefill calls are among it.
    """
    used = [one for one in measured if not one.held_out]
    knots = {
        "rows": sorted({one.work.rows for one in used if one.work.rows and not one.work.mixed}),
        "call": sorted({call.tokens for one in used for call in one.work.calls}),
        "mixed": sorted({one.work.mixed.tokens for one in used if one.work.mixed}),
    }
    for kind, what in (("rows", "decode step"), ("call", "prefill call")):
        if not knots[kind]:
            raise ConfigurationError(f"A cost model needs measured {what}s, and there is none.")
    columns = _Columns(knots)
    matrix = np.stack([columns.row(one.work) / one.seconds for one in used])
    found = columns.model(non_negative_least_squares(matrix, np.ones(len(used))))
    held_out = [one for one in measured if one.held_out]
    return Fit(found, errors(found, used), errors(found, held_out) if held_out else None)


def errors(model: CostModel, measured: Sequence[Measured]) -> FitError:
    """How far the model is off, relative to the medians measured."""
    off = [abs(model.seconds(one.work) / one.seconds - 1.0) for one in measured]
    return FitError(len(off), float(np.mean(off)), float(np.max(off)))


class _Columns:
    """What is sought, as the columns of a matrix."""

    def __init__(self, knots: dict[str, list[int]]) -> None:
        self._knots = knots
        self._curves = {
            kind: Curve(tuple((float(x), 0.0) for x in xs)) for kind, xs in knots.items() if xs
        }
        rows, calls = len(knots["rows"]), len(knots["call"])
        self._first = {"rows": 0, "read": rows, "call": 2 * rows, "mixed": 2 * rows + calls}
        self._pair = 2 * rows + calls + len(knots["mixed"])

    def row(self, work: StepWork) -> Float64:
        """How often each of what is sought goes into a step."""
        line = np.zeros(self._pair + 1)
        if work.mixed is not None:
            self._add(line, "mixed", "mixed", work.mixed.tokens, 1.0)
            line[self._pair] += work.mixed.pairs
            if work.decoding:
                self._add(line, "rows", "read", work.rows, work.context)
            return line
        if work.rows:
            further = work.decoding * (work.steps * (work.steps - 1) // 2)
            self._add(line, "rows", "rows", work.rows, work.steps)
            self._add(line, "rows", "read", work.rows, work.steps * work.context + further)
        for call in work.calls:
            self._add(line, "call", "call", call.tokens, 1.0)
            line[self._pair] += call.pairs
        return line

    def model(self, found: Float64) -> CostModel:
        """The model of a solution."""
        return CostModel(
            decode_s=self._curve("rows", "rows", found),
            read_s=self._curve("rows", "read", found),
            call_s=self._curve("call", "call", found),
            mixed_s=self._curve("mixed", "mixed", found) if self._knots["mixed"] else None,
            pair_s=float(found[self._pair]),
        )

    def _add(self, line: Float64, knots: str, kind: str, x: float, times: float) -> None:
        for index, share in self._curves[knots].shares(x):
            line[self._first[kind] + index] += share * times

    def _curve(self, knots: str, kind: str, found: Float64) -> Curve:
        first = self._first[kind]
        xs = self._knots[knots]
        return Curve(tuple((float(x), float(found[first + i])) for i, x in enumerate(xs)))


def non_negative_least_squares(matrix: Float64, target: Float64) -> Float64:
    """x >= 0 that minimises |matrix @ x - target|: Lawson and Hanson's active sets (1974, ch. 23).

    matrix: float64 [equations, unknowns]. Columns may differ by many orders of magnitude.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    scaled = matrix / scale
    unknowns = matrix.shape[1]
    free = np.zeros(unknowns, np.bool_)
    found = np.zeros(unknowns)
    tolerance = 1e-10 * max(float(np.linalg.norm(target)), 1.0)
    for _ in range(10 * unknowns):
        gradient = scaled.T @ (target - scaled @ found)
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= tolerance:
            break
        free[best] = True
        while True:
            trial = np.zeros(unknowns)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            negative = free & (trial <= 0.0)
            if not negative.any():
                break
            step = np.min(found[negative] / (found[negative] - trial[negative]))
            found = found + step * (trial - found)
            free &= found > 1e-15
            found[~free] = 0.0
        found = trial
    return found / scale
