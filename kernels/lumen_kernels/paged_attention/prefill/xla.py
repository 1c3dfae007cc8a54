"""Prefill attention in plain XLA: the stream cut into tiles of one row each."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention import xla
from lumen_kernels.paged_attention.options import Arena, Options

TILE_TOKENS = 64
"""Tokens of a tile, when there are several rows; the last tile of a row may be shorter."""


def attend(
    q: jax.Array,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Output, shaped as q [tokens, heads, head_dim], and log-sum-exp [tokens, heads]."""
    tokens = q.shape[0]
    if counts.shape[0] == 1:  # one row is one tile: it reads its prefix once
        steps = jnp.arange(tokens, dtype=jnp.int32)
        positions = jnp.where(steps < counts, starts + steps, -1)[None]
        out, lse = xla.read(q[None], arena, shape, tables, positions, layer_offset, options)
        return out[0], lse[0]
    tile = min(TILE_TOKENS, tokens)
    row, first, in_tile = _tiles(counts, tokens, tile)
    steps = jnp.arange(tile, dtype=jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    begins = ends - counts
    index = (begins[row] + first)[:, None] + steps  # in the stream, [tiles, tile]
    valid = steps < in_tile[:, None]
    positions = jnp.where(valid, (starts[row] + first)[:, None] + steps, -1)
    outs, lses = xla.read(
        q[jnp.where(valid, index, 0)], arena, shape, tables[row], positions, layer_offset, options
    )
    index = jnp.where(valid, index, tokens)
    out = jnp.zeros_like(q).at[index].set(outs, mode="drop")
    lse = jnp.full(q.shape[:2], -jnp.inf, jnp.float32).at[index].set(lses, mode="drop")
    return out, lse


def _tiles(counts: jax.Array, tokens: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row, first token in its row, and number of tokens (0 for spare ones) of every tile."""
    rows = counts.shape[0]
    most = tokens // tile + rows
    per_row = -(-counts // tile)
    ends = jnp.cumsum(per_row)
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, rows - 1)
    first = (index - (ends - per_row)[row]) * tile
    left = jnp.clip(counts[row] - first, 0, tile)
    return row, first, jnp.where(index < ends[-1], left, 0)
