"""Virtual time: what happens next, and nothing in between."""

import heapq
from collections.abc import Callable


class EventHeap:
    """Runs actions in order of time; those of the same time in the order they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events_run = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Run `action` at `time`, or now if that is past."""
        self._scheduled += 1
        heapq.heappush(self._heap, (max(time, self.now), self._scheduled, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in `delay_s` seconds."""
        self.at(self.now + delay_s, action)

    def step(self) -> bool:
        """Run the next action; False if there is none."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        self.events_run += 1
        action()
        return True

    def next_time(self) -> float | None:
        """When the next action runs."""
        return self._heap[0][0] if self._heap else None
