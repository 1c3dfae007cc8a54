"""Compiling in child processes, for devices that only this process holds.

Lowering is Python, and one process runs that on one core; XLA and Mosaic compile on several, but
take turns where they set LLVM's options. So children compile, each one program at a time, for a
description of the device (an XLA topology): they need neither the device nor its memory. What they
send back is what the cache of executables keeps.

All come from one process that first imports what they need. `prepare` has it begin early, while
nothing is known but that there is a GPU.

Nothing depends on them: whatever a child does not deliver is compiled here.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax

from serving.engine.device.compile_recipe import Answer, Recipe
from serving.engine.device.program_source import Key

_MODULE = "serving.engine.device.compile_child"
_FEWEST_CORES = 4
_MOST_CHILDREN = 32
_DRIVER = Path("/dev/nvidiactl")
_ANSWER_S = 180.0
"""Of one program; those of the 8B shape take up to 8 s. A child that needs longer is given up."""

_log = logging.getLogger(__name__)


class _Family:
    """A process that becomes `count` of them once it has imported everything, and their links."""

    def __init__(self, count: int) -> None:
        ends = [Pipe() for _ in range(count)]
        theirs = [end.fileno() for _, end in ends]
        # A group of its own: the first is started here, and forks the others.
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *map(str, theirs)],
            stdin=subprocess.DEVNULL, stdout=2, pass_fds=theirs, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self.returncode: int | None = None
        self.links = [_Link(ours) for ours, _ in ends]
        for _, end in ends:
            end.close()

    def shrink(self, count: int) -> None:
        """Keep so many of them, or all there are."""
        for link in self.links[count:]:
            link.close()  # it ends by itself when it finds out
        del self.links[count:]

    def end(self) -> None:
        """End them all, which have nothing to lose."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.returncode = self._process.wait()
        for link in self.links:
            link.close()


_prepared: list[_Family] = []


def prepare() -> None:
    """Have children import what they need before it is known whether any are.

    To be called before JAX looks for its devices, which takes it seconds with a GPU. Does nothing
    where there is none or children would not pay. The next `CompileChildren` takes them over;
    `dismiss` ends what none took.
    """
    count = min(_cores(), _MOST_CHILDREN)
    if _prepared or count < _FEWEST_CORES or not _gpu_is_likely():
        return
    try:
        _prepared.append(_Family(count))
    except OSError as error:
        _log.info("No process that compiles could be started early: %s", error)


def _gpu_is_likely() -> bool:
    return "cuda" in (jax.config.jax_platforms or "cuda") and _DRIVER.exists()


def dismiss() -> None:
    """End what was prepared and is not needed."""
    while _prepared:
        _prepared.pop().end()


class CompileChildren:
    """Processes that compile the programs of a recipe. Methods may be called from several threads.

    count: at most so many. answer_s: a child that takes longer for a program is given up.
    """

    def __init__(self, count: int, recipe: Recipe, answer_s: float = _ANSWER_S) -> None:
        self._family = _prepared.pop() if _prepared else _Family(count)
        self._family.shrink(count)
        self.count = self._alive = len(self._family.links)
        self._answer_s = answer_s
        self._closing = False
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[_Link | None] = queue.SimpleQueue()
        for link in self._family.links:
            link.tell(recipe)
            self._idle.put(link)

    def compile(self, key: Key) -> bytes | None:
        """What `packed_executable` makes of a program; None if the children cannot compile it.

        Waits for an idle child.
        """
        return next(self.compile_together([key]))

    def compile_together(self, keys: Sequence[Key]) -> Iterator[bytes | None]:
        """What `compile` returns of each, in order.

        One child makes them all: kernels that they share are compiled once.
        """
        link = self._idle.get()
        if link is None:  # there are no children left, and others wait to hear it too
            self._idle.put(None)
        for place, key in enumerate(keys):
            answer, why = None, ""
            if link is not None:
                try:
                    answer, why = link.ask(key, self._answer_s)
                except (EOFError, OSError, TimeoutError) as error:
                    self._lose(link, error)
                    link = None
            if link is not None and place == len(keys) - 1:
                self._idle.put(link)
            if why:
                _log.warning("A child process could not compile %s: %s", key, why)
            yield answer

    def close(self) -> None:
        """End the processes, which have nothing to lose. Whoever waits for one gets None."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._family.end()

    def _lose(self, link: "_Link", error: Exception) -> None:
        link.close()  # it ends by itself when it finds out, or else with all others
        with self._lock:
            self._alive -= 1
            if not self._alive:
                self._idle.put(None)
            if not self._closing:
                _log.warning(
                    "A process that compiles is gone (%s: %s); its program is compiled here.",
                    type(error).__name__, error,
                )  # fmt: skip


class _Link:
    """This end of what connects to one child."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._in_use = threading.Lock()

    def tell(self, recipe: Recipe) -> None:
        """If the child is gone already, the first to ask will hear it."""
        with contextlib.suppress(OSError):
            self._connection.send(recipe)

    def ask(self, key: Key, wait_s: float) -> Answer:
        """Raises EOFError or OSError if the child is gone, TimeoutError if it does not answer."""
        with self._in_use:
            self._connection.send(key)
            if not self._connection.poll(wait_s):
                raise TimeoutError(f"no answer in {wait_s:.0f} s")
            answer: Answer = self._connection.recv()
            return answer

    def close(self) -> None:
        """Once nobody reads from it: its number may soon be another file's."""
        with self._in_use:
            self._connection.close()


def _environment() -> dict[str, str]:
    """As here, but with no device in sight and everything found that can be imported here."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    # Whoever forks had better have one thread.
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # What goes wrong comes back as an exception. Without the device, XLA's own log says of every
    # unit that its arena cannot fit four fifths of the memory.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **hidden, **alone, **quiet, "PYTHONPATH": path}


def children_for(devices: Sequence[jax.Device], programs: int) -> int:
    """How many children pay for so many programs on these devices; 0: compile here.

    Only for a single GPU: for no other devices was it tried that they run what was compiled away
    from them.
    """
    if len(devices) > 1 or devices[0].platform != "gpu":
        return 0
    count = min(_cores(), programs, _MOST_CHILDREN)
    return count if count >= _FEWEST_CORES else 0


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
