"""When requests come: processes to draw their times from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serving.errors import ConfigurationError
from serving.sim.workload.draws import not_negative, positive
from serving.sim.workload.table import Seconds

_LEAST_CV, _MOST_CV = 1e-3, 1e3  # beyond, gaps are all the same or all nothing


class Arrivals(Protocol):
    """A process of arrivals."""

    def draw(self, count: int, random: np.random.Generator) -> Seconds:
        """Times in order, float64 [count + 1]: the first is 0, and at the last one more would come.

        So requests come at count / last per second.
        """
        ...


@dataclass(frozen=True, slots=True)
class AllAtOnce:
    """Everything is there at the start."""

    def draw(self, count: int, random: np.random.Generator) -> Seconds:
        """As in Arrivals."""
        return np.zeros(count + 1)


@dataclass(frozen=True, slots=True)
class Gamma:
    """`rate` requests per second with gaps drawn from a Gamma distribution.

    cv: the gaps' standard deviation over their mean. 1: a Poisson process; more: bursts; 0: as
    regular as a clock.
    """

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        positive("rate of arrivals", self.rate)
        _check_cv(self.cv)

    def draw(self, count: int, random: np.random.Generator) -> Seconds:
        """As in Arrivals."""
        return _unit_times(count, self.cv, random) / self.rate


def poisson(rate: float) -> Gamma:
    """`rate` requests per second, independent of each other."""
    return Gamma(rate, 1.0)


@dataclass(frozen=True, slots=True)
class StepBurst:
    """`rate` requests per second, but `factor` times as many for `seconds` from `start_s` on.

    cv: as in Gamma, of gaps measured by the rate at the time: bursts have the same texture.
    """

    rate: float
    start_s: float
    seconds: float
    factor: float = 2.0
    cv: float = 1.0

    def __post_init__(self) -> None:
        positive("rate of arrivals", self.rate)
        not_negative("start_s of a burst", self.start_s)
        positive("seconds of a burst", self.seconds)
        positive("factor of a burst", self.factor)
        _check_cv(self.cv)

    def draw(self, count: int, random: np.random.Generator) -> Seconds:
        """As in Arrivals."""
        expected = _unit_times(count, self.cv, random)  # requests expected until each time
        begin = self.rate * self.start_s
        end = begin + self.rate * self.factor * self.seconds
        # The same requests take 1 / factor of the time inside the burst.
        inside = np.clip(expected - begin, 0.0, end - begin)
        times: Seconds = (expected - inside + inside / self.factor) / self.rate
        return times


def _check_cv(cv: float) -> None:
    if cv != 0 and not _LEAST_CV <= cv <= _MOST_CV:
        raise ConfigurationError(
            f"cv of arrivals must be 0, or from {_LEAST_CV:g} to {_MOST_CV:g}, not {cv:g}."
        )


def _unit_times(count: int, cv: float, random: np.random.Generator) -> Seconds:
    """Times of a process with one request per second on average; see Arrivals.draw."""
    times = np.zeros(count + 1)
    gaps = random.standard_gamma(cv**-2, count) * cv**2 if cv else np.ones(count)
    np.cumsum(gaps, out=times[1:])
    return times
