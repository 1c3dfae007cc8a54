"""How large the KV arena is, and whether it fits."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from lumen_kernels.arena import slot_shape
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.sharding import HeadLayout
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.memory import DeviceMemory
from serving.errors import ConfigurationError

_CPU_DEFAULT_BYTES = 1 << 30
_GIB = float(1 << 30)
_MAX_ROWS = (1 << 31) - (1 << 24)  # int32 rows, with indices to spare for writes that are dropped


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Shape of the arena of each device of a replica: [slots, *slot_shape].

    slots_per_block: layers times the KV heads of a device; `heads` of them are of one layer.
    slot_shape: `lumen_kernels.arena.slot_shape` of the device.
    """

    num_blocks: int
    slots_per_block: int
    heads: int
    block_size: int
    slot_shape: tuple[int, int, int]
    dtype: Any

    @property
    def slots(self) -> int:
        """Slots of one device."""
        return self.num_blocks * self.slots_per_block

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one device."""
        slot: int = math.prod(self.slot_shape) * jnp.dtype(self.dtype).itemsize
        return self.slots_per_block * slot


def arena_layout(
    model: ModelConfig,
    heads: HeadLayout,
    dtype: Any,
    config: DeviceExecutorConfig,
    memory: DeviceMemory | None,
    target: Target,
) -> ArenaLayout:
    """Decide how many blocks the arena has.

    memory: with the weights already loaded; None if unknown. Raises ConfigurationError, saying
    what would fit, if the arena does not fit the memory or one request of max_model_len does not
    fit the arena.
    """
    kv_heads = heads.kv_per_device

    def layout(num_blocks: int) -> ArenaLayout:
        return ArenaLayout(
            num_blocks, model.num_layers * kv_heads, kv_heads, config.block_size,
            slot_shape(config.block_size, model.head_dim, target), dtype,
        )  # fmt: skip

    block_bytes = layout(1).block_bytes
    need = -(-config.max_model_len // config.block_size)
    blocks = _wanted_blocks(config, memory, block_bytes, need)
    if memory is not None and (fits := max(memory.free_bytes, 0) // block_bytes) < blocks:
        raise ConfigurationError(
            f"A KV arena of {blocks} blocks takes {_gib(blocks * block_bytes)} on {memory.name}, "
            f"of which {_gib(memory.free_bytes)} is free; at most {fits} blocks "
            f"({fits * config.block_size} tokens) fit: lower num_blocks or the memory budget."
        )
    if blocks < need:
        raise ConfigurationError(
            f"The KV arena holds {blocks} blocks ({blocks * config.block_size} tokens), but one "
            f"request of max_model_len {config.max_model_len} needs {need}; give it "
            f"{_gib(need * block_bytes)} or lower max_model_len to at most "
            f"{blocks * config.block_size}."
        )
    limit = _MAX_ROWS // (layout(1).slots_per_block * 2 * config.block_size)
    if blocks > limit:
        raise ConfigurationError(
            f"A KV arena of {blocks} blocks has more rows than 32-bit indices reach; at most "
            f"{limit} blocks work: lower num_blocks or the memory budget."
        )
    return layout(blocks)


def _wanted_blocks(
    config: DeviceExecutorConfig, memory: DeviceMemory | None, block_bytes: int, need: int
) -> int:
    if config.num_blocks is not None:
        return config.num_blocks
    if config.arena_bytes is not None:
        return config.arena_bytes // block_bytes
    if memory is None:
        raise ConfigurationError(
            "The devices do not say how much memory they have; set num_blocks or arena_bytes."
        )
    if memory.shared_with_host:
        return min(config.num_rows * need, max(_CPU_DEFAULT_BYTES // block_bytes, need))
    used = memory.total_bytes - memory.free_bytes
    return max(int(memory.total_bytes * config.memory_fraction) - used, 0) // block_bytes


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
