"""The programs of one replica: from its cache, from child processes, or compiled here."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from lumen_kernels.target import Target

from serving.engine.device import compile_children
from serving.engine.device.child_programs import ChildPrograms
from serving.engine.device.compilation import compile_all, without_jax_cache
from serving.engine.device.compile_children import CompileChildren
from serving.engine.device.compile_recipe import recipe
from serving.engine.device.compiler_options import compiler_options
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.head_programs import DRAWN_KINDS, HeadKind, draw_sizes
from serving.engine.device.program_arguments import ArgumentLister
from serving.engine.device.program_cache import (
    ProgramCache,
    loads_what_it_saved,
    may_move,
    open_program_cache,
)
from serving.engine.device.program_identity import replica_identity
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.program_source import Key, Source
from serving.engine.device.programs import ProgramBuilder, Programs

_EXECUTABLES = "executables"
_SLOWEST = (
    "mixed_unit", "prefill_unit", "mixed_last", "prefill_last", "decode_unit",
    HeadKind.COMPLETE, HeadKind.TRUNCATED, "mixed_embed", "decode_embed", "prefill_embed",
    HeadKind.SAMPLED,
)  # fmt: skip
"""Kinds of programs, those that take longest to make first. Of units, those of few rows do. Last
come the quickest, so that all children end at about the same time."""

_log = logging.getLogger(__name__)


class ProgramMaking:
    """Makes the programs of a replica of these shapes.

    `begin` may be called well before `finish`, which else calls it: children then work meanwhile,
    and this process only loads what they made. Call `close` in the end.
    """

    def __init__(self, shapes: ProgramShapes, config: DeviceExecutorConfig) -> None:
        self.shapes = shapes
        self._config = config
        self._devices = list(shapes.mesh.devices.flat)
        self._target = Target.of(self._devices)
        self._cache: ProgramCache | None = None
        self._children: ChildPrograms | None = None
        self._begun = False
        chunks = config.chunk_buckets
        buckets = (config.decode_buckets, chunks, config.mixed_sizes)
        arguments = ArgumentLister(shapes).arguments(*buckets)
        lowerings = ProgramBuilder(shapes).lowerings(*buckets)
        self._sources = {
            _name(key, chunks): Source(key, lowerings[key], arguments[key])
            for key in sorted(lowerings, key=_slowest_first)
        }

    def begin(self) -> None:
        """Have children compile what the cache lacks, if they pay.

        Raises ConfigurationError if others may write to the cache.
        """
        if self._begun or self._config.cache_dir is None:
            return
        self._begun = True
        with without_jax_cache():
            self._cache = open_program_cache(
                self._config.cache_dir / _EXECUTABLES,
                self.shapes.mesh,
                replica_identity(self.shapes, self._target, may_move(self.shapes.mesh)),
            )
        if self._cache is None:
            return
        self._begin_children(self._cache)  # first: what follows takes a GPU some seconds
        with without_jax_cache():
            if not loads_what_it_saved(self.shapes.mesh):
                self._cache = None
                self.close()

    def _begin_children(self, cache: ProgramCache) -> None:
        wanted = {name: source for name, source in self._sources.items() if not cache.has(name)}
        count = compile_children.children_for(self._devices, len(wanted))
        if not count:
            compile_children.dismiss()
            return
        config = self._config
        try:
            what = recipe(
                self.shapes, self._target, config.decode_buckets, config.chunk_buckets,
                config.mixed_sizes,
            )  # fmt: skip
            children = CompileChildren(count, what)
        except Exception as error:  # a backend, or the system, says in its own way that it cannot
            _log.warning("All programs are compiled in one process: %s", error)
            return
        groups: dict[Key, dict[str, Source]] = {}
        for name, source in wanted.items():
            groups.setdefault(_sharing(source.key), {})[name] = source
        self._children = ChildPrograms(children, cache, list(groups.values()))

    def finish(self, advance: Callable[[str, bool], None]) -> Programs:
        """All programs. advance: told the name of each, and whether the cache had it.

        Raises ConfigurationError as `begin` does.
        """
        self.begin()
        with self._jax_cache_off():
            compiled = compile_all(
                self._sources,
                self._config.compile_threads,
                advance,
                self._cache,
                self._children,
                compiler_options(self._target.platform),
            )
        tables: dict[str, dict[Any, Any]] = {}
        for name, source in self._sources.items():
            kind, *rest = source.key
            place = tuple(rest) if len(rest) > 1 else (rest[0] if rest else None)
            tables.setdefault(kind, {})[place] = compiled[name]
        made = {**tables, "zero_arena": tables["zero_arena"][None]}
        return Programs(**made, mailboxes=self.shapes.mailboxes)

    def close(self) -> None:
        """End the children."""
        if self._children is not None:
            self._children.close()
            self._children = None

    def _jax_cache_off(self) -> contextlib.AbstractContextManager[None]:
        """The cache of executables is in place of JAX's; without it, JAX is as it is configured."""
        return contextlib.nullcontext() if self._config.cache_dir is None else without_jax_cache()


def program_count(config: DeviceExecutorConfig) -> int:
    """How many programs a replica has."""
    sizes, calls = config.decode_buckets, len(config.chunk_buckets) + len(config.mixed_sizes)
    return 1 + len(sizes) * 4 + len(draw_sizes(sizes)) * len(DRAWN_KINDS) + calls * 3


def _name(key: Key, chunks: dict[int, int]) -> str:
    name = " ".join(str(part.value if isinstance(part, HeadKind) else part) for part in key)
    if key[0].startswith("prefill"):
        name += f" of {chunks[key[1]]}"  # sequences: a program of its own in the cache
    return name


def _sharing(key: Key) -> Key:
    """Equal for programs that have most of their kernels in common."""
    kind, _, part = key[0].partition("_")
    together = kind in ("prefill", "mixed") and part in ("unit", "last")
    return (kind, *key[1:]) if together else key


def _slowest_first(key: Key) -> tuple[int, int]:
    kind = next((place for place, kind in enumerate(_SLOWEST) if kind in key), len(_SLOWEST))
    return kind, key[1] if len(key) > 1 else 0
