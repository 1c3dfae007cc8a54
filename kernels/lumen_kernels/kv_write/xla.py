"""KV write in plain XLA: the oracle of every backend, and the fallback where none exists."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape


def write(
    k: jax.Array,
    v: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array,
    shape: ArenaShape,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.kv_write.write`; k and v in the arena's dtype, layer_offset int32.

    Every dimension but the row's own is indexed. If K and V of a row were one window of the
    scatter (`.at[slot, :, offset]`), XLA on TPU would bring the whole arena into another layout
    for it; through a flat view XLA on CPU would copy a packed arena.
    """
    tokens, heads = k.shape[:2]
    values = jnp.concatenate([k, v], 2)[:, :, None] if shape.packed else jnp.stack([k, v], 2)
    heads_slots = (slots + layer_offset)[:, None] + jnp.arange(heads, dtype=jnp.int32)
    pages = jnp.arange(values.shape[2], dtype=jnp.int32)
    distinct = jnp.arange(tokens * heads, dtype=jnp.int32).reshape(tokens, heads)
    written = []
    for segment, first, size in zip(arena, shape.first_slots, shape.slots, strict=True):
        local = heads_slots - first
        here = (slots >= 0)[:, None] & (local >= 0) & (local < size)
        # Distinct and out of range: dropped, and the indices stay unique.
        rows = jnp.where(here, local, size + distinct)
        place = segment.at[rows[:, :, None], pages, offsets[:, None, None]]
        written.append(place.set(values, mode="drop", unique_indices=True))
    return tuple(written)
