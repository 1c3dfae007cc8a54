"""From a source of weights to an executor that is ready to serve."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.target import Target

from lumen.model import LoadedModel, load_model
from lumen.sharding import TENSOR_AXIS
from lumen.tensor_source import TensorSource
from serving.engine.device.arena import ArenaLayout, arena_layout
from serving.engine.device.compilation import Source, compile_all, jax_cache, without_jax_cache
from serving.engine.device.compile_children import CompileChildren, children_for
from serving.engine.device.compile_recipe import recipe
from serving.engine.device.compiler_options import compiler_options
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.executor import DeviceExecutor
from serving.engine.device.memory import device_memory
from serving.engine.device.program_arguments import ArgumentLister
from serving.engine.device.program_cache import ProgramCache, open_program_cache
from serving.engine.device.program_identity import replica_identity
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.device.programs import HeadKind, ProgramBuilder, Programs
from serving.engine.executor import ExecutorLimits
from serving.errors import ConfigurationError

BuildProgress = Callable[[int, int, str], None]
"""Called with (done, total, what): weights loaded and programs made, one count for both.

what: WEIGHTS, a program's name, or its name followed by LOADED if no compiler was needed.
"""

WEIGHTS = "weights"
LOADED = " (loaded)"

_EXECUTABLES = "executables"


def build_device_executor(
    source: TensorSource,
    devices: Sequence[jax.Device],
    config: DeviceExecutorConfig,
    progress: BuildProgress | None = None,
) -> DeviceExecutor:
    """Load the weights onto the devices, allocate the arena, compile every program.

    devices: of one platform; more than one are used tensor-parallel. Raises ConfigurationError if
    the settings do not fit the model or the memory (saying what would), or if others may write to
    the cache of executables; CheckpointError and ModelConfigError if the weights do not fit the
    model.
    """
    limit = source.config.max_position
    if config.max_model_len > limit:
        raise ConfigurationError(
            f"max_model_len is {config.max_model_len}, but the model goes up to {limit} tokens; "
            "lower it."
        )
    mesh = Mesh(np.array(devices), (TENSOR_AXIS,))
    modules = source.config.num_units + 2
    total = modules + _program_count(config)
    done = 0

    def advance(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name)

    with _children(config, devices) as children, jax_cache(config.cache_dir, devices):
        model = load_model(source, mesh, config.dtype, lambda count, of: advance(WEIGHTS))
        jax.block_until_ready((model.embedding, model.units, model.head))
        layout = arena_layout(
            model.config, model.heads, model.dtype, config, device_memory(devices),
            Target.of(devices),
        )  # fmt: skip
        limits = _limits(model, layout, config)
        programs = _compile(model, layout, limits, config, advance, children)
    return DeviceExecutor(model, programs, limits, programs.zero_arena())


def _program_count(config: DeviceExecutorConfig) -> int:
    return 1 + len(config.decode_buckets) * (2 + len(HeadKind)) + len(config.chunk_buckets) * 3


def _limits(
    model: LoadedModel, layout: ArenaLayout, config: DeviceExecutorConfig
) -> ExecutorLimits:
    return ExecutorLimits(
        num_rows=config.num_rows,
        num_blocks=layout.num_blocks,
        slots_per_block=layout.slots_per_block,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_prefill_tokens=config.max_prefill_tokens,
        max_prefills=config.max_prefills,
        vocab_size=model.config.vocab_size,
        max_logprobs=min(config.max_logprobs, model.config.vocab_size),
        # Sums over devices round differently, so KV of another width is not reused.
        model_revision=f"{model.revision}:tensor{model.mesh.size}",
    )


def _compile(
    model: LoadedModel,
    layout: ArenaLayout,
    limits: ExecutorLimits,
    config: DeviceExecutorConfig,
    advance: Callable[[str], None],
    children: CompileChildren | None,
) -> Programs:
    shapes = ProgramShapes(
        model.config, model.defs, model.mesh, model.dtype, layout, limits.num_rows,
        limits.max_blocks_per_row, limits.max_logprobs,
    )  # fmt: skip
    decode, chunks = config.decode_buckets, config.chunk_buckets
    arguments = ArgumentLister(shapes).arguments(decode, chunks)
    sources = {
        key: Source(lower, arguments[key], key)
        for key, lower in sorted(
            ProgramBuilder(shapes).lowerings(decode, chunks).items(), key=_longest_first
        )
    }
    names = {key: " ".join(str(_word(part)) for part in key) for key in sources}
    for key in sources:
        if key[0].startswith("prefill"):
            names[key] += f" of {chunks[key[1]]}"  # sequences: a program of its own in the cache
    target = Target.of(list(shapes.mesh.devices.flat))
    if children is not None:
        children.instruct(recipe(shapes, target, decode, chunks))
    with _program_cache(config, shapes) as cache:
        compiled = compile_all(
            {names[key]: source for key, source in sources.items()},
            config.compile_threads,
            lambda name, loaded: advance(name + LOADED if loaded else name),
            cache,
            children,
            compiler_options(target.platform),
        )
    tables: dict[str, dict[Any, Any]] = {}
    for key in sources:
        kind, *rest = key
        place = tuple(rest) if len(rest) > 1 else (rest[0] if rest else None)
        tables.setdefault(kind, {})[place] = compiled[names[key]]
    return Programs(**{**tables, "zero_arena": tables["zero_arena"][None]})


@contextlib.contextmanager
def _program_cache(
    config: DeviceExecutorConfig, shapes: ProgramShapes
) -> Iterator[ProgramCache | None]:
    """The executables of this replica, in place of JAX's cache; None: as JAX is configured."""
    if config.cache_dir is None:
        yield None
        return
    with without_jax_cache():
        identity = replica_identity(shapes, Target.of(list(shapes.mesh.devices.flat)))
        yield open_program_cache(config.cache_dir / _EXECUTABLES, shapes.mesh, identity)


_ORDER = ("decode_unit", "prefill_unit", HeadKind.COMPLETE, HeadKind.TRUNCATED, HeadKind.SAMPLED)
"""Kinds of programs that take long to make, the longest first."""


def _longest_first(item: tuple[tuple[Any, ...], Any]) -> int:
    kinds = item[0]
    return next((place for place, kind in enumerate(_ORDER) if kind in kinds), len(_ORDER))


@contextlib.contextmanager
def _children(
    config: DeviceExecutorConfig, devices: Sequence[jax.Device]
) -> Iterator[CompileChildren | None]:
    """Processes to compile in, where they pay and something is to be compiled."""
    count = children_for(devices, _program_count(config))
    if not count or config.cache_dir is None:
        yield None
        return
    children = CompileChildren(count)
    try:
        yield children
    finally:
        children.close()


def _word(part: Any) -> Any:
    return part.value if isinstance(part, HeadKind) else part
