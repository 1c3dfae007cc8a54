"""Prefill attention on Hopper: two warpgroups of queries over one stream of keys and values.

A persistent grid, one program per multiprocessor. An item is a tile of 64 tokens and two query
heads of one KV head, or, if the heads of a KV head are odd in number, of 128 tokens and one head;
each of two consumer warpgroups holds 64 rows of it. A producer warpgroup brings K and V pages
through rings in shared memory. A consumer issues the scores of tile j + 1 and the sum over tile
j's values together, and the two consumers take turns in that, so that one exponentiates while the
tensor cores work for the other. Keys are folded in tiles at fixed positions, in ascending order,
so that a token's result does not depend on how its prompt was cut into chunks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as work
from lumen_kernels.target import Backend

ROWS = 64
"""Query rows of a warpgroup: the M of one WGMMA."""

_CONSUMERS = 2
_LOG2E = math.log2(math.e)

_Carry = tuple[Any, Any, Any, Any]  # highest score, sum of weights, last weights, weighted values
_Fold = Callable[[Any, Any, Any], tuple[Any, Any, Any, Any]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Static choices of the kernel.

    key_tile: keys folded at once. stages: tiles of K, and of V, in flight. turns: consumers issue
    products in turns. overlap: exponentiate while the sum over the tile before is still running.
    shared: the output leaves through the queries' buffer, to save memory.

    TFLOP/s on one H200 (2026-11-25, 32/8 heads of 128, blocks of 64, XLA's best product 758), for
    16,384 tokens and for 2,048 behind 14,336: turns alone 594 and 560; neither turns nor overlap
    592 and 540. With three stages and `shared`, 16,384 tokens: neither 598, overlap 551, both 558.
    """

    key_tile: int = 128
    stages: int = 2
    turns: bool = True
    overlap: bool = False
    shared: bool = False
    producer_registers: int = 40
    consumer_registers: int = 232

    def __post_init__(self) -> None:
        # What three warpgroups start with: 168 each. Asking for more waits forever.
        assert self.producer_registers + _CONSUMERS * self.consumer_registers <= 504


TUNINGS = {
    64: Tuning(stages=4),
    128: Tuning(),
    256: Tuning(key_tile=64, shared=True),
}
"""By head_dim."""


def supports(q: jax.Array, shape: ArenaShape, options: Options) -> bool:
    """Whether the kernel covers this call; plain XLA does the rest."""
    return (
        options.target.backend is Backend.MOSAIC_GPU
        and q.dtype == jnp.bfloat16
        and shape.head_dim in TUNINGS
        and shape.packed == (shape.head_dim == 64)
        and shape.block_size in (16, 32, 64, 128)
    )


def attend(
    q: jax.Array,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    options: Options,
    tuning: Tuning | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Output, shaped as q [tokens, heads, head_dim], and log-sum-exp [tokens, heads] or None.

    Arguments are checked and `supports` holds. K and V of all tokens are in the arena.
    """
    tokens, heads, head_dim = q.shape
    tuning = tuning or TUNINGS[head_dim]
    plan = _Plan.of(heads, shape, options, tuning)
    padded = max(-(-tokens // work.ALIGN) * work.ALIGN, plan.tile_tokens)
    if padded != tokens:
        q = jnp.pad(q, ((0, padded - tokens), (0, 0), (0, 0)))
    listed = work.work_list(
        starts, counts, padded, plan.tile_tokens, tuning.key_tile, options.sliding_window
    )
    halves = 1 if shape.packed else 2
    lanes = head_dim * 2 if shape.packed else head_dim
    pages = [segment.reshape(-1, shape.block_size, lanes) for segment in arena]
    out_type = [jax.ShapeDtypeStruct((padded, heads, head_dim), q.dtype)]
    if options.with_lse:
        tile_lse = (listed.tiles.shape[0], heads, plan.tile_tokens)
        out_type.append(jax.ShapeDtypeStruct(tile_lse, jnp.float32))
    target = options.target
    results = plgpu.kernel(
        lambda *refs: _body(plan, halves, refs),
        out_type=out_type,
        scratch_types=plan.scratch(),
        grid=(target.cores,),
        grid_names=("core",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
    )(q, tables, layer_offset.reshape(1).astype(jnp.int32), listed.tiles, *pages)
    out = results[0][:tokens]
    if not options.with_lse:
        return out, None
    tile, row = listed.token_tile[:tokens], listed.token_row[:tokens]
    return out, results[1][tile, :, row]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is static in a call.

    tile_tokens, tile_heads: of an item. units: items of a tile over all heads.
    """

    shape: ArenaShape
    options: Options
    tuning: Tuning
    heads: int
    tile_tokens: int
    tile_heads: int

    @staticmethod
    def of(heads: int, shape: ArenaShape, options: Options, tuning: Tuning) -> "_Plan":
        group = heads // options.kv_heads
        tile_heads = 1 if group % _CONSUMERS else _CONSUMERS
        return _Plan(shape, options, tuning, heads, ROWS * _CONSUMERS // tile_heads, tile_heads)

    @property
    def group(self) -> int:
        return self.heads // self.options.kv_heads

    @property
    def units(self) -> int:
        return self.heads // self.tile_heads

    @property
    def pages_per_tile(self) -> int:
        return max(self.tuning.key_tile // self.shape.block_size, 1)

    def scratch(self) -> list[Any]:
        head_dim, tuning = self.shape.head_dim, self.tuning
        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

        def tiles(count: int, rows: int) -> Any:
            return plgpu.SMEM((count, rows, head_dim), jnp.bfloat16, transforms=tiled)

        queries = tiles(_CONSUMERS, ROWS)
        staging = plgpu.SMEM((_CONSUMERS, ROWS, head_dim), jnp.bfloat16)
        ring = tiles(tuning.stages, tuning.key_tile)
        loaded = plgpu.Barrier(num_arrivals=self.pages_per_tile, num_barriers=tuning.stages)
        freed = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=tuning.stages)
        buffers = [plgpu.RefUnion(queries, staging)] if tuning.shared else [queries, staging]
        lse = [plgpu.SMEM((_CONSUMERS, ROWS), jnp.float32)] if self.options.with_lse else []
        return [
            buffers,
            plgpu.SMEM((_CONSUMERS, work.COLUMNS), jnp.int32),  # the item's row of the work list
            lse,
            [ring, ring],
            [loaded, loaded],
            [freed, freed],
            plgpu.Barrier(num_arrivals=2, num_barriers=_CONSUMERS),  # queries and row loaded
            plgpu.Barrier(num_barriers=_CONSUMERS),  # their buffers free
            plgpu.Barrier(num_barriers=_CONSUMERS),  # turn to issue products
            plgpu.Barrier(num_arrivals=self.pages_per_tile),  # values of a ragged tile loaded
        ]


def _body(plan: _Plan, halves: int, refs: tuple[Any, ...]) -> None:
    scratch = refs[-10:]
    segments = len(plan.shape.slots)
    q, tables, layer, tiles, *rest = refs[:-10]
    pages, outputs = rest[:segments], rest[segments:]
    warpgroup = lax.axis_index("warpgroup")
    tuning = plan.tuning

    @pl.when(warpgroup < _CONSUMERS)
    def consume() -> None:
        plgpu.set_max_registers(tuning.consumer_registers, action="increase")
        _consume(plan, warpgroup, tiles, outputs, scratch)

    @pl.when(warpgroup == _CONSUMERS)
    def produce() -> None:
        plgpu.set_max_registers(tuning.producer_registers, action="decrease")
        _produce(plan, halves, q, tables, layer, tiles, pages, scratch)


def _for_each_item(
    plan: _Plan, tiles: Any, body: Callable[[jax.Array, jax.Array, Any], Any], carry: Any
) -> Any:
    """Call body(tile, first query head, carry) for this program's items; returns the carry.

    Items lie in order of cost. Programs take them there and back, so that whoever got the longest
    of one round gets the shortest of the next.
    """
    programs = plan.options.target.cores
    program = lax.axis_index("core").astype(jnp.int32)
    units = jnp.int32(plan.units)
    total = tiles[0, work.COUNT] * units

    def place(turn: jax.Array) -> jax.Array:
        return jnp.where(turn % 2 == 0, program, programs - 1 - program)

    whole = lax.div(total, jnp.int32(programs))
    turns = whole + (place(whole) < lax.rem(total, jnp.int32(programs))).astype(jnp.int32)

    def step(turn: jax.Array, carry: Any) -> Any:
        item = turn * programs + place(turn)
        return body(lax.div(item, units), lax.rem(item, units) * plan.tile_heads, carry)

    return lax.fori_loop(jnp.int32(0), turns, step, carry)


def _produce(
    plan: _Plan,
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
    queries = _buffers(plan, buffers)[0]
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
        ring: Any, turn_slot: Any, bases: Any, head: Any, tile: Any, half: int, to: Any
    ) -> None:
        """Start the copies of one tile of keys or values; `to` is the barrier they arrive at."""
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
                start = partial(plgpu.copy_gmem_to_smem, source.at[source_rows, lanes], into, to)
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
            copy(v_ring, slot, bases, head, tile, 1, ragged_loaded)
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
        for consumer in range(_CONSUMERS):
            token, head = _rows_of(plan, first, first_head, consumer)
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

    _for_each_item(plan, tiles, item, jnp.int32(0))
    if plan.options.target.interpret:  # it wants every arrival awaited
        for slot in range(stages):
            plgpu.barrier_wait(k_freed.at[slot])
            plgpu.barrier_wait(v_freed.at[slot])
        for consumer in range(_CONSUMERS):
            plgpu.barrier_wait(q_freed.at[consumer])


def _buffers(plan: _Plan, buffers: Any) -> tuple[Any, Any]:
    """The queries' buffer and that of the output, which may be the same memory."""
    queries, staging = buffers[0] if plan.tuning.shared else buffers
    return queries, staging


def _rows_of(plan: _Plan, first: Any, first_head: Any, consumer: Any) -> tuple[Any, Any]:
    """First token (a multiple of ALIGN) and query head of a consumer's rows."""
    if plan.tile_heads == 1:
        return (first + consumer * (ROWS // work.ALIGN)) * work.ALIGN, first_head
    return first * work.ALIGN, first_head + consumer


def _clear_from(ring: Any, slot: Any, key_tile: int, head_dim: int, valid: Any) -> None:
    """Zero the rows of a tile from `valid` on."""
    for row in range(0, key_tile, ROWS):
        for lane in range(0, head_dim, 64):
            part = ring.at[slot, pl.ds(row, ROWS), pl.ds(lane, 64)]
            rows = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=plgpu.Layout.WGMMA)
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(rows + row < valid, values, jnp.zeros_like(values))


def _consume(
    plan: _Plan, consumer: Any, tiles: Any, outputs: list[Any], scratch: tuple[Any, ...]
) -> None:
    """Attend with 64 query rows to one item's keys after the other."""
    buffers, rows, lses, (k_ring, v_ring), (k_loaded, v_loaded), (k_freed, v_freed), *rest = scratch
    queries, staging = (buffer.at[consumer] for buffer in _buffers(plan, buffers))
    q_loaded, q_freed, turns, _ = rest
    tuning, options, head_dim = plan.tuning, plan.options, plan.shape.head_dim
    key_tile, interpret = tuning.key_tile, options.target.interpret

    def slot_of(turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(tuning.stages))

    def wait_turn() -> None:
        if tuning.turns:
            plgpu.barrier_wait(turns.at[consumer])

    def pass_turn() -> None:
        if tuning.turns:
            plgpu.barrier_arrive(turns.at[1 - consumer])

    def wait_keys(turn: Any) -> None:
        plgpu.barrier_wait(k_loaded.at[slot_of(turn)])

    def score(turn: Any) -> Any:
        """Scores of an item's first tile."""
        slot = slot_of(turn)
        wait_keys(turn)
        wait_turn()
        if interpret:
            scores = _dot(queries[...], k_ring[slot].T)
            plgpu.commit_smem()
            pass_turn()
        else:

            def product(scores_ref: Any) -> Any:
                plgpu.wgmma(scores_ref, queries, k_ring.at[slot].transpose((1, 0)))
                pass_turn()
                return scores_ref[...]

            scores = pl.run_scoped(
                product, plgpu.WGMMAAccumulatorRef((ROWS, key_tile), jnp.float32)
            )
            scores = lax.optimization_barrier(scores)
        plgpu.barrier_arrive(k_freed.at[slot])
        return scores

    def score_and_add(turn: Any, more: Any, carry: _Carry, fold: _Fold) -> _Carry:
        """Scores of a tile and, while they are exponentiated, the values of the tile before.

        The tile's keys have been awaited; those of the next are on leaving, if there are `more`.
        """
        best, mass, weights, total = carry
        k_slot, v_slot = slot_of(turn), slot_of(turn - 1)

        def wait_next() -> None:
            pl.when(more)(partial(wait_keys, turn + 1))

        if interpret:
            wait_turn()
            scores = _dot(queries[...], k_ring[k_slot].T)
            plgpu.barrier_wait(v_loaded.at[v_slot])
            total += _dot(weights, v_ring[v_slot])
            plgpu.commit_smem()
            pass_turn()
            plgpu.barrier_arrive(k_freed.at[k_slot])
            best, mass, weights, shrink = fold(scores, best, mass)
            wait_next()
        else:

            def products(refs: tuple[Any, ...]) -> None:
                total_ref, best_ref, mass_ref, _, _ = refs

                def issue(scores_ref: Any) -> Any:
                    keys = k_ring.at[k_slot].transpose((1, 0))
                    plgpu.wgmma(scores_ref, queries, keys)
                    plgpu.barrier_wait(v_loaded.at[v_slot])
                    plgpu.wgmma(total_ref, weights, v_ring.at[v_slot])
                    pass_turn()
                    in_flight = 1 if tuning.overlap else 0
                    return plgpu.wgmma_accumulator_load(scores_ref, wait_n=in_flight)

                wait_turn()
                accumulator = plgpu.WGMMAAccumulatorRef((ROWS, key_tile), jnp.float32)
                scores = pl.run_scoped(issue, accumulator)
                scores = lax.optimization_barrier(scores)
                plgpu.barrier_arrive(k_freed.at[k_slot])
                folded = fold(scores, best_ref[...], mass_ref[...])
                for ref, value in zip(refs[1:], folded, strict=True):
                    ref[...] = value
                # A branch, too: ptxas would move the exponentials behind the wait for the values.
                wait_next()

            room = plgpu.layout_cast(jnp.zeros((ROWS, key_tile), jnp.float32), plgpu.Layout.WGMMA)
            total, best, mass, weights, shrink = pl.run_state(products)(
                (plgpu.WGMMAAccumulatorRef.init(total), best, mass, room, best)
            )
            # Rounding the weights earlier would write registers that products still read.
            total, weights = lax.optimization_barrier((total, weights))
        plgpu.barrier_arrive(v_freed.at[v_slot])
        total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
        return best, mass, weights.astype(jnp.bfloat16), total

    def add_last(turn: Any, carry: _Carry) -> Any:
        """The values of an item's last tile."""
        _, _, weights, total = carry
        slot = slot_of(turn)
        plgpu.barrier_wait(v_loaded.at[slot])
        wait_turn()
        if interpret:
            total += _dot(weights, v_ring[slot])
            plgpu.commit_smem()
            pass_turn()
        else:

            def product(total_ref: Any) -> None:
                plgpu.wgmma(total_ref, weights, v_ring.at[slot])
                pass_turn()

            total = pl.run_state(product)(plgpu.WGMMAAccumulatorRef.init(total))
            total = lax.optimization_barrier(total)
        plgpu.barrier_arrive(v_freed.at[slot])
        return total

    def item(tile: Any, first_head: Any, turn: Any) -> Any:
        plgpu.barrier_wait(q_loaded.at[consumer])
        row = [rows[consumer, column] for column in range(work.USED_COLUMNS)]
        plgpu.commit_smem()  # the row has been read
        begin, end, free, free_end = (
            row[i] for i in (work.BEGIN, work.END, work.FREE, work.FREE_END)
        )
        offset = consumer * ROWS if plan.tile_heads == 1 else 0
        position = row[work.POSITION] + offset
        low = jnp.clip(row[work.LOW] - offset, 0, ROWS)
        high = jnp.clip(row[work.HIGH] - offset, 0, ROWS)
        token, head = _rows_of(plan, row[work.FIRST], first_head, consumer)

        def steps(first: Any, last: Any, masked: bool, carry: _Carry) -> _Carry:
            def step(key: Any, carry: _Carry) -> _Carry:
                fold = partial(_fold, plan, position, key * key_tile, masked)
                return score_and_add(turn + key - begin, key + 1 < end, carry, fold)

            carry = lax.fori_loop(first, last, step, carry)
            return carry

        def attend_keys() -> tuple[Any, Any, Any]:
            scores = score(turn)
            best, mass, _ = _nothing(head_dim)
            fold = partial(_fold, plan, position, begin * key_tile, True)
            best, mass, weights, _ = fold(scores, best, mass)
            carry = (best, mass, weights.astype(jnp.bfloat16), _nothing(head_dim)[2])
            pl.when(begin + 1 < end)(partial(wait_keys, turn + 1))
            free_from = jnp.maximum(free, begin + 1)
            free_to = jnp.maximum(free_end, free_from)
            if options.sliding_window is not None:
                carry = steps(begin + 1, jnp.minimum(free_from, end), True, carry)
            carry = steps(free_from, free_to, False, carry)
            carry = steps(free_to, end, True, carry)
            if not tuning.shared:
                plgpu.barrier_arrive(q_freed.at[consumer])
            total = add_last(turn + end - begin - 1, carry)
            return carry[0], carry[1], total

        def no_keys() -> tuple[Any, Any, Any]:
            if not tuning.shared:
                plgpu.barrier_arrive(q_freed.at[consumer])
            return _nothing(head_dim)

        best, mass, total = lax.cond(begin < end, attend_keys, no_keys)
        some = jnp.where(mass > 0, mass, 1.0)
        total = total * lax.broadcast_in_dim(1.0 / some, total.shape, [0])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = total.astype(jnp.bfloat16)
        if options.with_lse:
            lses[0].at[consumer][...] = (best + jnp.log2(some)) * (1 / _LOG2E)
        plgpu.commit_smem()
        if options.with_lse:
            to_lse = outputs[1].at[tile, head, pl.ds(offset, ROWS)]
            plgpu.copy_smem_to_gmem(lses[0].at[consumer], to_lse)

        @pl.when(high - low == ROWS)
        def whole() -> None:
            plgpu.copy_smem_to_gmem(staging, outputs[0].at[pl.ds(token, ROWS), head])

        @pl.when(high - low < ROWS)
        def part() -> None:
            @pl.loop(low, high)
            def _(row: Any) -> None:
                into = outputs[0].at[pl.ds(token + row, 1), head]
                plgpu.copy_smem_to_gmem(staging.at[pl.ds(row, 1)], into)

        if tuning.shared:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_freed.at[consumer])
        return turn + end - begin

    for slot in range(tuning.stages):
        plgpu.barrier_arrive(k_freed.at[slot])
        plgpu.barrier_arrive(v_freed.at[slot])
    plgpu.barrier_arrive(q_freed.at[consumer])
    if tuning.turns:
        pl.when(consumer == 1)(pass_turn)
    _for_each_item(plan, tiles, item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
    if interpret and tuning.turns:  # it wants every arrival awaited
        pl.when(consumer == 0)(wait_turn)


def _nothing(head_dim: int) -> tuple[Any, Any, Any]:
    """Highest score, sum of weights and weighted values of no keys."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    best = jnp.full((ROWS,), -jnp.inf, jnp.float32)
    mass = jnp.zeros((ROWS,), jnp.float32)
    total = jnp.zeros((ROWS, head_dim), jnp.float32)
    cast = plgpu.layout_cast
    return cast(best, by_row), cast(mass, by_row), cast(total, plgpu.Layout.WGMMA)


def _fold(
    plan: _Plan, position: Any, first_key: Any, masked: bool, scores: Any, best: Any, mass: Any
) -> tuple[Any, Any, Any, Any]:
    """Take a tile's scores [ROWS, keys] into the running softmax.

    position, first_key: positions of the first query and the first key. best: highest score so
    far, in units of log 2; mass: sum of weights. Returns them, the tile's weights, and what sums
    so far shrink by.
    """
    options = plan.options
    unit = options.scale * _LOG2E
    if options.soft_cap is not None:
        scores = jnp.tanh(scores * (options.scale / options.soft_cap))
        unit = options.soft_cap * _LOG2E
    if masked:
        layout = plgpu.Layout.WGMMA
        queries = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=layout)
        keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
        # Not the distance of both: that differs in every element and would fill registers.
        queries, keys = queries + position, keys + first_key
        seen = keys <= queries
        if options.sliding_window is not None:
            seen &= keys > queries - options.sliding_window
        scores = jnp.where(seen, scores, -jnp.inf)
    higher = jnp.maximum(best, jnp.max(scores, axis=1) * unit)
    base = jnp.where(higher == -jnp.inf, 0.0, higher) if masked else higher
    shrink = jnp.exp2(best - base)
    weights = jnp.exp2(scores * unit - lax.broadcast_in_dim(base, scores.shape, [0]))
    mass = mass * shrink + jnp.sum(weights, axis=1)
    return higher, mass, weights, shrink


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """What WGMMA computes, where there is none.

    Ordinary reads, unlike WGMMA's, need a fence before a copy may write there: `commit_smem`.
    """
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
