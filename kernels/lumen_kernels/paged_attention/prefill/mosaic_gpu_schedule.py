"""The work list of the prefill kernel: the stream cut into tiles of queries, longest first.

A tile is `tile_tokens` consecutive tokens of the stream of which a run belongs to one row; the
tokens around that run are other rows' and are computed in vain. Tiles begin at multiples of 8
tokens, which is what a TMA copy into swizzled memory can address. What follows the last row is
cut into tiles without keys: the kernel writes zeros there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGN = 8
"""Tokens a tile's first token is a multiple of."""

COLUMNS = 32
"""128 bytes per tile: what a TMA copy may begin at in shared memory."""

USED_COLUMNS = 11
ROW, FIRST, LOW, HIGH, POSITION, CONTEXT, BEGIN, FREE, FREE_END, END, COUNT = range(USED_COLUMNS)
"""Columns of a work list.

ROW: of tables. FIRST: first token / ALIGN. LOW, HIGH: run of the tile's tokens that are the
row's. POSITION: of the tile's first token in its sequence (negative if before LOW). CONTEXT:
tokens of the row in the arena, 0 for padding. BEGIN .. END: key tiles some query of the run sees,
of which every query of the run sees all of FREE .. FREE_END. COUNT: tiles in the whole list, the
same everywhere.
"""


class WorkList(NamedTuple):
    """What the kernel works through, and where each token is found in it.

    tiles: int32 [bound, COLUMNS], longest first, valid up to COUNT. token_tile, token_row: int32
    [tokens], the tile of each token and its place in it.
    """

    tiles: jax.Array
    token_tile: jax.Array
    token_row: jax.Array


def tile_bound(tokens: int, rows: int, tile_tokens: int) -> int:
    """Most tiles that rows of `tokens` tokens in all can be cut into, padding included."""
    parts = min(rows + 1, tokens)
    return (tokens + parts * (tile_tokens + ALIGN - 2)) // tile_tokens


def work_list(
    starts: jax.Array,
    counts: jax.Array,
    tokens: int,
    tile_tokens: int,
    key_tile: int,
    sliding_window: int | None,
) -> WorkList:
    """Cut a stream of `tokens` (a multiple of ALIGN, at least tile_tokens) into tiles.

    starts, counts int32 [rows].
    """
    starts, counts = starts.astype(jnp.int32), counts.astype(jnp.int32)
    bound = tile_bound(tokens, counts.shape[0], tile_tokens)
    padding = tokens - jnp.sum(counts, dtype=jnp.int32)
    counts = jnp.append(counts, padding)
    starts = jnp.append(starts, 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    begins = ends - counts
    bases = begins // ALIGN * ALIGN
    per_row = jnp.where(counts > 0, -((bases - ends) // tile_tokens), 0)
    last_tiles = jnp.cumsum(per_row, dtype=jnp.int32)
    index = jnp.arange(bound, dtype=jnp.int32)
    row = _find(last_tiles, index)
    low = bases[row] + (index - (last_tiles - per_row)[row]) * tile_tokens
    high = jnp.minimum(low + tile_tokens, ends[row])
    # The last tile moves back rather than past the end of the stream.
    first = jnp.minimum(low, tokens - tile_tokens)
    low = jnp.maximum(low, begins[row])
    shift = starts[row] - begins[row]
    nearest, furthest = low + shift, high - 1 + shift
    keys = (row < counts.shape[0] - 1) & (index < last_tiles[-1])
    end = jnp.where(keys, furthest // key_tile + 1, 0)
    free_end = (nearest + 1) // key_tile
    if sliding_window is None:
        begin = free = jnp.zeros_like(end)
    else:
        begin = jnp.maximum(nearest - sliding_window + 1, 0) // key_tile
        free = jnp.maximum(furthest - sliding_window + key_tile, 0) // key_tile
    begin = jnp.minimum(begin, end)
    free = jnp.clip(free, begin, end)
    free_end = jnp.clip(free_end, free, end)
    cost = jnp.where(index < last_tiles[-1], end - begin, -1)
    place = _descending(cost)
    columns = [
        jnp.where(keys, row, 0), first // ALIGN, low - first, high - first, first + shift,
        jnp.where(keys, (starts + counts)[row], 0), begin, free, free_end, end,
        jnp.broadcast_to(last_tiles[-1], end.shape),
    ]  # fmt: skip
    tiles = jnp.stack(columns, axis=1)
    tiles = jnp.pad(tiles, ((0, 0), (0, COLUMNS - USED_COLUMNS)))
    tiles = (
        jnp.zeros_like(tiles).at[place].set(tiles, unique_indices=True, mode="promise_in_bounds")
    )
    token = jnp.arange(tokens, dtype=jnp.int32)
    token_row = _find(ends, token)
    tile = (last_tiles - per_row)[token_row] + (token - bases[token_row]) // tile_tokens
    return WorkList(tiles, place[tile], token - first[tile])


def _find(ends: jax.Array, index: jax.Array) -> jax.Array:
    """Which of the runs that end before `ends` an index lies in; the last, if behind all."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
    return jnp.minimum(found, ends.shape[0] - 1)


def _descending(cost: jax.Array) -> jax.Array:
    """Place of each in descending order: by counting, one small kernel where a sort is several."""
    index = jnp.arange(cost.shape[0], dtype=jnp.int32)
    before = (cost > cost[:, None]) | ((cost == cost[:, None]) & (index < index[:, None]))
    return jnp.sum(before, axis=1, dtype=jnp.int32)
