"""Compiling in child processes, for devices that only this process holds.

Lowering is Python, and one process runs that on one core; XLA and Mosaic compile on several, but
take turns where they set LLVM's options. So children compile, each one program at a time, for a
description of the device (an XLA topology): they need neither the device nor its memory. What they
send back is what the cache of executables keeps.

Nothing depends on them: whatever a child does not deliver is compiled here.
"""

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe

import jax

from serving.engine.device.compile_recipe import Answer, Key, Recipe, RecipeError

_MODULE = "serving.engine.device.compile_child"
_FEWEST_CORES = 4
_MOST_CHILDREN = 16
_ANSWER_S = 180.0
"""Of one program; those of the 8B shape take up to 8 s. A child that needs longer is given up."""
_GRACE_S = 5.0

_log = logging.getLogger(__name__)


class CompileChildren:
    """Processes that compile. Methods may be called from several threads."""

    def __init__(self, count: int, answer_s: float = _ANSWER_S) -> None:
        self.count = count
        self._answer_s = answer_s
        self._idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        self._alive = count
        self._lock = threading.Lock()
        self._recipe: Recipe | None = None
        self._children = [_Child() for _ in range(count)]
        for child in self._children:
            self._idle.put(child)

    def instruct(self, recipe: Recipe) -> None:
        """Say what the keys of programs mean from now on; each child learns it with its next."""
        self._recipe = recipe

    def compile(self, key: Key) -> bytes | None:
        """What `packed_executable` makes of a program; None if the children cannot compile it.

        Waits for an idle child.
        """
        child = self._take()
        if child is None:
            return None
        try:
            self._teach(child)
            answer, why = child.ask(key, self._answer_s)
        except (EOFError, OSError, TimeoutError, RecipeError) as error:
            self._lose(child, error)
            return None
        self._idle.put(child)
        if answer is None:
            _log.warning("A child process could not compile %s: %s", key, why)
        return answer

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.end()

    def _take(self) -> "_Child | None":
        child = self._idle.get()
        if child is None:  # there are none left, and others wait to hear it too
            self._idle.put(None)
        return child

    def _teach(self, child: "_Child") -> None:
        recipe = self._recipe
        if child.recipe is not recipe:
            answer, why = child.ask(recipe, self._answer_s)
            if answer is None:
                raise RecipeError(why)
            child.recipe = recipe

    def _lose(self, child: "_Child", error: Exception) -> None:
        child.end()
        _log.warning(
            "A process that compiles is gone (%s: %s); the others go on without it.",
            type(error).__name__, error,
        )  # fmt: skip
        with self._lock:
            self._alive -= 1
            if not self._alive:
                self._idle.put(None)


class _Child:
    def __init__(self) -> None:
        self.recipe: Recipe | None = None
        self._link, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=(theirs.fileno(),),
                env=_environment(),
            )  # fmt: skip

    def ask(self, message: Recipe | Key | None, wait_s: float) -> Answer:
        """Raises EOFError or OSError if the child is gone, TimeoutError if it does not answer."""
        self._link.send(message)
        if not self._link.poll(wait_s):
            raise TimeoutError(f"no answer in {wait_s:.0f} s")
        answer: Answer = self._link.recv()
        return answer

    def end(self) -> None:
        """By closing the link, or else by force."""
        self._link.close()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


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
