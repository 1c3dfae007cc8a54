"""From a source of weights to an executor that is ready to serve."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.reduce_norm.mailbox import mailboxes_between
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.model import LoadedModel, ModelDefs, ModuleDef, load_model, model_defs
from lumen.placement import Weights
from lumen.sharding import TENSOR_AXIS, HeadLayout
from lumen.tensor_source import TensorSource
from serving.engine.device import compile_children, weight_hole
from serving.engine.device.arena import ArenaLayout, arena_layout
from serving.engine.device.compilation import jax_cache
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.executor import DeviceExecutor
from serving.engine.device.memory import device_memory
from serving.engine.device.program_making import ProgramMaking, program_count
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.executor import ExecutorLimits
from serving.errors import ConfigurationError

BuildProgress = Callable[[int, int, str], None]
"""Called with (done, total, what): weights loaded and programs made, one count for both.

what: WEIGHTS, a program's name, or its name followed by LOADED if no compiler was needed.
"""

WEIGHTS = "weights"
LOADED = " (loaded)"


def build_device_executor(
    source: TensorSource,
    devices: Sequence[jax.Device],
    config: DeviceExecutorConfig,
    progress: BuildProgress | None = None,
) -> DeviceExecutor:
    """Load the weights onto the devices, allocate the arena, compile and run every program.

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
    total = source.config.num_units + 2 + program_count(config)
    done = 0

    def advance(name: str, loaded: bool = False) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name + LOADED if loaded else name)

    with jax_cache(config.cache_dir, devices), contextlib.ExitStack() as ends:
        ends.callback(compile_children.dismiss)
        making = _early(source, mesh, config)
        if making is not None:
            ends.callback(making.close)
        places = _places(source.config, mesh, config)
        model = load_model(source, mesh, config.dtype, lambda count, of: advance(WEIGHTS), places)
        jax.block_until_ready((model.embedding, model.units, model.head))
        _check_hole(model, config)
        layout = arena_layout(
            model.config, model.heads, model.dtype, config, device_memory(devices),
            Target.of(devices),
        )  # fmt: skip
        limits = _limits(model, layout, config)
        if making is not None and making.shapes.arena_layout != layout:
            making.close()
            making = None
        if making is None:
            making = ProgramMaking(_shapes(model.config, model.defs, mesh, layout, config), config)
            ends.callback(making.close)
        programs = making.finish(advance)
    executor = DeviceExecutor(model, programs, limits, programs.zero_arena())
    executor.rehearse()
    return executor


def _places(model: ModelConfig, mesh: Mesh, config: DeviceExecutorConfig) -> dict[int, Weights]:
    """Where units go that may be dropped; raises ConfigurationError if there are no such units."""
    if not config.droppable_units:
        return {}
    numbers = sorted(set(config.droppable_units))
    if len(numbers) < len(config.droppable_units) or not 0 <= numbers[0] <= numbers[-1] < (
        model.num_units
    ):
        raise ConfigurationError(
            f"droppable_units is {config.droppable_units}; it must be different numbers from 0 to "
            f"{model.num_units - 1}, as the model has {model.num_units} units."
        )
    heads = HeadLayout(model.num_heads, model.num_kv_heads, mesh.size)
    unit = model_defs(model, heads, jnp.dtype(config.dtype)).unit
    return weight_hole.reserve(unit, mesh, numbers)


def _check_hole(model: LoadedModel, config: DeviceExecutorConfig) -> None:
    """See that droppable units lie as they should, where they do not move."""
    if weight_hole.stays(model.mesh.devices.flat[0]):
        weight_hole.hole_bytes({number: model.units[number] for number in config.droppable_units})


def _early(source: TensorSource, mesh: Mesh, config: DeviceExecutorConfig) -> ProgramMaking | None:
    """The programs begun before the weights are loaded, for the arena that will fit beside them.

    None where nothing would be gained: where this process alone compiles, or where it cannot be
    said what the arena will be.
    """
    devices = list(mesh.devices.flat)
    memory = device_memory(devices)
    if memory is None or not compile_children.children_for(devices, program_count(config)):
        return None
    model, dtype = source.config, jnp.dtype(config.dtype)
    heads = HeadLayout(model.num_heads, model.num_kv_heads, mesh.size)
    defs = model_defs(model, heads, dtype)
    left = dataclasses.replace(memory, free_bytes=memory.free_bytes - _weight_bytes(model, defs))
    try:
        layout = arena_layout(model, heads, dtype, config, left, Target.of(devices))
    except ConfigurationError:  # said once the weights are there, with what is free then
        return None
    making = ProgramMaking(_shapes(model, defs, mesh, layout, config), config)
    making.begin()
    return making


def _weight_bytes(model: ModelConfig, defs: ModelDefs) -> int:
    """What all weights take on the one device of a mesh."""

    def module(module: ModuleDef[Any]) -> int:
        sizes = (
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(module.global_shapes, module.dtypes, strict=True)
        )
        return sum(
            -(-size // weight_hole.ALLOCATION_BYTES) * weight_hole.ALLOCATION_BYTES
            for size in sizes
        )

    tied = module(defs.embedding) if model.tie_embeddings else 0
    return module(defs.embedding) + model.num_units * module(defs.unit) + module(defs.head) - tied


def _shapes(
    model: ModelConfig,
    defs: ModelDefs,
    mesh: Mesh,
    layout: ArenaLayout,
    config: DeviceExecutorConfig,
) -> ProgramShapes:
    return ProgramShapes(
        model, defs, mesh, jnp.dtype(config.dtype), layout, config.num_rows,
        -(-config.max_model_len // config.block_size), _max_logprobs(model, config),
        mailboxes_between(list(mesh.devices.flat), model.hidden_size),
    )  # fmt: skip


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
        max_logprobs=_max_logprobs(model.config, config),
        mixed_sizes=config.mixed_sizes,
        # Sums over devices round differently, so KV of another width is not reused.
        model_revision=f"{model.revision}:tensor{model.mesh.size}",
    )


def _max_logprobs(model: ModelConfig, config: DeviceExecutorConfig) -> int:
    return min(config.max_logprobs, model.vocab_size)
