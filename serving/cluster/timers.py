"""Timers of a core: keys with the time at which they are due."""

import heapq
from collections.abc import Hashable


class Timers[Key: Hashable]:
    """At most one due time per key; equal times come out in the order they were armed.

    A timer says "look at this key by then", so arming only ever makes it earlier, and the
    handler arms it again as needed. That keeps hot paths (a step's tokens) free of heap work.
    """

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._armed = 0

    def arm(self, key: Key, due: float) -> None:
        """Look at `key` by `due`, or earlier if it was armed earlier."""
        current = self._due.get(key)
        if current is not None and current <= due:
            return
        self._due[key] = due
        self._armed += 1
        heapq.heappush(self._heap, (due, self._armed, key))

    def disarm(self, key: Key) -> None:
        """Forget the key's timer, if it has one."""
        self._due.pop(key, None)

    def is_armed(self, key: Key) -> bool:
        """The key will come out of `pop_due`."""
        return key in self._due

    def due(self, key: Key) -> float | None:
        """When the key comes out of `pop_due`, if it does."""
        return self._due.get(key)

    def next_due(self) -> float | None:
        """The earliest due time."""
        heap, due = self._heap, self._due
        while heap:
            first = heap[0]
            if due.get(first[2]) == first[0]:
                return first[0]
            heapq.heappop(heap)
        return None

    def pop_due(self, now: float) -> list[Key]:
        """Disarm and return every key due at `now` or before."""
        keys = []
        while (due := self.next_due()) is not None and due <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            keys.append(key)
        return keys


def earlier(one: float | None, other: float | None) -> float | None:
    """The earlier of two due times; None: never."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
