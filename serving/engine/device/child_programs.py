"""Programs on their way from the children that compile them to the devices that run them."""

import logging
from collections.abc import Mapping, Sequence
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

    children: closed with this. wanted: programs by name, in groups that one child makes; the first
    are begun first.
    """

    def __init__(
        self,
        children: CompileChildren,
        cache: ProgramCache,
        wanted: Sequence[Mapping[str, Source]],
    ) -> None:
        self._children = children
        self._cache = cache
        self._pool = ThreadPoolExecutor(children.count, thread_name_prefix="child")
        self._loading = ThreadPoolExecutor(children.count, thread_name_prefix="loading")
        self._coming: dict[str, Future[jax.stages.Compiled | None]] = {
            name: Future() for group in wanted for name in group
        }
        for group in wanted:
            self._pool.submit(self._bring, group)

    def take(self, name: str) -> jax.stages.Compiled | None:
        """Wait for a program; None if no child made it."""
        coming = self._coming.get(name)
        return None if coming is None else coming.result()

    def close(self) -> None:
        """End the children and forget what was not taken."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._children.close()
        self._pool.shutdown()
        self._loading.shutdown()
        for coming in self._coming.values():
            coming.cancel()

    def _bring(self, group: Mapping[str, Source]) -> None:
        keys = [source.key for source in group.values()]
        made = self._children.compile_together(keys)
        for (name, source), packed in zip(group.items(), made, strict=True):
            if packed is None:
                self._coming[name].set_result(None)
            else:  # beside the child, which goes on
                self._loading.submit(self._load, name, source, packed)

    def _load(self, name: str, source: Source, packed: bytes) -> None:
        compiled = None
        try:
            compiled = loaded_executable(packed, self._cache.devices)
            wrong = mismatch(compiled, source.arguments)
        except Exception as error:  # unpickling and loading raise whatever they like
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            _log.warning("What a child process made of %s is of no use: %s", name, wrong)
            compiled = None
        self._coming[name].set_result(compiled)
        if compiled is not None:
            self._cache.keep(name, packed)
