"""The static side of the Hopper decode kernel, and what its warpgroups share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.hopper import swizzled
from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.decode.mosaic_gpu_schedule import TILE, Cut

NOTHING = -1e30
"""A score below any other; finite, so that differences are never NaN."""

LOG2E = math.log2(math.e)

PART = 16
"""Positions: of a block that is a tile, only so many at a time are loaded where a sequence ends."""

_RING_BYTES = 192 * 1024  # of the 227 KB of a core: three tiles of K and V of 128 per worker
_I32 = jnp.int32


@dataclass(frozen=True, slots=True)
class Kernel:
    """All that is static about one call.

    group: query heads per KV head. queries: rows per item in q and out; `loaded`: the same,
    rounded up to 8, what TMA can address in a swizzled tile.
    """

    cut: Cut
    arena: ArenaShape
    group: int
    queries: int
    scale: float
    soft_cap: float | None
    with_lse: bool
    cores: int
    interpret: bool

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.arena.head_dim

    @property
    def workers(self) -> int:
        """Per core."""
        return plan.workers_per_core(self.head_dim)

    @property
    def stages(self) -> int:
        """Tiles in the ring of one worker."""
        return _RING_BYTES // (self.workers * TILE * self.head_dim * 4)

    @property
    def loaded(self) -> int:
        """Rows of q that are loaded per item."""
        return (self.queries + 7) // 8 * 8

    @property
    def query_buffers(self) -> int:
        """Per worker: the next item's queries are loaded ahead where they leave room for it."""
        return 2 if self.loaded <= 16 and self.head_dim <= 128 else 1

    @property
    def query_rows(self) -> int:
        """Rows of the query buffers; they overlap, since only the first rows of each matter."""
        return (self.workers * self.query_buffers - 1) * self.loaded + 64

    @property
    def pages(self) -> int:
        """Copies per tile of K."""
        return max(TILE // self.arena.block_size, 1)

    @property
    def joined(self) -> bool:
        """Whether a slot is a tile: one copy for K and V, or two of what is needed of it."""
        return self.arena.block_size == TILE and not self.arena.packed

    @property
    def merges(self) -> bool:
        """Whether workers merge parts themselves; the interpreter does it in another kernel."""
        return not self.interpret

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread of computing and of loading warpgroups; 65,536 are shared by all.

        Leaving this to the compiler costs half of the speed. Folding chunks needs a second set
        of sums.
        """
        if self.workers == 1:
            return 240, 40
        return (224, 32) if self.cut.by_position else (216, 40)

    @property
    def exponent(self) -> float:
        """What scores, as the kernel keeps them, are multiplied with to be powers of two."""
        return LOG2E if self.soft_cap is not None else self.scale * LOG2E


def scratch_types(kernel: Kernel, dtype: Any) -> dict[str, Any]:
    """Shared memory and barriers of one core."""
    # Their protocol leaves a method without a body, which mypy takes for an abstract one.
    operand = swizzled(64, 2)
    slots = kernel.workers * kernel.stages
    if kernel.arena.packed:
        tiles = plgpu.SMEM((slots, TILE, 2 * kernel.head_dim), dtype, transforms=operand)
    else:
        tiles = plgpu.SMEM((slots, 2 * TILE, kernel.head_dim), dtype, transforms=operand)
    # Results leave through the ring slot of their last tile, seen as untiled rows.
    results = plgpu.SMEM((slots, 2 * TILE, kernel.head_dim), dtype)
    partials = plgpu.SMEM((slots, TILE, kernel.head_dim), jnp.float32)
    queries = kernel.workers * kernel.query_buffers
    # A joined tile comes in one copy and an arrival without one, or in two.
    copies = 2 if kernel.joined else kernel.pages
    scratch = {
        "ring": plgpu.RefUnion(tiles, results, partials),
        "q_smem": plgpu.SMEM((kernel.query_rows, kernel.head_dim), dtype, transforms=operand),
        "k_ready": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
        "free": plgpu.Barrier(num_barriers=slots),
        "q_ready": plgpu.Barrier(num_barriers=queries),
        "q_free": plgpu.Barrier(num_barriers=queries),
    }
    if not kernel.arena.packed and not kernel.joined:
        scratch["v_ready"] = plgpu.Barrier(num_arrivals=copies, num_barriers=slots)
    return scratch


@dataclass(frozen=True, slots=True)
class Refs:
    """Everything the warpgroups of a core share."""

    q: Any
    pages: tuple[Any, ...]
    tables: Any
    lengths: Any
    layer_offset: Any
    schedule: Any
    out: Any
    part: Any
    stats: Any
    lse: Any
    tiles: Any
    results: Any
    partials: Any
    q_smem: Any
    k_ready: Any
    v_ready: Any
    free: Any
    q_ready: Any
    q_free: Any


class Item(NamedTuple):
    """One (row, KV head) pair, or the piece of it that a run holds, as scalars.

    number: in the run, from 0. chunk: tiles per chunk. low, high: the piece's tiles; begin, end:
    the item's.
    """

    number: jax.Array
    row: jax.Array
    head: jax.Array
    length: jax.Array
    chunk: jax.Array
    low: jax.Array
    high: jax.Array
    begin: jax.Array
    end: jax.Array


def for_each_item(
    kernel: Kernel,
    schedule: Any,
    worker: jax.Array,
    turn: Callable[[Item, Any], Any],
    first: Any,
) -> tuple[jax.Array, Any]:
    """Walk over the items of a worker's run: state = turn(item, state), from state `first`.

    Returns their number and the last state.
    """
    cut = kernel.cut

    def begin_of(length: jax.Array) -> jax.Array:
        return plan.first_position(length, cut.tokens, cut.window) // TILE

    def step(carry: Any) -> Any:
        number, left, row, head, length, chunk, tile, state = carry
        end = lax.div(length + _I32(TILE - 1), _I32(TILE))
        high = jnp.minimum(end, tile + left)
        # The next row's facts are asked for before they are needed.
        entry = cut.workers + row
        facts = [schedule[entry, c] for c in (plan.NEXT_ROW, plan.NEXT_LENGTH, plan.NEXT_CHUNK)]
        item = Item(number, row, head, length, chunk, tile, high, begin_of(length), end)
        state = turn(item, state)
        wraps = head + cut.lanes >= cut.kv_heads
        head = jnp.where(wraps, lax.rem(head, _I32(cut.lanes)), head + cut.lanes)
        row, length, chunk = (
            jnp.where(wraps, new, old) for new, old in zip(facts, (row, length, chunk), strict=True)
        )
        left = left - (high - tile)
        return number + 1, left, row, head, length, chunk, begin_of(length), state

    facts = (plan.TILES, plan.ROW, plan.HEAD, plan.LENGTH, plan.CHUNK, plan.FIRST)
    carry = (_I32(0), *(schedule[worker, fact] for fact in facts), first)
    number, *_, state = lax.while_loop(lambda carry: carry[1] > 0, step, carry)
    return number, state
