"""What a fleet run leaves behind: per request, per interval and in all, in arrays of fixed size."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from serving.engine.request import FinishReason

type Float64 = npt.NDArray[np.float64]

_SHORTEST_S = 1e-5
_PER_OCTAVE = 128  # neighbouring bins differ by half a percent
_BINS = 32 * _PER_OCTAVE  # up to twelve hours


class GapHistogram:
    """How often which time passed between a request's tokens, to half a percent."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, gap_s: float, times: int = 1) -> None:
        """So many tokens came so much later than the ones before them."""
        place = int(math.log2(max(gap_s, _SHORTEST_S) / _SHORTEST_S) * _PER_OCTAVE)
        self.counts[min(place, _BINS - 1)] += times

    def add_all(self, gaps_s: Float64, times: int) -> None:
        """The same for each of these gaps."""
        for gap_s in gaps_s.tolist():
            self.add(gap_s, times)

    def listed(self) -> list[tuple[float, int]]:
        """(seconds, how often), ascending, of what was seen."""
        places = np.flatnonzero(self.counts).tolist()
        return [(_middle(place), int(self.counts[place])) for place in places]

    def percentile(self, percent: float) -> float | None:
        """Seconds that so many percent of the gaps do not exceed; None without any."""
        reached = np.cumsum(self.counts)
        if not reached[-1]:
            return None
        place = int(np.searchsorted(reached, math.ceil(reached[-1] * percent / 100)))
        return _middle(place)


def _middle(place: int) -> float:
    return float(f"{_SHORTEST_S * math.exp2((place + 0.5) / _PER_OCTAVE):.6g}")


@dataclass(slots=True)
class RequestTimes:
    """Per request of a workload, in its order; times are virtual seconds, NaN: never.

    arrived, first, finished: [requests], when it came, had its first token and all. tokens: that
    the client got. preempted: how often. cached: prompt tokens found in the prefix cache.
    ends: how many ended in which way; refused: clients that were sent away, each time counted.
    """

    arrived: Float64
    first: Float64
    finished: Float64
    tokens: npt.NDArray[np.int32]
    preempted: npt.NDArray[np.int32]
    cached: npt.NDArray[np.int32]
    ends: dict[FinishReason, int] = field(default_factory=dict)
    refused: int = 0

    @classmethod
    def of(cls, requests: int) -> "RequestTimes":
        """Nothing has happened yet."""

        def never() -> Float64:
            return np.full(requests, np.nan)

        def none() -> npt.NDArray[np.int32]:
            return np.zeros(requests, np.int32)

        return cls(never(), never(), never(), none(), none(), none())

    def ended(self, finish: FinishReason) -> None:
        """One more ended so."""
        self.ends[finish] = self.ends.get(finish, 0) + 1

    def ttft(self, which: npt.NDArray[np.bool_]) -> Float64:
        """Seconds to the first token of those of these requests that had one."""
        had_first = which & ~np.isnan(self.first)
        return (self.first - self.arrived)[had_first]

    def tpot(self, which: npt.NDArray[np.bool_]) -> Float64:
        """Mean seconds per further token of those that finished with two or more."""
        several = which & (self.tokens > 1) & ~np.isnan(self.finished)
        return (self.finished - self.first)[several] / (self.tokens[several] - 1)


@dataclass(slots=True)
class FleetSample:
    """The fleet at one moment. kv_use: share of blocks in use, mean and largest of the replicas."""

    at: float
    kv_mean: float
    kv_most: float
    running: int
    waiting: int
