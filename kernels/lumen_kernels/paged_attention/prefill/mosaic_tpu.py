"""Prefill attention in Mosaic TPU: the stream cut into tiles of one row each, an item per tile."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention.mosaic_tpu_blocks import Blocks, prefill_blocks
from lumen_kernels.paged_attention.mosaic_tpu_kernel import Interpret, Items
from lumen_kernels.paged_attention.mosaic_tpu_kernel import attend as attend_items
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.streams import stream_positions


def attend(
    q: jax.Array,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    options: Options,
    *,
    blocks: Blocks | None = None,
    interpret: Interpret | None = None,
    bounds_checks: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Output, shaped as q [tokens, heads, head_dim], and log-sum-exp [tokens, heads] if wanted.

    The rows' new tokens are in the arena already. blocks: instead of `prefill_blocks`. interpret:
    None: as the target says. bounds_checks: as for decode.
    """
    tokens, query_heads, head_dim = q.shape
    heads = options.kv_heads
    group = query_heads // heads
    if blocks is None:
        blocks = prefill_blocks(
            shape, q.dtype, query_heads, heads, tokens, tables.shape, options.target
        )
    tile = blocks.tile_tokens
    rows = counts.shape[0]
    most = -(-tokens // tile) if rows == 1 else tokens // tile + rows
    most += -most % blocks.item_groups
    row, first, first_tile, begins, in_tile = _tiles(counts, most, tile)
    one_row = rows == 1  # its tiles lie one behind the other: nothing to gather
    if one_row:
        tiled = jnp.pad(q, ((0, most * tile - tokens), (0, 0), (0, 0)))
    else:
        index = (begins[row] + first)[:, None] + jnp.arange(tile, dtype=jnp.int32)
        tiled = q.at[index.reshape(-1)].get(mode="clip")
    tiled = tiled.reshape(most, tile, query_heads, head_dim).transpose(0, 2, 1, 3)
    tiled = tiled.reshape(most, heads, group * tile, head_dim)
    if shape.packed:
        tiled = jnp.pad(tiled, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    firsts = jnp.where(in_tile > 0, starts[row] + first, 0)
    items = Items(row, firsts, firsts + in_tile)
    out, lse, _ = attend_items(
        tiled, None, arena, shape, tables, items, layer_offset, options, blocks,
        operation="prefill", unrolled=False, interpret=interpret,
        bounds_checks=bounds_checks,
    )  # fmt: skip
    out = out.reshape(most, query_heads, tile, head_dim).transpose(0, 2, 1, 3)
    out = out.reshape(most * tile, query_heads, head_dim)
    if lse is not None:
        lse = lse.reshape(most, query_heads, tile).transpose(0, 2, 1)
        lse = lse.reshape(most * tile, query_heads)
    row_of, positions = stream_positions(starts, counts, tokens)
    if one_row:
        out, lse = out[:tokens], None if lse is None else lse[:tokens]
    else:
        source = first_tile[row_of] * tile + positions - starts[row_of]
        out = out.at[source].get(mode="clip")
        lse = None if lse is None else lse.at[source].get(mode="clip")
    valid = (positions >= 0)[:, None]
    out = jnp.where(valid[..., None], out, 0)
    return out, None if lse is None else jnp.where(valid, lse, -jnp.inf)


def _tiles(
    counts: jax.Array, most: int, tile: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The tiles that rows of `counts` tokens are cut into, and `most` less those empty ones.

    Per tile: its row, the first of its tokens in the row, and how many it has; per row: the first
    tile and the first token in the stream. Returned as row, first, first tile, begins, in tile.
    """
    rows = counts.shape[0]
    per_row = (counts + (tile - 1)) // tile
    tile_ends = jnp.cumsum(per_row, dtype=jnp.int32)
    first_tile = tile_ends - per_row
    begins = jnp.cumsum(counts, dtype=jnp.int32) - counts
    index = jnp.arange(most, dtype=jnp.int32)
    row = jnp.searchsorted(tile_ends, index, side="right", method="compare_all").astype(jnp.int32)
    row = jnp.minimum(row, rows - 1)
    first = (index - first_tile[row]) * tile
    in_tile = jnp.clip(counts[row] - first, 0, tile)
    return row, first, first_tile, begins, in_tile
