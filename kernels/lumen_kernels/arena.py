"""The KV arena: how a slot holds the K page and the V page of one block, layer and KV head.

A device's arena is one array, or up to `MAX_SEGMENTS` arrays that differ in their number of slots
only. Slot ids are common: segment 0 holds slots 0 .. n0 - 1, segment 1 the n1 after them, and so
on. A block lies in one segment.

split:  [slots, 2, block_size, head_dim]        K is [:, 0], V is [:, 1]
packed: [slots, 1, block_size, 2 * head_dim]    K is [..., :head_dim], V is [..., head_dim:]

Heads of 64 are packed on accelerators: a TPU pads rows to 128 lanes, and copies an arena of 64
wide rows at every kernel. Block tables hold slot bases: layer l, head h of a block is slot
base + l * heads + h, with `heads` the KV heads of the device; bases are multiples of `heads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Backend, Target

MAX_SEGMENTS = 4
"""Arrays an arena may consist of."""

PACKED_HEAD_DIM = 64
"""Heads this wide share a row: K in lanes 0-63, V in lanes 64-127."""


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """Shape of an arena's segments, read off the arrays.

    slots: of each segment, in order.
    """

    slots: tuple[int, ...]
    block_size: int
    head_dim: int
    packed: bool

    @property
    def first_slots(self) -> tuple[int, ...]:
        """The id of each segment's first slot."""
        return tuple(sum(self.slots[:index]) for index in range(len(self.slots)))

    @property
    def page_shape(self) -> tuple[int, int, int]:
        """Shape of one slot."""
        if self.packed:
            return (1, self.block_size, 2 * self.head_dim)
        return (2, self.block_size, self.head_dim)


def slot_shape(block_size: int, head_dim: int, target: Target) -> tuple[int, int, int]:
    """Shape of one slot of an arena for this target."""
    packed = head_dim == PACKED_HEAD_DIM and target.backend is not Backend.XLA
    return ArenaShape((), block_size, head_dim, packed).page_shape


def arena_shape(operation: str, arena: Sequence[Any], head_dim: int) -> ArenaShape:
    """Check the segments of an arena and describe them.

    arena: arrays or shape structs. Raises KernelArgumentError naming `arena`.
    """

    def wrong(problem: str) -> KernelArgumentError:
        return KernelArgumentError(operation, "arena", problem)

    if not isinstance(arena, tuple | list) or not 1 <= len(arena) <= MAX_SEGMENTS:
        raise wrong(
            f"must be a tuple of 1 to {MAX_SEGMENTS} arrays, one per segment; it is "
            f"{type(arena).__name__} of {len(arena) if hasattr(arena, '__len__') else '?'}."
        )
    shape = arena[0].shape
    block_size = shape[2] if len(shape) == 4 else 0
    split, packed = (2, block_size, head_dim), (1, block_size, 2 * head_dim)
    if tuple(shape[1:]) not in (split, packed):
        raise wrong(
            f"has shape {tuple(shape)}; for heads of {head_dim} it must be [slots, 2, block_size, "
            f"{head_dim}] or packed [slots, 1, block_size, {2 * head_dim}]."
        )
    for index, segment in enumerate(arena):
        if segment.shape[1:] != shape[1:] or segment.dtype != arena[0].dtype:
            raise wrong(
                f"segment {index} is {segment.dtype}{tuple(segment.shape)}, but segment 0 is "
                f"{arena[0].dtype}{tuple(shape)}; only the number of slots may differ."
            )
    return ArenaShape(
        tuple(segment.shape[0] for segment in arena),
        block_size,
        head_dim,
        packed=tuple(shape[1:]) == packed,
    )


def segment_of(shape: ArenaShape, slot: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """(whether the slot lies in it, its index there) for each segment, traced.

    slot: int32 of any shape. An index outside its segment is clamped to it.
    """
    found = []
    for first, slots in zip(shape.first_slots, shape.slots, strict=True):
        local = slot - first
        inside = (local >= 0) & (local < slots)
        found.append((inside, local.clip(0, slots - 1)))
    return found
