"""The child's side of its two pipes to the supervisor.

Status: the child writes one JSON object per line (`Announce`); its end tells the supervisor that
the child is gone. Lifeline: nobody ever writes to it; its end tells the child that the supervisor
is gone, however it went, and the child ends too. So kill -9 of the supervisor leaves no orphan.
"""

import json
import os
import signal
import threading
from typing import Any

# How long a child that lost its supervisor may take to stop in good order.
ORPHAN_GRACE_S = 3.0


class Announce:
    """Says to the supervisor how far this process is; says nothing when there is none."""

    def __init__(self, fds: tuple[int, int] | None) -> None:
        self._status_fd = None if fds is None else fds[0]

    def __call__(self, event: str, **facts: Any) -> None:
        """Report an event, for example ready(address="127.0.0.1:9000")."""
        if self._status_fd is None:
            return
        line = json.dumps({"event": event, **facts}) + "\n"
        try:
            os.write(self._status_fd, line.encode())
        except BrokenPipeError:
            # The supervisor is gone; the lifeline ends this process.
            self._status_fd = None


def watch_supervisor(fds: tuple[int, int] | None) -> Announce:
    """Tie this process's life to the supervisor's, if it has one. Call once, at start."""
    if fds is not None:
        for fd in fds:
            os.set_inheritable(fd, False)
        threading.Thread(
            target=_end_with_supervisor, args=(fds[1],), name="lifeline", daemon=True
        ).start()
    return Announce(fds)


def _end_with_supervisor(lifeline_fd: int) -> None:
    while os.read(lifeline_fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    timer = threading.Event()
    timer.wait(ORPHAN_GRACE_S)
    os._exit(1)
