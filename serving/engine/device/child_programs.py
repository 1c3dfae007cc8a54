"""Programs on their way from the children that compile them to the devices that run them."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from serving.engine.device.compile_children import CompileChildren
from serving.engine.device.executables import loaded_executable
from serving.engine.device.program_cache import ProgramCache
from serving.engine.device.program_signature import mismatch
from serving.engine.device.program_source import Source

_log = logging.getLogger(__name__)


class ChildPrograms:
    """Has children compile programs, loads them and keeps them in the cache, as they come.

    children: closed with this. wanted: programs by name, the first begun first.
    """

    def __init__(
        self,
        children: CompileChildren,
        cache: ProgramCache,
        wanted: Mapping[str, Source],
    ) -> None:
        self._children = children
        self._cache = cache
        self._pool = ThreadPoolExecutor(children.count, thread_name_prefix="child")
        self._coming: dict[str, Future[jax.stages.Compiled | None]] = {
            name: self._pool.submit(self._bring, name, source) for name, source in wanted.items()
        }

    def take(self, name: str) -> jax.stages.Compiled | None:
        """Wait for a program; None if no child made it."""
        coming = self._coming.get(name)
        return None if coming is None else coming.result()

    def close(self) -> None:
        """End the children and forget what was not taken."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._children.close()
        self._pool.shutdown()

    def _bring(self, name: str, source: Source) -> jax.stages.Compiled | None:
        packed = self._children.compile(source.key)
        if packed is None:
            return None
        try:
            compiled = loaded_executable(packed, self._cache.devices)
            wrong = mismatch(compiled, source.arguments)
        except Exception as error:  # unpickling and loading raise whatever they like
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            _log.warning("What a child process made of %s is of no use: %s", name, wrong)
            return None
        self._cache.keep(name, packed)
        return compiled
