"""Compiling in child processes, for devices that only this process holds.

Lowering is Python, and one process runs that on one core; XLA and Mosaic compile on several, but
take turns where they set LLVM's options. So children compile, each one program at a time, for a
description of the device (an XLA topology): they need neither the device nor its memory. What they
send back is what the cache of executables keeps.

Nothing depends on them: whatever a child does not deliver is compiled here.
"""

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe

import jax

from serving.engine.device.compile_recipe import Answer, Recipe
from serving.engine.device.program_source import Key

_MODULE = "serving.engine.device.compile_child"
_FEWEST_CORES = 4
_MOST_CHILDREN = 16
_ANSWER_S = 180.0
"""Of one program; those of the 8B shape take up to 8 s. A child that needs longer is given up."""

_log = logging.getLogger(__name__)


class CompileChildren:
    """Processes that compile the programs of a recipe. Methods may be called from several threads.

    answer_s: a child that takes longer for a program is given up.
    """

    def __init__(self, count: int, recipe: Recipe, answer_s: float = _ANSWER_S) -> None:
        self.count = count
        self._answer_s = answer_s
        self._alive = count
        self._closing = False
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        self._children = [_Child(recipe) for _ in range(count)]
        for child in self._children:
            self._idle.put(child)

    def compile(self, key: Key) -> bytes | None:
        """What `packed_executable` makes of a program; None if the children cannot compile it.

        Waits for an idle child.
        """
        child = self._idle.get()
        if child is None:  # there are none left, and others wait to hear it too
            self._idle.put(None)
            return None
        try:
            answer, why = child.ask(key, self._answer_s)
        except (EOFError, OSError, TimeoutError) as error:
            self._lose(child, error)
            return None
        self._idle.put(child)
        if answer is None:
            _log.warning("A child process could not compile %s: %s", key, why)
        return answer

    def close(self) -> None:
        """End the processes. Whoever waits for one of them gets None."""
        self._closing = True
        for child in self._children:
            child.end()

    def _lose(self, child: "_Child", error: Exception) -> None:
        child.end()
        if not self._closing:
            _log.warning(
                "A process that compiles is gone (%s: %s); its program is compiled here.",
                type(error).__name__, error,
            )  # fmt: skip
        with self._lock:
            self._alive -= 1
            if not self._alive:
                self._idle.put(None)


class _Child:
    def __init__(self, recipe: Recipe) -> None:
        self._asking = threading.Lock()
        self._link, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),),
                env=_environment(),
            )  # fmt: skip
        with contextlib.suppress(OSError):  # if it is gone, the first to ask will hear it
            self._link.send(recipe)

    def ask(self, key: Key, wait_s: float) -> Answer:
        """Raises EOFError or OSError if the child is gone, TimeoutError if it does not answer."""
        with self._asking:
            self._link.send(key)
            if not self._link.poll(wait_s):
                raise TimeoutError(f"no answer in {wait_s:.0f} s")
            answer: Answer = self._link.recv()
            return answer

    def end(self) -> None:
        """It has nothing to lose. Whoever waits for its answer hears that it is gone."""
        self._process.kill()
        self._process.wait()
        with self._asking:  # nobody reads from a number that is another file's by now
            self._link.close()


def _environment() -> dict[str, str]:
    """As here, but with no device in sight and everything found that can be imported here."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **hidden, "PYTHONPATH": path}


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
