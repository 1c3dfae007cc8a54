"""Prefill attention in plain XLA: the stream cut into tiles of one row each."""

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention import xla
from lumen_kernels.paged_attention.options import Arena, Options

TILE_TOKENS = 64
"""Tokens of a tile, when there are several rows; the last tile of a row may be shorter."""

CPU_TILE_TOKENS = 32
"""The same on a CPU: 16 take three times as long for 128 tokens of one row behind 256, 64 nearly
twice as long for 8 rows of 16."""

_Sums = tuple[jax.Array, jax.Array]
"""Output [tokens, heads, head_dim] and log-sum-exp [tokens, heads] of the stream, so far."""


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
    on_cpu = options.target.platform == "cpu"
    tile = min(CPU_TILE_TOKENS if on_cpu else TILE_TOKENS, tokens)
    tiles = _tiles(counts, tokens, tile)
    begins = jnp.cumsum(counts, dtype=jnp.int32) - counts
    steps = jnp.arange(tile, dtype=jnp.int32)

    def with_tiles(sums: _Sums, row: jax.Array, first: jax.Array, in_tile: jax.Array) -> _Sums:
        index = (begins[row] + first)[:, None] + steps  # in the stream, [tiles, tile]
        valid = steps < in_tile[:, None]
        positions = jnp.where(valid, (starts[row] + first)[:, None] + steps, -1)
        mine = q[jnp.where(valid, index, 0)]
        found = xla.read(mine, arena, shape, tables[row], positions, layer_offset, options)
        index = jnp.where(valid, index, tokens)
        out, lse = (
            so_far.at[index].set(new, mode="drop") for so_far, new in zip(sums, found, strict=True)
        )
        return out, lse

    nothing = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    if not on_cpu:
        return with_tiles(nothing, *tiles)

    # One by one: no work for spare tiles, and each reads its own context only.
    def with_one(number: jax.Array, sums: _Sums) -> _Sums:
        one = (lax.dynamic_slice_in_dim(array, number, 1) for array in tiles)
        return with_tiles(sums, *one)

    used = jnp.sum(tiles[2] > 0, dtype=jnp.int32)
    result: _Sums = lax.fori_loop(0, used, with_one, nothing)
    return result


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
