"""Whether the gateway takes a request, and when a refused client should come back."""

from collections import deque

from serving.cluster.generation import GenerationRequest
from serving.errors import InvalidRequestError, QueueFullError

_DEPARTURES_KEPT = 32
_RETRY_AFTER_UNKNOWN_S = 5.0  # nobody left the queue yet, so there is no rate to go by
_RETRY_AFTER_RANGE_S = (1.0, 60.0)


class Admission:
    """Counts the requests that wait for their first token and how fast they get it."""

    def __init__(self, max_queued: int) -> None:
        self._max_queued = max_queued
        self.queued = 0
        self._departures: deque[float] = deque(maxlen=_DEPARTURES_KEPT)

    def enter(self, now: float) -> None:
        """One more waits. Raises QueueFullError if too many do."""
        if self.queued >= self._max_queued:
            raise QueueFullError(
                f"{self.queued} requests wait for their first token, as many as this server "
                "queues (--max_queued_requests); try again later.",
                retry_after_s=self.retry_after_s(now),
            )
        self.queued += 1

    def leave(self, now: float) -> None:
        """One of them got its first token or ended."""
        self.queued -= 1
        self._departures.append(now)

    def retry_after_s(self, now: float) -> float:
        """Time in which half of the queue will be served at its recent rate.

        Half, because the refused all come back: with the first free place as the hint nearly
        all of them would be refused again.
        """
        if not self._departures or now <= self._departures[0]:
            return _RETRY_AFTER_UNKNOWN_S
        rate = len(self._departures) / (now - self._departures[0])
        least, most = _RETRY_AFTER_RANGE_S
        return min(max(self.queued / 2 / rate, least), most)


def check_fits(request: GenerationRequest, largest_context: int | None) -> None:
    """Raises InvalidRequestError if no replica that is known could ever hold the prompt.

    Without a known replica everything may fit.
    """
    needed = len(request.prompt) + 1
    if largest_context is not None and needed > largest_context:
        raise InvalidRequestError(
            f"The prompt has {len(request.prompt)} tokens; the largest replica takes at most "
            f"{largest_context - 1}, so that there is room for one more. Shorten the prompt.",
            parameter="prompt",
        )
