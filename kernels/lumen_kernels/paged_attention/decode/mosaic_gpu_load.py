"""The loading warpgroups of the Hopper decode kernel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.decode.mosaic_gpu_kernel import (
    PART,
    Item,
    Kernel,
    Refs,
    for_each_item,
)
from lumen_kernels.paged_attention.decode.mosaic_gpu_schedule import TILE

_I32 = jnp.int32


def load(kernel: Kernel, r: Refs, worker: jax.Array, local: jax.Array) -> None:
    """The loading warpgroup of a worker."""
    stages, block = kernel.stages, kernel.arena.block_size
    packed, copies = kernel.arena.packed, kernel.pages
    base = local * _I32(stages)
    offset = r.layer_offset[0]

    def fetch_joined(page: Any, slot: jax.Array, seen: jax.Array) -> None:
        """K and V of one slot of the arena, of which the first `seen` positions matter."""
        tile, ready = r.tiles.at[slot], r.k_ready.at[slot]

        @pl.when(seen > TILE - PART)
        def _() -> None:
            plgpu.copy_gmem_to_smem(page, tile, ready)
            plgpu.barrier_arrive(ready)

        # A sequence's last block is half full on average; what is behind its end is left out.
        for rows in range(PART, TILE, PART):

            @pl.when((seen > rows - PART) & (seen <= rows))
            def _(rows: int = rows) -> None:
                for first in (0, TILE):
                    part = pl.ds(first, rows)
                    plgpu.copy_gmem_to_smem(page.at[part], tile.at[part], ready)

    def fetch(
        slot: jax.Array, place: int, source: jax.Array, at: Any, rows: int, seen: jax.Array
    ) -> None:
        """K and V of `rows` positions of one slot of the arena, from `at` on."""
        for index, (first, count) in enumerate(
            zip(kernel.arena.first_slots, kernel.arena.slots, strict=True)
        ):
            inside = (source >= first) & (source < first + count)

            def copy(index: int = index, first: int = first) -> None:
                page = source - first
                here = pl.ds(place, rows)
                if kernel.joined:
                    fetch_joined(r.pages[index].at[page], slot, seen)
                    return
                if packed:
                    plgpu.copy_gmem_to_smem(
                        r.pages[index].at[page, at], r.tiles.at[slot, here], r.k_ready.at[slot]
                    )
                    return
                there = pl.ds(TILE + place, rows)
                plgpu.copy_gmem_to_smem(
                    r.pages[index].at[2 * page, at], r.tiles.at[slot, here], r.k_ready.at[slot]
                )
                plgpu.copy_gmem_to_smem(
                    r.pages[index].at[2 * page + 1, at],
                    r.tiles.at[slot, there],
                    r.v_ready.at[slot],
                )

            if len(r.pages) == 1:
                copy()
            else:
                pl.when(inside)(copy)

    def turn(item: Item, t: jax.Array) -> Any:
        row, head, length = item.row, item.head, item.length
        buffers = kernel.query_buffers
        buffer = local * _I32(buffers) + lax.rem(item.number, _I32(buffers))

        @pl.when(item.number >= buffers)
        def _() -> None:
            plgpu.barrier_wait(r.q_free.at[buffer])

        index = row * _I32(kernel.cut.kv_heads) + head
        start = lax.div(index * _I32(kernel.queries), _I32(8)) * _I32(8)
        plgpu.copy_gmem_to_smem(
            r.q.at[pl.ds(start, kernel.loaded)],
            r.q_smem.at[pl.ds(buffer * _I32(kernel.loaded), kernel.loaded)],
            r.q_ready.at[buffer],
        )
        # Blocks that hold nothing the row sees may have been given to others: their entries in
        # the table, and any beyond its end, are not looked at.
        seen = plan.first_position(length, kernel.cut.tokens, kernel.cut.window)
        first_block = lax.div(seen, _I32(block))
        last_block = lax.div(length - 1, _I32(block))

        def tile(j: jax.Array, t: jax.Array) -> jax.Array:
            slot = base + lax.rem(t, _I32(stages))
            # All table entries are on their way before anything waits.
            if block > TILE:
                per_block = block // TILE
                entries = [r.tables[row, lax.div(j, _I32(per_block))]]
                at = pl.ds(lax.rem(j, _I32(per_block)) * _I32(TILE), TILE)
            else:
                columns = [
                    jnp.clip(j * _I32(copies) + copy, first_block, last_block)
                    for copy in range(copies)
                ]
                entries = [r.tables[row, column] for column in columns]
                at = pl.ds(0, block)

            @pl.when(t >= stages)
            def _() -> None:
                plgpu.barrier_wait(r.free.at[slot])

            for copy, entry in enumerate(entries):
                rows = min(block, TILE)
                seen_here = length - j * _I32(TILE)
                fetch(slot, copy * rows, entry + offset + head, at, rows, seen_here)
            return t + 1

        return lax.fori_loop(item.low, item.high, tile, t)

    items, t = for_each_item(kernel, r.schedule, worker, turn, _I32(0))
    _clear_padding(kernel, r, worker)
    if kernel.interpret:
        _drain(kernel, r, local, items, t)


def _clear_padding(kernel: Kernel, r: Refs, worker: jax.Array) -> None:
    """Rows without tokens are in no run; their output is zero."""
    rows, workers = kernel.cut.rows, kernel.cut.workers
    shape = (kernel.queries, kernel.head_dim)
    width = math.gcd(math.prod(shape) // 128, 8)
    zeros = jnp.zeros(shape, jnp.bfloat16)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED(shape, vec_size=width))

    def row_step(index: jax.Array, carry: None) -> None:
        row = worker + index * _I32(workers)

        @pl.when(r.lengths[row] <= 0)
        def _() -> None:
            def head_step(head: jax.Array, carry: None) -> None:
                item = row * _I32(kernel.cut.kv_heads) + head
                r.out.at[pl.ds(item * _I32(kernel.queries), kernel.queries)][...] = zeros

            lax.fori_loop(_I32(0), _I32(kernel.cut.kv_heads), head_step, None)

    mine = lax.div(_I32(rows + workers - 1) - worker, _I32(workers))
    lax.fori_loop(_I32(0), jnp.maximum(mine, 0), row_step, None)


def _drain(kernel: Kernel, r: Refs, local: jax.Array, items: jax.Array, turns: jax.Array) -> None:
    """The interpreter wants every arrival awaited."""
    stages, buffers = kernel.stages, kernel.query_buffers

    def free_slot(t: jax.Array, carry: None) -> None:
        plgpu.barrier_wait(r.free.at[local * _I32(stages) + lax.rem(t, _I32(stages))])

    def free_queries(t: jax.Array, carry: None) -> None:
        plgpu.barrier_wait(r.q_free.at[local * _I32(buffers) + lax.rem(t, _I32(buffers))])

    lax.fori_loop(jnp.maximum(turns - stages, 0), turns, free_slot, None)
    lax.fori_loop(jnp.maximum(items - buffers, 0), items, free_queries, None)
