"""The supervisor's side of a child process: start it, hear from it, stop it."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


class Child:
    """One running process with its status pipe and its lifeline (`serving.launch.lifeline`)."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start the command, with one flag more that names its pipes, in a session of its own.

        Of its own, so that Ctrl-C in the terminal reaches the supervisor alone, which then stops
        its children in order.
        """
        status_read, status_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, f"--supervisor_fds={status_write},{lifeline_read}"],
                pass_fds=(status_write, lifeline_read),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            os.close(status_read)
            os.close(self._lifeline)
            raise
        finally:
            os.close(status_write)
            os.close(lifeline_read)
        os.set_blocking(status_read, False)
        self.status_fd = status_read
        self._partial = b""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def heard(self) -> tuple[list[dict[str, Any]], bool]:
        """(events the child wrote since the last call, whether it is gone). Never blocks."""
        ended = False
        while True:
            try:
                data = os.read(self.status_fd, 65536)
            except BlockingIOError:
                break
            if not data:
                ended = True
                break
            self._partial += data
        *lines, self._partial = self._partial.split(b"\n")
        return [json.loads(line) for line in lines], ended

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process is gone."""
        self._process.send_signal(number)

    def reap(self) -> str:
        """Wait for the end of a child whose status pipe ended, close the pipes, say how it went.

        A child that closed its pipe and lives on is killed: it can no longer be supervised.
        """
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self.status_fd)
        os.close(self._lifeline)
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    @property
    def exit_status(self) -> int | None:
        """Of a reaped child; negative: the signal that ended it."""
        return self._process.returncode
