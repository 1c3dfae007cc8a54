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
    shape: ArenaShape,
) -> tuple[jax.Array, ...]:
    """Store one token's K and V per row, in place if the arena is donated.

    k, v [tokens, kv heads, head_dim] in the arena's dtype; slots int32 [tokens]: of the token's
    block, of this layer's head 0, negative if it is not stored; offsets int32 [tokens].

    The scatter goes through the flat view of a segment: in the natural form XLA on TPU copies the
    whole arena into another layout. A segment has fewer than 2^31 rows however large it is, so
    its row ids fit int32 where a byte offset would not.
    """
    heads = k.shape[1]
    pages, block_size, width = shape.page_shape
    values = jnp.concatenate([k, v], axis=2) if shape.packed else jnp.stack([k, v], axis=2)
    values = values.reshape(-1, heads, pages, width)
    inside = jnp.arange(heads * pages, dtype=jnp.int32).reshape(heads, pages) * block_size
    distinct = jnp.arange(k.shape[0] * heads * pages, dtype=jnp.int32)
    distinct = distinct.reshape(-1, heads, pages)
    written = []
    for segment, first in zip(arena, shape.first_slots, strict=True):
        local = slots - first
        here = (slots >= 0) & (local >= 0) & (local < segment.shape[0])
        rows = (local * (pages * block_size) + offsets)[:, None, None] + inside
        # Distinct and out of range: dropped, and the indices stay unique.
        spare = segment.shape[0] * pages * block_size + distinct
        rows = jnp.where(here[:, None, None], rows, spare)
        flat = segment.reshape(-1, width)
        flat = flat.at[rows].set(values, mode="drop", unique_indices=True)
        written.append(flat.reshape(segment.shape))
    return tuple(written)
