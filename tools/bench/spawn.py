"""A lumen-serve of our own on free ports."""

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_READY = re.compile(
    r"Lumen is ready: (?P<model>\S+) at (?P<http>\S+)/v1 \(OpenAI\) and (?P<grpc>\S+) \(gRPC\)"
)
_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens. http: "http://HOST:PORT"; grpc: "HOST:PORT"."""

    model: str
    http: str
    grpc: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def running_server(
    flags: Sequence[str], environ: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start lumen-serve, wait until it is ready, and stop it in the end.

    environ: of its processes; None: our own. Its log goes to our stderr. Raises RuntimeError if it
    ends before it is ready.
    """
    command = [sys.executable, "-m", "serving.launch.serve"]
    command += ["--http_port=0", "--grpc_port=0", "--check_prompt=", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            yield _await_ready(process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True, slots=True)
class Child:
    """A process: its number, and its command line."""

    pid: int
    words: tuple[str, ...]

    def flag(self, name: str) -> str:
        """The value of --name=value. Raises RuntimeError if it was not given."""
        for word in self.words:
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        raise RuntimeError(f"Process {self.pid} was not given --{name}.")


def child_running(pid: int, module: str) -> Child:
    """The child of a process that runs this module. Raises RuntimeError if there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            # The name before the closing bracket may hold anything; then state and parent follow.
            parent = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            words = (folder / "cmdline").read_text(encoding="utf-8").split("\0")
            if int(parent) == pid and module in words:
                return Child(int(folder.name), tuple(words))
    raise RuntimeError(f"Process {pid} has no child that runs {module}.")


def _await_ready(process: subprocess.Popen[str]) -> Server:
    assert process.stdout is not None
    for line in process.stdout:
        if found := _READY.match(line):
            return Server(found["model"], found["http"], found["grpc"], process)
    raise RuntimeError(
        f"lumen-serve ended with status {process.wait()} before it was ready; "
        "its messages above say why."
    )
