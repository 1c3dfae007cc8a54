"""Programs compiled ahead of time, and the wall clock around chains of their launches."""

import functools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax

_FIRST_GUESS_SHARE = 0.5  # of a batch: long enough to tell how many launches fill one
_MOST_GROWTH = 10
_MOST_THREADS = 6


@dataclass(slots=True, eq=False)
class Program:
    """function(state, *arguments) -> state, jitted with the state donated.

    Launches are chained through the state, and its buffers stay where they are: outputs at fresh
    addresses make a CUDA graph be updated at each launch. state, arguments: pytrees of shape
    structs. calls: of the operation in one launch. alone: compile one after another, for what XLA
    tunes by running it on the device.
    """

    function: Callable[..., Any]
    state: Any
    arguments: tuple[Any, ...]
    calls: int
    alone: bool = False
    _compiled: Any = field(default=None, init=False)
    _error: Exception | None = field(default=None, init=False)

    def compile(self, lowering: threading.Lock) -> None:
        """Keeps what goes wrong for the first launch: other programs are to be measured still.

        lowering: held meanwhile. Lowering is Python; if many threads did it at once, the first one
        would be done, and a compiler busy, as late as the last.
        """
        jitted = jax.jit(self.function, donate_argnums=0, keep_unused=True)
        try:
            with lowering:
                lowered = jitted.lower(self.state, *self.arguments)
            self._compiled = lowered.compile()
        except Exception as error:
            self._error = error

    def __call__(self, state: Any, *arguments: Any) -> Any:
        """One launch, not waited for. Raises what compiling raised."""
        if self._error is not None:
            raise self._error
        if self._compiled is None:
            raise AssertionError("launched before compile_all")
        return self._compiled(state, *arguments)


def compile_all(programs: Sequence[Program], threads: int) -> float:
    """Compile, those that want to be alone in a thread of their own. Returns seconds."""
    started = time.perf_counter()
    lowering = threading.Lock()

    def compile_in_turn(some: Sequence[Program]) -> None:
        for program in some:
            program.compile(lowering)

    with ThreadPoolExecutor(threads + 1) as pool:
        jobs = [pool.submit(compile_in_turn, [one for one in programs if one.alone])]
        jobs += [pool.submit(one.compile, lowering) for one in programs if not one.alone]
        for job in jobs:
            job.result()
    return time.perf_counter() - started


def default_threads() -> int:
    """As many as this process has cores, but few: Mosaic kernels wait for each other anyway, and
    programs that compile alone want their turn at lowering."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to look. reps: batches timed, one sample each. batch_s: shortest batch; it has to
    dwarf one launch and one wait for the device (up to 0.3 ms)."""

    reps: int
    batch_s: float

    def samples(self, program: Program, state: Any, *arguments: Any) -> tuple[list[float], Any]:
        """Seconds per call of the operation, one sample per batch; and the state in the end."""
        batch = functools.partial(_batch, program, arguments)
        _, state = batch(state, 1)
        launches = 1
        while True:
            seconds, state = batch(state, launches)
            if seconds >= _FIRST_GUESS_SHARE * self.batch_s:
                break
            launches *= min(_MOST_GROWTH, max(2, math.ceil(self.batch_s / seconds)))
        launches = max(1, math.ceil(launches * self.batch_s / seconds))
        found = []
        for _ in range(self.reps):
            seconds, state = batch(state, launches)
            found.append(seconds / (launches * program.calls))
        return found, state


def _batch(
    program: Program, arguments: tuple[Any, ...], state: Any, launches: int
) -> tuple[float, Any]:
    jax.block_until_ready((state, arguments))
    started = time.perf_counter()
    for _ in range(launches):
        state = program(state, *arguments)
    jax.block_until_ready(state)
    return time.perf_counter() - started, state


def side_by_side(operation: Callable[..., Any]) -> Callable[..., Any]:
    """A program's function that runs `operation` on each of several sets of arguments.

    Its state is the list of results of the launch before, there only to be overwritten. The calls
    depend on nothing of each other, but a GPU's stream runs them one after another. Their
    arguments must differ, or XLA would run equal ones once.
    """
    operation = jax.jit(operation)  # traced and lowered once, not once per call

    def function(old: list[Any], *arguments: tuple[Any, ...]) -> list[Any]:
        del old
        return [operation(*one) for one in arguments]

    return function
