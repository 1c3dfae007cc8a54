"""The timer of a core in virtual time."""

from collections.abc import Callable

from serving.sim.world import World


class Alarm:
    """Calls `tick` when `next_due` says so. A tick has to do all that is due by then."""

    def __init__(
        self, world: World, next_due: Callable[[], float | None], tick: Callable[[], None]
    ) -> None:
        self._world = world
        self._next_due = next_due
        self._tick = tick
        self._at: float | None = None
        self._stopped = False
        self.set()

    def set(self) -> None:
        """Look at `next_due` again: after every event of the core."""
        due = None if self._stopped else self._next_due()
        if due is not None and (self._at is None or due < self._at):
            self._at = due
            self._world.time.at(due, lambda: self._ring(due))

    def stop(self) -> None:
        """Never ring again."""
        self._stopped = True

    def _ring(self, due: float) -> None:
        if self._stopped or self._at != due:
            return
        self._at = None
        self._tick()
        later = self._next_due()
        self._world.require(later is None or later > due, "a tick left undone what was due")
        self.set()
