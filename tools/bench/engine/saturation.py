"""Saturation: the highest rate of requests at which the queue stays bounded.

A request queues until its first token is there. At a rate under trial requests come for some
seconds; the trials follow on each other, so that each starts with the rows of the batch as full as
the one before left them, and without a queue: what still waited was cancelled. The queue is bounded
at a rate if, in the last two thirds of its trial, requests left the queue at least as fast as they
come at that rate, or if those that wait at the end leave within `PATIENCE_S` at the speed at which
they left. (The rate is the one asked for, not that of the arrivals seen: a trace is bursty, and a
short trial is not to be judged by whether it met a burst.) Saturation is the highest rate found
bounded by a search that starts from an estimate, goes up or down by a fixed factor until it has a
bounded rate and an unbounded one, and then halves what is between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PATIENCE_S = 0.5

STRIDE = 1.15
"""Factor between rates tried, until the saturation lies between two of them."""

_SETTLING = 1 / 3  # of a trial


@dataclass(frozen=True, slots=True)
class Queue:
    """What a trial showed: requests per second that left the queue once it had settled, and how
    many waited at its end."""

    leaving: float
    waiting: int

    def bounded(self, rate: float) -> bool:
        """Whether it stays bounded at that rate."""
        return self.leaving >= rate or self.waiting <= PATIENCE_S * self.leaving


def queue_of(arrived: Sequence[float], left: Sequence[float], seconds: float) -> Queue:
    """The queue of a trial of so many seconds.

    arrived, left: times of all arrivals, and of the first tokens that came, in any order.
    """
    came, gone = np.asarray(arrived, float), np.asarray(left, float)
    settled = _SETTLING * seconds
    leaving = int(np.count_nonzero((gone >= settled) & (gone < seconds)))
    waiting = int(np.count_nonzero(came < seconds) - np.count_nonzero(gone < seconds))
    return Queue(leaving / (seconds - settled), waiting)


def service_rate(
    first_tokens: Sequence[float], tokens: Sequence[float], mean_output: float, seconds: float
) -> float:
    """Requests per second that an engine serves while more than enough wait: an estimate.

    first_tokens, tokens: times of what came in so many seconds, in any order. Requests begin and
    tokens come at rates that in the long run are one and the same, counted in whole requests; in
    the second half of a short run the mean of the two is close to it.
    """
    half = seconds / 2
    begun, brought = (
        int(np.count_nonzero((times >= half) & (times < seconds)))
        for times in (np.asarray(first_tokens, float), np.asarray(tokens, float))
    )
    return (begun + brought / mean_output) / 2 / (seconds - half)


class RateSearch:
    """Which rate to try next, until as many as allowed were tried.

    bounded, unbounded: the highest and the lowest rate found to be so; None: none was.
    """

    def __init__(self, estimate: float, tries: int) -> None:
        self._estimate = estimate
        self._left = tries
        self.bounded: float | None = None
        self.unbounded: float | None = None

    def next(self) -> float | None:
        """The rate to try; None: the search is over."""
        if not self._left:
            return None
        if self.bounded is not None and self.unbounded is not None:
            return math.sqrt(self.bounded * self.unbounded)
        if self.bounded is not None:
            return self.bounded * STRIDE
        return self._estimate if self.unbounded is None else self.unbounded / STRIDE

    def tell(self, rate: float, bounded: bool) -> None:
        """What trying that rate showed."""
        self._left -= 1
        if bounded:
            self.bounded = rate if self.bounded is None else max(rate, self.bounded)
        else:
            self.unbounded = rate if self.unbounded is None else min(rate, self.unbounded)
