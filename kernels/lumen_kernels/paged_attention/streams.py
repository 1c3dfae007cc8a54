"""Flat token streams: which row and position each token has, and where its K and V are written."""

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels import kv_write
from lumen_kernels.paged_attention.options import Arena
from lumen_kernels.target import Target


def stream_positions(
    starts: jax.Array, counts: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Row and position of each token of a stream, int32 [tokens]; position -1 for padding.

    starts, counts int32 [rows]: the first position and the number of tokens of each row; rows lie
    one behind the other.
    """
    index = jnp.arange(tokens, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    position = starts[row] + index - (ends - counts)[row]
    return row, jnp.where(index < ends[-1], position, -1)


def write_places(
    tables: jax.Array, rows: jax.Array, positions: jax.Array, block_size: int
) -> jax.Array:
    """Where tokens of `rows` at `positions`, int32 [tokens], are stored: int32 [2, tokens].

    Slot bases and positions inside the blocks, as `lumen_kernels.rotary_write.write` takes them.
    Where a position is negative the slot is, and nothing is stored.
    """
    at = jnp.maximum(positions, 0)
    slots = jnp.where(positions >= 0, tables[rows, at // block_size], -1)
    return jnp.stack([slots, at % block_size])


def write_at(
    k: jax.Array,
    v: jax.Array,
    arena: Arena,
    block_size: int,
    tables: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
    target: Target,
) -> Arena:
    """Store tokens k, v [tokens, kv heads, head_dim] of `rows` at `positions`, int32 [tokens].

    Where a position is negative nothing is stored.
    """
    slots, offsets = write_places(tables, rows, positions, block_size)
    written: Arena = kv_write.write(k, v, arena, slots, offsets, layer_offset, target=target)
    return written


def in_order(out: jax.Array, arena: Arena) -> tuple[jax.Array, Arena]:
    """Keep the next layer's write behind this layer's reads.

    Otherwise XLA on CPU moves the write forward and copies the arena to make that legal.
    """
    out, arena = lax.optimization_barrier((out, arena))
    return out, arena
