"""What all parts of one simulated run share: time, chance, the log and the invariants' voice."""

import random

from serving.errors import InternalError
from serving.sim.event_heap import EventHeap
from serving.sim.watch import Watch


class InvariantViolated(InternalError):
    """A rule of the design was broken in a simulated run."""


class World:
    """One run. The same seed gives the same run, to the last byte of the log.

    keep_log: the log costs more than the run, so only replays keep it. checked: every core looks
    for contradictions after every event; only large fleets do without.
    """

    def __init__(self, seed: int, *, keep_log: bool = False, checked: bool = True) -> None:
        self.seed = seed
        self.checked = checked
        self.time = EventHeap()
        self.log: list[str] | None = [] if keep_log else None
        self.watch: Watch | None = None  # looks on
        self._last_number = 0

    @property
    def now(self) -> float:
        """Virtual time in seconds."""
        return self.time.now

    def chance(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose: more draws here change nothing there."""
        return random.Random(f"{self.seed}/{purpose}")

    def number(self) -> int:
        """A number not given out before; later ones are larger."""
        self._last_number += 1
        return self._last_number

    def note(self, who: str, what: object) -> None:
        """Write a line of the log."""
        if self.log is not None:
            self.log.append(f"{self.now:12.6f} {who:<12} {what!r}")

    def require(self, holds: bool, rule: str) -> None:
        """Raises InvariantViolated with the rule, the seed and the time unless it holds."""
        if not holds:
            raise InvariantViolated(f"seed {self.seed}, {self.now:.6f} s: {rule}")
