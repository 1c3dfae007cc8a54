"""Saturation: the highest rate of requests at which the queue stays bounded.

A request queues until its first token is there. The search starts from the rate at which requests
are served while so many are kept waiting that the engine never wants for more: at any lower rate a
queue would come to an end. Then rates are tried, each for some seconds, right after the other: so
each starts with as many requests running as the one before left, and with none waiting, as those
were cancelled. Requests of a trial have the trace's lengths and come evenly spaced: bursts make a
queue longer but do not decide whether it has a bound, and a short trial would mistake them.

The queue is bounded at a rate if, in the last two thirds of its trial, requests left it at
`KEEPS_UP` of that rate or more, or if those that wait at the end leave within `PATIENCE_S` at the
speed at which they left. (A planner that spreads prompts over steps lets them wait for most of
that in a queue that does not grow.) So a trial of 15 s tells rates apart that are 5 % over the
saturation; shorter ones tell less. Saturation is the highest rate found bounded: the search goes
up or down from its estimate by a fixed factor until it has a bounded rate and an unbounded one,
and then halves what is between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEEPS_UP = 0.97

PATIENCE_S = 1.0

STRIDE = 1.1
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
        return self.leaving >= KEEPS_UP * rate or self.waiting <= PATIENCE_S * self.leaving


def queue_of(arrived: Sequence[float], left: Sequence[float], seconds: float) -> Queue:
    """The queue of a trial of so many seconds.

    arrived, left: times of all arrivals, and of the first tokens that came, in any order.
    """
    came, gone = np.asarray(arrived, float), np.asarray(left, float)
    settled = _SETTLING * seconds
    leaving = int(np.count_nonzero((gone >= settled) & (gone < seconds)))
    waiting = int(np.count_nonzero(came < seconds) - np.count_nonzero(gone < seconds))
    return Queue(leaving / (seconds - settled), waiting)


@dataclass(frozen=True, slots=True)
class Served:
    """What an engine did in a run: times of first tokens, prompt tokens of those requests, and
    times of all tokens."""

    begun: Sequence[float]
    prompts: Sequence[int]
    tokens: Sequence[float]


def service_rate(served: Served, mean_prompt: float, mean_output: float, seconds: float) -> float:
    """Requests per second that an engine serves while enough wait, from so many seconds of it.

    Counted in whole requests, prompts are read and tokens brought at one and the same rate in the
    long run. In the second half of a short one, the mean of the two is close to that: what runs
    then began together, so that one of them is ahead.
    """
    half = seconds / 2
    begun, tokens = np.asarray(served.begun, float), np.asarray(served.tokens, float)
    read = np.asarray(served.prompts, float)[(begun >= half) & (begun < seconds)].sum()
    brought = np.count_nonzero((tokens >= half) & (tokens < seconds))
    return float(read / mean_prompt + brought / mean_output) / 2 / (seconds - half)


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
