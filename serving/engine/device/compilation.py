"""Compiling ahead of time: in parallel, once for all starts, and never while serving."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from serving.engine.device.child_programs import ChildPrograms
from serving.engine.device.program_cache import ProgramCache, may_load
from serving.engine.device.program_source import Source

Compiled = Callable[..., Any]
"""A compiled program: takes exactly the shapes it was compiled for, and compiles nothing."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

_watching = threading.local()
_listener_lock = threading.Lock()
_listener_installed = False
_cache_switch = threading.RLock()


class CompileWatch:
    """Counts compilations that happen on a thread while it is inside `with watch:`."""

    def __init__(self) -> None:
        self.count = 0
        _install_listener()

    def __enter__(self) -> None:
        _watching.watch = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _watching.watch = None


def _install_listener() -> None:
    global _listener_installed
    with _listener_lock:
        if not _listener_installed:
            jax.monitoring.register_event_duration_secs_listener(_on_event)
            _listener_installed = True


def _on_event(event: str, duration_secs: float, **details: str | int) -> None:
    watch = getattr(_watching, "watch", None)
    if watch is not None and event == _COMPILE_EVENT:
        watch.count += 1


def compile_all(
    sources: Mapping[str, Source],
    threads: int,
    progress: Callable[[str, bool], None],
    cache: ProgramCache | None = None,
    children: ChildPrograms | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Compiled]:
    """Load what the cache has, take what children make, compile the rest here.

    progress is told each name when it is done, and whether it came from the cache. options:
    `compiler_options`.

    What is compiled here is lowered one after another and compiled several at a time. Lowering is
    Python: if all threads did it at once, the first would be done, and a compiler busy, as late as
    the last. (37 programs of the 8B shape on 16 cores and one H200: 22 of 35 s went by before the
    first unit began to compile.)
    """
    compiled: dict[str, Compiled] = {}
    work = _Work(cache, children, options)
    with (
        _without_collections(),
        ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool,
    ):
        waiting = {pool.submit(work.make, name, source): name for name, source in sources.items()}
        try:
            for future in as_completed(waiting):
                name = waiting[future]
                compiled[name], loaded = future.result()
                progress(name, loaded)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
    return compiled


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection: lowering makes many objects, and hardly any of them in cycles.

    Collections took a tenth of the time (7 units of the 8B shape lowered for Hopper on a CPU: 8.1 s
    of processor time with them, 7.3 without, for 12 MiB more memory).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Work:
    """Makes programs, on several threads."""

    def __init__(
        self,
        cache: ProgramCache | None,
        children: ChildPrograms | None,
        options: dict[str, Any] | None,
    ) -> None:
        self._cache = cache
        self._children = children
        self._options = options
        self._lowering = threading.Lock()

    def make(self, name: str, source: Source) -> tuple[Compiled, bool]:
        """(the program, whether it came from the cache)."""
        if self._children is not None and (made := self._children.take(name)) is not None:
            return made, False
        cache = self._cache
        if cache is not None and (loaded := cache.load(name, source.arguments)) is not None:
            return loaded, True
        with self._lowering:
            lowered = source.lower()
        compiled = lowered.compile(compiler_options=self._options)
        if cache is not None:
            cache.store(name, compiled)
        return compiled, False


@contextlib.contextmanager
def jax_cache(cache_dir: Path | None, devices: Sequence[jax.Device]) -> Iterator[None]:
    """Compile through JAX's persistent cache, where that is safe."""
    if cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with contextlib.nullcontext() if may_load(devices) else without_jax_cache():
        yield


@contextlib.contextmanager
def without_jax_cache() -> Iterator[None]:
    """Compile everything.

    An executable that JAX read from its cache cannot be saved once more: on a CPU that is refused
    for some programs and, worse, others fail only when what was saved is run.
    """
    with _cache_switch:
        before = jax.config.jax_enable_compilation_cache
        _enable_cache(False)
        try:
            yield
        finally:
            _enable_cache(before)


def _enable_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX asks for the setting once and remembers
