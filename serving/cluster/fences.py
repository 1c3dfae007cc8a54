"""The newest attempt heard of, per request: nothing older is ever started again.

A fence outlives its attempts, because the network may hold a message back for a while.
"""

from collections.abc import Callable
from dataclasses import dataclass

from serving.cluster.timers import Timers
from serving.errors import InternalError

type FenceKey = tuple[str, str]  # (gateway_id, request_id)


@dataclass(slots=True)
class Fence:
    """newest: attempt number. touched_at: when something was last heard about the request."""

    newest: int
    touched_at: float


class Fences:
    """Fences of one worker. keep_s: how long one is kept after the request was last heard of."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._fences: dict[FenceKey, Fence] = {}
        self._timers: Timers[FenceKey] = Timers()

    def newest(self, key: FenceKey) -> int:
        """The newest attempt heard of; 0 if none."""
        fence = self._fences.get(key)
        return 0 if fence is None else fence.newest

    def blocks(self, key: FenceKey, attempt: int) -> bool:
        """This attempt was started or aborted before, or a newer one was."""
        return attempt <= self.newest(key)

    def touch(self, key: FenceKey, attempt: int, now: float) -> None:
        """This attempt was heard of."""
        self._fences[key] = Fence(max(attempt, self.newest(key)), now)
        self._timers.arm(key, now + self._keep_s)

    def next_due(self) -> float | None:
        """When `expire` is due."""
        return self._timers.next_due()

    def expire(self, now: float, in_use: Callable[[FenceKey], bool]) -> None:
        """Drop fences that are old enough and about no attempt that is still here."""
        for key in self._timers.pop_due(now):
            due = self._fences[key].touched_at + self._keep_s
            if now < due:
                self._timers.arm(key, due)
            elif in_use(key):
                self._timers.arm(key, now + self._keep_s)
            else:
                del self._fences[key]

    def check_invariants(self) -> None:
        """Raises InternalError if a fence may be kept for ever."""
        for gateway_id, request_id in self._fences:
            if not self._timers.is_armed((gateway_id, request_id)):
                raise InternalError(f"The fence of {request_id} may be kept for ever.")
