"""Child processes that compile programs for devices they do not touch.

python -m serving.engine.device.compile_child FD...

FD: one end each of a socket to `compile_children`. Once all is imported, this process forks one for
each. From its socket each gets a recipe and then keys of programs, and there it answers each. It
ends when the other end does, also in the middle of work.
"""

import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
from lumen_kernels import quick_lowering

from serving.engine.device.compile_recipe import Answer, Recipe
from serving.engine.device.compiler_options import compiler_options
from serving.engine.device.executables import packed_executable
from serving.engine.device.program_source import Key
from serving.engine.device.programs import ProgramBuilder


def main(fds: Sequence[int]) -> None:
    """Become a process for each of the sockets."""
    quick_lowering.install()
    mine = next((fd for fd in fds[1:] if os.fork() == 0), fds[0])
    for fd in fds:
        if fd != mine:
            os.close(fd)
    _serve(Connection(mine))


def _serve(link: Connection) -> None:
    """Compile what is asked for, until the other end is gone. Raises RecipeError."""
    gc.disable()  # as `compile_all` does
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from it cannot be saved
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, asked), daemon=True).start()
    make = _maker(asked.get())
    while True:
        key = asked.get()
        try:
            answer: Answer = (make(key), "")
        except Exception as error:  # told to the other end, which compiles it itself
            answer = (None, f"{type(error).__name__}: {error}")
        link.send(answer)


def _listen(link: Connection, asked: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            asked.put(link.recv())
        except (EOFError, OSError):
            os._exit(0)


def _maker(recipe: Recipe) -> Callable[[Key], bytes]:
    if recipe.topology is None:
        jax.config.update("jax_num_cpu_devices", max(recipe.device_ids) + 1)
    shapes = recipe.shapes()
    options = compiler_options(shapes.mesh.devices.flat[0].platform, one_core=True)
    lowerings = ProgramBuilder(shapes, recipe.target).lowerings(
        recipe.decode_buckets, dict(recipe.chunk_buckets), recipe.mixed_sizes
    )
    devices = list(shapes.mesh.devices.flat)

    def make(key: Key) -> bytes:
        return packed_executable(lowerings[key]().compile(compiler_options=options), devices)

    return make


if __name__ == "__main__":
    main([int(fd) for fd in sys.argv[1:]])
