"""When a dead child is started again, and when not."""

from dataclasses import dataclass, field

MAX_FAILED_STARTS = 3
FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 30.0
STABLE_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the child again after this many seconds."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start the child again; the sentence says why."""

    reason: str


@dataclass(slots=True)
class RestartPolicy:
    """Exponential backoff that forgets after a stable minute. Times are seconds of one clock.

    A child that was ready and died is always started again. One that keeps dying before it is
    ready will not get better: after `MAX_FAILED_STARTS` in a row the policy gives up.
    """

    name: str
    _failed_starts: int = field(default=0, init=False)
    _deaths: int = field(default=0, init=False)
    _ready_at: float | None = field(default=None, init=False)

    def ready(self, now: float) -> None:
        """The child is up."""
        self._ready_at = now
        self._failed_starts = 0

    def died(self, now: float, how: str, hopeless: bool) -> Restart | GiveUp:
        """The child ended; `how` says in what way, `hopeless` that it would do so again."""
        if hopeless:
            return GiveUp(f"The {self.name} cannot start ({how}); its message above says why.")
        if self._ready_at is None:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                return GiveUp(
                    f"The {self.name} ended {self._failed_starts} times in a row while it was "
                    f"starting (last: {how}); its messages above say more."
                )
        elif now - self._ready_at >= STABLE_AFTER_S:
            self._deaths = 0
        self._ready_at = None
        delay = min(FIRST_DELAY_S * 2.0**self._deaths, LONGEST_DELAY_S)
        self._deaths += 1
        return Restart(delay)
