"""How events reach a replica's thread: any thread puts them in, the loop takes them out."""

from collections import deque
from threading import Condition

from serving.engine.events import EngineEvent


class Mailbox:
    """A thread-safe queue of events that can be closed."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._events: deque[EngineEvent] = deque()
        self._closed = False

    def put(self, event: EngineEvent) -> None:
        """Add an event; dropped after `close`, since nobody would read it."""
        with self._changed:
            if not self._closed:
                self._events.append(event)
                self._changed.notify()

    def close(self) -> None:
        """Whoever receives gets None from now on, events at hand included."""
        with self._changed:
            self._closed = True
            self._events.clear()
            self._changed.notify()

    def receive(self, *, wait: bool) -> list[EngineEvent] | None:
        """All events at hand, in order; None once closed. wait: block until there is one."""
        with self._changed:
            while wait and not self._events and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            events = list(self._events)
            self._events.clear()
            return events
