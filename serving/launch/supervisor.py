"""Keeps a few child processes alive and stops them in order."""

import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from serving.launch.child import Child
from serving.launch.flags import EXIT_CONFIGURATION
from serving.launch.restart import GiveUp, RestartPolicy


@dataclass(frozen=True, slots=True)
class ChildPlan:
    """A child to keep alive. `stop_grace_s`: from SIGTERM to SIGKILL when stopping."""

    name: str
    command: tuple[str, ...]
    stop_grace_s: float


def say(text: str) -> None:
    """One line for the person at the terminal, on stderr."""
    print(f"lumen: {text}", file=sys.stderr, flush=True)


class _Watched:
    """A plan with its process, if it runs, and when it is due to start if not."""

    def __init__(self, plan: ChildPlan) -> None:
        self.plan = plan
        self.policy = RestartPolicy(plan.name)
        self.child: Child | None = None
        self.start_at: float | None = 0.0
        self.kill_at: float | None = None


class Supervisor:
    """Starts children in order, starts dead ones again, stops them in reverse order.

    `on_event(name, event)` hears what children announce. `run` owns the main thread's signals:
    the first SIGTERM or SIGINT stops in order, the second kills.
    """

    def __init__(
        self, plans: Sequence[ChildPlan], on_event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._watched = [_Watched(plan) for plan in plans]
        self._on_event = on_event
        self._selector = selectors.DefaultSelector()
        self._signals = 0
        self._stopping = False
        self._exit_status = 0

    def run(self) -> int:
        """Supervise until a signal or until a child is given up. Returns the exit status."""
        wake_read, wake_write = os.pipe()
        for fd in (wake_read, wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._selector.register(wake_read, selectors.EVENT_READ, None)
        try:
            while not (self._stopping and all(w.child is None for w in self._watched)):
                self._turn(wake_read)
        finally:
            signal.set_wakeup_fd(-1)
            self._kill_all()
            self._selector.close()
            os.close(wake_read)
            os.close(wake_write)
        return self._exit_status

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run, by name."""
        return {w.plan.name: w.child.pid for w in self._watched if w.child is not None}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _turn(self, wake_fd: int) -> None:
        now = time.monotonic()
        if self._signals and not self._stopping:
            say("stopping; a second signal stops at once.")
            self._stopping = True
        if self._signals > 1:
            self._kill_all()
            return
        if self._stopping:
            self._stop_next(now)
        else:
            self._start_due(now)
        for key, _ in self._selector.select(self._wait_s(now)):
            if key.data is None:
                _drain_pipe(wake_fd)
            else:
                self._hear(key.data)

    def _start_due(self, now: float) -> None:
        for watched in self._watched:
            if watched.start_at is not None and watched.start_at <= now:
                watched.start_at = None
                watched.child = Child(watched.plan.command)
                self._selector.register(watched.child.status_fd, selectors.EVENT_READ, watched)

    def _stop_next(self, now: float) -> None:
        """Ask the last running child to stop; kill it when its grace is over."""
        for watched in reversed(self._watched):
            watched.start_at = None
            if watched.child is None:
                continue
            if watched.kill_at is None:
                watched.child.signal(signal.SIGTERM)
                watched.kill_at = now + watched.plan.stop_grace_s
            elif now >= watched.kill_at:
                say(f"the {watched.plan.name} did not stop in time; killing it.")
                watched.child.signal(signal.SIGKILL)
            return

    def _wait_s(self, now: float) -> float | None:
        if self._signals and not self._stopping:
            return 0.0
        due = [
            at
            for watched in self._watched
            for at in (watched.start_at, watched.kill_at)
            if at is not None
        ]
        # A killed child's pipe may end a moment after its deadline.
        return max(min(due) - now, 0.05) if due else None

    def _hear(self, watched: _Watched) -> None:
        child = watched.child
        assert child is not None
        events, ended = child.heard()
        for event in events:
            if event["event"] == "ready":
                watched.policy.ready(time.monotonic())
            self._on_event(watched.plan.name, event)
        if ended:
            self._bury(watched, child)

    def _bury(self, watched: _Watched, child: Child) -> None:
        self._selector.unregister(child.status_fd)
        how = child.reap()
        watched.child = None
        watched.kill_at = None
        if self._stopping:
            return
        hopeless = child.exit_status == EXIT_CONFIGURATION
        match watched.policy.died(time.monotonic(), how, hopeless):
            case GiveUp(reason):
                say(reason)
                self._stopping = True
                self._exit_status = 1
            case restart:
                say(
                    f"the {watched.plan.name} ended ({how}); starting it again"
                    f"{_in_a_while(restart.after_s)}."
                )
                watched.start_at = time.monotonic() + restart.after_s

    def _kill_all(self) -> None:
        for watched in self._watched:
            watched.start_at = None
            if watched.child is not None:
                self._selector.unregister(watched.child.status_fd)
                watched.child.signal(signal.SIGKILL)
                watched.child.reap()
                watched.child = None


def _in_a_while(seconds: float) -> str:
    return f" in {seconds:.0f} s" if seconds >= 1 else ""


def _drain_pipe(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass
