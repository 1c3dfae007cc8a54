"""Block copies in plain XLA: the oracle of every backend, and the fallback where none exists."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape, segment_of


def gather(
    arena: tuple[jax.Array, ...], bases: jax.Array, slots_per_block: int, shape: ArenaShape
) -> jax.Array:
    """See `lumen_kernels.block_copy.gather`; bases are not negative where it matters."""
    slots = bases[:, None] + jnp.arange(slots_per_block, dtype=jnp.int32)
    (first, *rest) = zip(arena, segment_of(shape, slots), strict=True)
    segment, (_, local) = first
    buffer = segment.at[local].get(mode="promise_in_bounds")
    for segment, (inside, local) in rest:
        pages = segment.at[local].get(mode="promise_in_bounds")
        buffer = jnp.where(inside[:, :, None, None, None], pages, buffer)
    return buffer


def scatter(
    arena: tuple[jax.Array, ...], bases: jax.Array, buffer: jax.Array, shape: ArenaShape
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.scatter`."""
    blocks, slots_per_block = buffer.shape[:2]
    slots = bases[:, None] + jnp.arange(slots_per_block, dtype=jnp.int32)
    spare = jnp.arange(blocks * slots_per_block, dtype=jnp.int32).reshape(slots.shape)
    written = []
    for segment, first, size in zip(arena, shape.first_slots, shape.slots, strict=True):
        local = slots - first
        inside = (bases >= 0)[:, None] & (local >= 0) & (local < size)
        # Distinct and out of range: dropped, and the indices stay unique (five times as fast).
        local = jnp.where(inside, local, size + spare)
        written.append(segment.at[local].set(buffer, mode="drop", unique_indices=True))
    return tuple(written)


def copy(
    arena: tuple[jax.Array, ...],
    sources: jax.Array,
    destinations: jax.Array,
    slots_per_block: int,
    shape: ArenaShape,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.copy`."""
    nothing = (sources < 0) | (destinations < 0)
    buffer = gather(arena, sources, slots_per_block, shape)
    return scatter(arena, jnp.where(nothing, -1, destinations), buffer, shape)
