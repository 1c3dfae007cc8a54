"""The loading warpgroup of the Hopper prefill kernel."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as work
from lumen_kernels.paged_attention.prefill.mosaic_gpu_kernel import (
    CONSUMERS,
    ROWS,
    Plan,
    buffers_of,
    for_each_item,
    rows_of,
)


def load(
    plan: Plan,
    halves: int,
    q: Any,
    tables: Any,
    layer: Any,
    tiles: Any,
    pages: list[Any],
    scratch: tuple[Any, ...],
) -> None:
    """Bring queries, keys and values into shared memory, in the order they are used."""
    buffers, rows, _, (k_ring, v_ring), (k_loaded, v_loaded), (k_freed, v_freed), *others = scratch
    queries = buffers_of(plan, buffers)[0]
    q_loaded, q_freed, _, ragged_loaded = others
    shape, tuning = plan.shape, plan.tuning
    key_tile, stages = tuning.key_tile, tuning.stages
    head_dim, block_size = shape.head_dim, shape.block_size
    layer_offset = layer[0]

    def find(row: Any, tile: Any, context: Any) -> tuple[Any, ...]:
        """Slot bases of a key tile's blocks; of blocks behind the context, its last one."""
        last = lax.div(context - 1, jnp.int32(block_size))
        first = lax.div(tile * key_tile, jnp.int32(block_size))
        blocks = (jnp.minimum(first + page, last) for page in range(plan.pages_per_tile))
        return tuple(tables[row, block] for block in blocks)

    def copy(
        ring: Any,
        turn_slot: Any,
        bases: Any,
        head: Any,
        tile: Any,
        half: int,
        to: Any,
        axis: str | None = plan.load_axis,
    ) -> None:
        """Start the copies of one tile of keys or values; `to` is the barrier they arrive at.

        axis: of the programs that load it together.
        """
        rows = min(key_tile, block_size)
        source_rows = pl.ds(0, block_size)
        if block_size > key_tile:
            per_block = jnp.int32(block_size // key_tile)
            source_rows = pl.ds(lax.rem(tile, per_block) * key_tile, key_tile)
        lanes = pl.ds(half * head_dim if shape.packed else 0, head_dim)
        for page, base in enumerate(bases):
            slot = base + layer_offset + head
            into = ring.at[turn_slot, pl.ds(page * rows, rows)]
            for index, (begin, slots) in enumerate(
                zip(shape.first_slots, shape.slots, strict=True)
            ):
                local = slot - begin
                source = pages[index].at[local if halves == 1 else local * 2 + half]
                start = partial(
                    plgpu.copy_gmem_to_smem,
                    source.at[source_rows, lanes],
                    into,
                    to,
                    collective_axes=axis,
                )
                if len(pages) == 1:
                    start()
                else:
                    pl.when((local >= 0) & (local < slots))(start)

    def load_keys(turn: Any, bases: Any, head: Any, tile: Any) -> None:
        slot = lax.rem(turn, jnp.int32(stages))
        plgpu.barrier_wait(k_freed.at[slot])
        copy(k_ring, slot, bases, head, tile, 0, k_loaded.at[slot])

    def load_values(turn: Any, bases: Any, head: Any, tile: Any, context: Any) -> None:
        slot = lax.rem(turn, jnp.int32(stages))
        plgpu.barrier_wait(v_freed.at[slot])
        valid = context - tile * key_tile

        @pl.when(valid >= key_tile)
        def whole() -> None:
            copy(v_ring, slot, bases, head, tile, 1, v_loaded.at[slot])

        @pl.when(valid < key_tile)
        def part() -> None:
            # What lies behind the context may be NaN, which a weight of zero does not remove.
            # Every program loads it for itself: none may change what another still writes to.
            copy(v_ring, slot, bases, head, tile, 1, ragged_loaded, axis=None)
            plgpu.barrier_wait(ragged_loaded)
            _clear_from(v_ring, slot, key_tile, head_dim, valid)
            plgpu.commit_smem()
            for _ in range(plan.pages_per_tile):
                plgpu.barrier_arrive(v_loaded.at[slot])

    def item(tile: Any, first_head: Any, turn: Any) -> Any:
        row, context = tiles[tile, work.ROW], tiles[tile, work.CONTEXT]
        begin, end = tiles[tile, work.BEGIN], tiles[tile, work.END]
        first = tiles[tile, work.FIRST]
        kv_head = lax.div(first_head, jnp.int32(plan.group))
        bases = find(row, begin, context)
        for consumer in range(CONSUMERS):
            token, head = rows_of(plan, first, first_head, consumer)
            loaded = q_loaded.at[consumer]
            plgpu.barrier_wait(q_freed.at[consumer])
            plgpu.copy_gmem_to_smem(tiles.at[tile], rows.at[consumer], loaded)
            plgpu.copy_gmem_to_smem(q.at[pl.ds(token, ROWS), head], queries.at[consumer], loaded)

        def step(key: Any, carry: Any) -> Any:
            turn, bases, before = carry
            # Read ahead: the tables' latency would not hide behind the copies of small blocks.
            following = find(row, jnp.minimum(key + 1, end - 1), context)
            load_keys(turn, bases, kv_head, key)

            @pl.when(key > begin)
            def values() -> None:
                load_values(turn - 1, before, kv_head, key - 1, context)

            return turn + 1, following, bases

        turn, _, before = lax.fori_loop(begin, end, step, (turn, bases, bases))

        @pl.when(begin < end)
        def last_values() -> None:
            load_values(turn - 1, before, kv_head, end - 1, context)

        return turn

    for_each_item(plan, tiles, item, jnp.int32(0))
    if plan.options.target.interpret or plan.load_axis:
        # The interpreter wants every arrival awaited. The chip does not mind, but no program may
        # end while another of its cluster still signals it.
        for slot in range(stages):
            plgpu.barrier_wait(k_freed.at[slot])
            plgpu.barrier_wait(v_freed.at[slot])
    if plan.options.target.interpret:
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(q_freed.at[consumer])


def _clear_from(ring: Any, slot: Any, key_tile: int, head_dim: int, valid: Any) -> None:
    """Zero the rows of a tile from `valid` on."""
    for row in range(0, key_tile, ROWS):
        for lane in range(0, head_dim, 64):
            part = ring.at[slot, pl.ds(row, ROWS), pl.ds(lane, 64)]
            rows = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=plgpu.Layout.WGMMA)
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(rows + row < valid, values, jnp.zeros_like(values))
