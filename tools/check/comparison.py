"""How far the log-probabilities of one executor are from another's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.check.forced import Logprobs


@dataclass(frozen=True, slots=True)
class Tolerance:
    """mean, p99, most: of the error, in nats. gap: the most that the reference puts between its
    best token and the other's, where they are not the same. (How often they are is no measure: of
    two tokens nearly alike either may come first.)"""

    mean: float
    p99: float
    most: float
    gap: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Of n positions, in nats.

    mean, p99, most: of the absolute errors of the best tokens that both list. chosen_*: of the
    forced tokens, which are random: mostly unlikely ones. agreement: share of positions with the
    same best token. gap: where it is another one, by how much the reference prefers its own, at
    most; 0 if there is no such position. listed: share of the reference's best tokens that the
    other lists too.
    """

    positions: int
    mean: float
    p99: float
    most: float
    chosen_mean: float
    chosen_most: float
    agreement: float
    gap: float
    listed: float

    def broken(self, tolerance: Tolerance) -> list[str]:
        """What exceeds the tolerance, in words; a NaN always does."""
        return [
            f"{name} {value:.4g} > {bound:g}"
            for name, value, bound in (
                ("mean", self.mean, tolerance.mean),
                ("p99", self.p99, tolerance.p99),
                ("most", max(self.most, self.chosen_most), tolerance.most),
                ("gap", self.gap, tolerance.gap),
            )
            if not value <= bound
        ]


def errors(found: Logprobs, reference: Logprobs) -> Errors:
    """Compare the same positions of two executors."""
    same = found.best_ids[:, :, None] == reference.best_ids[:, None, :]
    difference = np.abs(found.best[:, :, None] - reference.best[:, None, :])
    best = difference[same].astype(np.float64)
    chosen = np.abs(found.chosen - reference.chosen).astype(np.float64)
    agree = same[:, 0, 0]
    ours = same[:, 0, :]  # where the reference lists the other's best token
    given = np.where(ours.any(axis=1), (reference.best * ours).sum(axis=1), reference.best[:, -1])
    gaps = (reference.best[:, 0] - given)[~agree]
    if not best.size:
        best = np.full(1, np.nan)  # nothing in common: no error could be larger
    return Errors(
        positions=len(agree),
        mean=float(best.mean()),
        p99=float(np.percentile(best, 99)),
        most=float(best.max()),
        chosen_mean=float(chosen.mean()),
        chosen_most=float(chosen.max()),
        agreement=float(agree.mean()),
        gap=float(gaps.max(initial=0.0)),
        listed=float(same.any(axis=1).mean()),
    )


def picked(
    table: Sequence[Logprobs], indices: Sequence[int], rows: Sequence[int] | None = None
) -> Logprobs:
    """Of rows[i] what `table[indices[i]]` says: table has one entry for each step, of all rows.

    rows: None: the first ones.
    """
    pairs = list(zip(indices, rows or range(len(indices)), strict=True))
    return Logprobs(
        np.stack([table[index].chosen[row] for index, row in pairs]),
        np.stack([table[index].best_ids[row] for index, row in pairs]),
        np.stack([table[index].best[row] for index, row in pairs]),
    )
