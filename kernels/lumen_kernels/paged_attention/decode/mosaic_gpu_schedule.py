"""How the work of one decode step is cut over the chip: made once per step, shared by all layers.

Work is counted in tiles of `TILE` context positions of one (row, KV head) pair, an *item*. KV
heads are dealt to `lanes`. A lane's items lie in one line of tiles, row by row, and its workers
take contiguous runs of it; all lanes are cut alike, so that the workers which read the heads of a
block, neighbours in memory, do it at the same time. A run may begin and end inside an item; such
an item is *cut*: its pieces leave partial results, and the worker that began it merges them.

Cuts cost time (partial results, a merge at the end), uneven runs cost time too. `schedule` weighs
a few ways to place the bounds, from whole items only to single tiles, and takes the cheapest:
equal lengths end up as whole items or equal parts, ragged ones as equal runs ("stream-K", Osama et
al. 2023, arXiv 2301.03598).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lumen_kernels.target import Target

TILE = 64
"""Context positions of a tile: what one pass of the softmax sees."""

COLUMNS = 16
"""Width of a schedule. The first rows are one per worker, the others one per row of the batch."""

# Entries of workers: the first item (row, head, length, tiles per chunk), the run's first tile in
# it and its number of tiles; the first part it leaves; the item it merges: its first part, their
# number, and row * kv_heads + head.
ROW, HEAD, LENGTH, CHUNK, FIRST, TILES, PART, MERGE_PART, MERGE_PARTS, MERGE_ITEM = range(10)
LEADER = 10  # who merges the item that the run begins inside of
COUNTER = 11  # parts that a leader can merge; zero between kernels

# Entries of rows: the next row with tokens, its length and tiles per chunk.
NEXT_ROW, NEXT_LENGTH, NEXT_CHUNK = range(3)

_GRAINS = (64, 32, 16, 8, 4, 2, 1)  # candidate distances between cuts inside an item, in tiles
_CHUNKS = 16  # an item has that many chunks, up to one less than twice as many

# What cutting costs: judged from the timings of prototypes, not fitted. A merge is taken for about
# 2 us and 1 us for every 6 parts, where a tile takes 1 to 2 us.
_CUT_SHARE = 0.03
_CUT_TILES = 2.0
_PARTS_PER_TILE = 6


@dataclass(frozen=True, slots=True)
class Cut:
    """What a schedule depends on besides the lengths.

    rows, kv_heads: items are their product. tokens: query tokens per row. window: sliding window
    or None. workers: of the chip. by_position: cut items at the bounds of chunks only, each chunk
    leaving its own partial result, so that sums are made in an order that depends on the
    sequence's length alone.
    """

    rows: int
    kv_heads: int
    tokens: int
    window: int | None
    workers: int
    by_position: bool

    @property
    def lanes(self) -> int:
        """Heads that are worked on side by side: what keeps most workers busy, then the most."""
        divisors = [
            n for n in range(1, min(self.workers, 16, self.kv_heads) + 1) if self.kv_heads % n == 0
        ]
        return max(divisors, key=lambda lanes: (self.workers // lanes * lanes, lanes))

    @property
    def workers_per_lane(self) -> int:
        """A few workers may be left without work."""
        return self.workers // self.lanes

    @property
    def parts_per_lane(self) -> int:
        """Upper bound of the partial results of one lane: one or two per worker, or a part for
        each chunk of the item that a run begins inside of."""
        return self.workers_per_lane * (2 * _CHUNKS if self.by_position else 2)

    @property
    def parts(self) -> int:
        """Upper bound of the partial results of one call."""
        return self.lanes * self.parts_per_lane


def workers(head_dim: int, target: Target) -> int:
    """Workers of a chip: two per core, one where rows of 512 bytes leave room for one only."""
    return target.cores * workers_per_core(head_dim)


def workers_per_core(head_dim: int) -> int:
    """Workers that share a core and hide each other's softmax."""
    return 2 if head_dim <= 128 else 1


def first_position(length: jax.Array, tokens: int, window: int | None) -> jax.Array:
    """The first context position any query of a row sees."""
    if window is None:
        return jnp.zeros_like(length)
    return jnp.maximum(length - (tokens + window - 1), 0)


def schedule(lengths: jax.Array, cut: Cut) -> jax.Array:
    """The schedule of a step: int32 [workers + rows, COLUMNS].

    lengths int32 [rows]. Sums and searches are products of masks, since a chain of small scans
    and sorts costs more to launch than all the arithmetic here.
    """
    rows, count, lanes = cut.rows, cut.workers_per_lane, cut.lanes
    deep = cut.kv_heads // lanes  # heads per lane
    lengths = jnp.maximum(lengths.astype(jnp.int32), 0)
    begin = first_position(lengths, cut.tokens, cut.window) // TILE
    end = (lengths + TILE - 1) // TILE
    tiles = end - jnp.minimum(begin, end)
    chunk = _chunk_tiles(end) if cut.by_position else jnp.ones_like(end)

    index = jnp.arange(rows, dtype=jnp.int32)
    upto = index[None, :] <= index[:, None]
    ends = jnp.sum(jnp.where(upto, tiles[None, :] * deep, 0), axis=1)
    later = (index[None, :] > index[:, None]) & (tiles[None, :] > 0)
    follower = jnp.min(jnp.where(later, index[None, :], rows - 1), axis=1)
    total = jnp.sum(tiles) * deep
    longest = jnp.maximum(jnp.max(tiles), 1)

    # Candidates: run lengths that are multiples of a grain. The grain of the first is the longest
    # item, so that it cuts none.
    grains = jnp.stack([longest, *(jnp.full_like(longest, grain) for grain in _GRAINS)])
    quotas = ((total + count - 1) // count + grains - 1) // grains * grains
    step = jnp.arange(count + 1, dtype=jnp.int32)
    # The quotient keeps the product inside int32.
    beyond = step[None, :] > total // jnp.maximum(quotas, 1)[:, None]
    bounds = jnp.where(beyond, total, step[None, :] * quotas[:, None])

    # Where each bound lies: the row, the head in the lane, the tile in the item.
    row = jnp.sum(ends[None, None, :] <= bounds[:, :, None], axis=2, dtype=jnp.int32)
    row = jnp.minimum(row, rows - 1)
    inside = bounds - (ends[row] - tiles[row] * deep)
    per_item = jnp.maximum(tiles[row], 1)
    head, tile = inside // per_item, inside % per_item
    # Move it on to where its candidate may cut, or to the next item.
    size = jnp.maximum(grains[:, None], chunk[row])
    on = jnp.minimum((begin[row] + tile + size - 1) // size * size - begin[row], tiles[row])
    on = jnp.where((tile == 0) | (bounds >= total), tile, on)
    bounds = bounds + on - tile
    done = (on == tiles[row]) & (on > 0)
    last = done & (head == deep - 1)
    tile, head = jnp.where(done, 0, on), jnp.where(last, 0, head + done)
    row = jnp.where(last, follower[row], row)
    cuts = (tile > 0) & (bounds < total)

    loads = bounds[:, 1:] - bounds[:, :-1]
    pieces = (longest + quotas - 1) // jnp.maximum(quotas, 1)
    merge = _CUT_TILES + (pieces + _PARTS_PER_TILE - 1) // _PARTS_PER_TILE
    busiest, any_cut = jnp.max(loads, axis=1), jnp.any(cuts, axis=1)
    cost = jnp.where(any_cut, busiest * (1 + _CUT_SHARE) + merge, busiest)
    best = jnp.argmin(cost)
    bounds, row, head, tile = bounds[best], row[best], head[best], tile[best]
    return _entries(cut, bounds, row, head, tile, lengths, begin, tiles, chunk, follower)


def _chunk_tiles(end_tile: jax.Array) -> jax.Array:
    """Tiles per chunk of a sequence that ends in tile end_tile - 1: a power of two."""
    size = jnp.ones_like(end_tile)
    for power in range(1, 20):
        size = jnp.where(end_tile >= (_CHUNKS << power), 1 << power, size)
    return size


def _entries(
    cut: Cut,
    bounds: jax.Array,
    row: jax.Array,
    head: jax.Array,
    tile: jax.Array,
    lengths: jax.Array,
    begin: jax.Array,
    tiles: jax.Array,
    chunk: jax.Array,
    follower: jax.Array,
) -> jax.Array:
    """The schedule, from the bounds [workers per lane + 1] of runs, where they lie, and rows."""
    count, lanes = cut.workers_per_lane, cut.lanes
    total = bounds[-1]
    loads = bounds[1:] - bounds[:-1]
    here, there = slice(None, -1), slice(1, None)
    item_start = bounds - tile  # of the item each bound lies in
    # An item that a worker begins and does not end is merged by it.
    unfinished = (loads > 0) & (bounds[there] < total) & (tile[there] > 0)
    begun = unfinished & (item_start[there] >= bounds[here])
    continues = (tile[here] > 0) & (loads > 0)
    if cut.by_position:

        def chunks(row: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
            size = chunk[row]
            return (begin[row] + high + size - 1) // size - (begin[row] + low) // size

        until = jnp.minimum(tile[here] + loads, tiles[row[here]])
        continued = jnp.where(continues, chunks(row[here], tile[here], until), 0)
        rest = chunks(row[there], tile[there], tiles[row[there]])
    else:
        continued = continues.astype(jnp.int32)
        item_end = item_start[there] + tiles[row[there]]
        within = (bounds[None, here] > item_start[there][:, None]) & (
            bounds[None, here] < item_end[:, None]
        )
        rest = jnp.sum(within, axis=1, dtype=jnp.int32)
    step = jnp.arange(count, dtype=jnp.int32)
    left = continued + begun
    left_before = jnp.sum(jnp.where(step[None, :] < step[:, None], left[None, :], 0), axis=1)
    leader = jnp.sum(bounds[None, here] <= item_start[here][:, None], axis=1, dtype=jnp.int32) - 1

    # The same for all lanes, neighbouring workers in neighbouring lanes.
    lane = jnp.arange(lanes, dtype=jnp.int32)[None, :]
    first_part = lane * cut.parts_per_lane
    entry = [jnp.zeros((count, 1), jnp.int32)] * COLUMNS
    row_here, row_there = row[here], row[there]
    entry[ROW], entry[LENGTH] = row_here[:, None], lengths[row_here][:, None]
    entry[HEAD] = head[here][:, None] * lanes + lane
    entry[CHUNK] = chunk[row_here][:, None]
    entry[FIRST] = (begin[row_here] + tile[here])[:, None]
    entry[TILES] = loads[:, None]
    entry[PART] = left_before[:, None] + first_part
    entry[MERGE_PART] = (left_before + left - 1)[:, None] + first_part
    entry[MERGE_PARTS] = jnp.where(begun, rest + 1, 0)[:, None]
    entry[MERGE_ITEM] = (row_there * cut.kv_heads + head[there] * lanes)[:, None] + lane
    entry[LEADER] = leader[:, None] * lanes + lane
    shape = (count, lanes)
    workers = jnp.stack([jnp.broadcast_to(x, shape) for x in entry], axis=2)
    workers = workers.reshape(count * lanes, COLUMNS)
    idle = jnp.zeros((cut.workers - count * lanes, COLUMNS), jnp.int32)
    rows = [follower, lengths[follower], chunk[follower]]
    rows += [jnp.zeros_like(follower)] * (COLUMNS - len(rows))
    return jnp.concatenate([workers, idle, jnp.stack(rows, axis=1)])
