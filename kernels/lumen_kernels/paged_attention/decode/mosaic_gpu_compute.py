"""The computing warpgroups of the Hopper decode kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.paged_attention.decode import mosaic_gpu_merge as merging
from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.decode.mosaic_gpu_kernel import (
    LOG2E,
    NOTHING,
    Item,
    Kernel,
    Refs,
    for_each_item,
)
from lumen_kernels.paged_attention.decode.mosaic_gpu_schedule import TILE

_I32 = jnp.int32


def _rows_of(x: float, rows: int) -> Any:
    """A row statistic, in the registers that hold the rows of a product."""
    return plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _product(interpret: bool, a: Any, b: Any, shape: tuple[int, int]) -> Any:
    """a @ b in float32; a is a swizzled tile."""
    if interpret:
        return jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    def go(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(go, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _accumulated(interpret: bool, acc: jax.Array, a: jax.Array, b: Any) -> Any:
    """acc + a @ b in float32; a is in registers."""
    if interpret:
        return acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.WGMMAAccumulatorRef.init(acc))


def compute(kernel: Kernel, r: Refs, worker: jax.Array, local: jax.Array) -> None:
    """The computing warpgroup of a worker."""
    stages, dim, rows = kernel.stages, kernel.head_dim, 64
    packed, tokens, window = kernel.arena.packed, kernel.cut.tokens, kernel.cut.window
    c = kernel.exponent
    base = local * _I32(stages)
    wgmma = plgpu.Layout.WGMMA

    def spread(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
        return lax.broadcast_in_dim(x, shape, [0])

    def k_of(slot: jax.Array) -> Any:
        if packed:
            return r.tiles.at[slot, :, pl.ds(0, dim)]
        return r.tiles.at[slot, pl.ds(0, TILE)]

    def v_of(slot: jax.Array) -> Any:
        if packed:
            return r.tiles.at[slot, :, pl.ds(dim, dim)]
        return r.tiles.at[slot, pl.ds(TILE, TILE)]

    def iota(shape: tuple[int, int], axis: int) -> jax.Array:
        return plgpu.broadcasted_iota(_I32, shape, axis, layout=wgmma)

    def masked(scores: jax.Array, length: jax.Array, j: jax.Array) -> jax.Array:
        """Scores of what a query must not see: after itself, or before its window."""
        column = iota((rows, TILE), 1)
        last = length - 1 - j * _I32(TILE)
        if tokens > 1:
            query = iota((rows, TILE), 0) // kernel.group
            last = query + (last - (tokens - 1))
        seen = column <= last
        if window is not None:
            seen &= column > last - window
        return jnp.where(seen, scores, NOTHING)

    def clear_unseen(slot: jax.Array, length: jax.Array, j: jax.Array) -> None:
        """Zero V where no query looks: its rows may hold NaN, and 0 x NaN is not 0."""
        v = v_of(slot)
        position = iota((TILE, dim), 0)
        seen = position < length - j * _I32(TILE)
        if window is not None:
            seen &= position >= plan.first_position(length, tokens, window) - j * _I32(TILE)
        value = plgpu.load(v, layout=wgmma)
        v[...] = jnp.where(seen, value, jnp.zeros_like(value))
        plgpu.commit_smem()

    def fresh() -> tuple[jax.Array, jax.Array, jax.Array]:
        zeros = plgpu.layout_cast(jnp.zeros((rows, dim), jnp.float32), wgmma)
        return _rows_of(NOTHING, rows), _rows_of(0.0, rows), zeros

    def leave_part(slot: jax.Array, part: jax.Array, index: jax.Array, state: Any) -> None:
        """Partial result: sums relative to their own maximum."""
        best, mass, acc = state
        r.stats.at[part, 0][...] = best
        r.stats.at[part, 1][...] = mass
        r.partials.at[slot][...] = acc
        plgpu.commit_smem()
        start = lax.rem(index * _I32(kernel.queries), _I32(8))
        plgpu.copy_smem_to_gmem(
            r.partials.at[slot, pl.ds(start, kernel.queries)],
            r.part.at[part, pl.ds(0, kernel.queries)],
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=not kernel.merges)

    def leave_result(slot: jax.Array, index: jax.Array, state: Any) -> None:
        best, mass, acc = state
        share = 1.0 / mass
        if tokens > 1:  # a row shorter than its queries has some that see nothing
            share = jnp.where(best > NOTHING / 2, share, 0.0)
        r.results.at[slot, pl.ds(0, rows)][...] = (acc * spread(share, acc.shape)).astype(
            jnp.bfloat16
        )
        plgpu.commit_smem()
        start = lax.rem(index * _I32(kernel.queries), _I32(8))
        plgpu.copy_smem_to_gmem(
            r.results.at[slot, pl.ds(start, kernel.queries)],
            r.out.at[pl.ds(index * _I32(kernel.queries), kernel.queries)],
        )
        if r.lse is not None:
            value = merging.log_sum_exp(best, mass, c)
            if tokens > 1:
                value = jnp.where(best > NOTHING / 2, value, -jnp.inf)
            r.lse.at[index][...] = value
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def turn(item: Item, carry: Any) -> Any:
        t, part = carry
        length, low, high = item.length, item.low, item.high
        buffers = kernel.query_buffers
        buffer = local * _I32(buffers) + lax.rem(item.number, _I32(buffers))
        q = r.q_smem.at[pl.ds(buffer * _I32(kernel.loaded), rows)]
        plgpu.barrier_wait(r.q_ready.at[buffer])
        index = item.row * _I32(kernel.cut.kv_heads) + item.head

        def tile(j: jax.Array, state: Any, last: jax.Array) -> Any:
            best, mass, acc, t = state
            slot = base + lax.rem(t, _I32(stages))
            edge = (j + 1) * _I32(TILE) > length - (tokens - 1)
            if window is not None:
                edge |= j * _I32(TILE) < length - window
            plgpu.barrier_wait(r.k_ready.at[slot])
            keys = k_of(slot).transpose((1, 0))
            scores = _product(kernel.interpret, q, keys, (rows, TILE))
            if kernel.soft_cap is not None:
                # tanh from one exponential: the hardware's own tanh has 11 bits only.
                power = jnp.exp2(scores * (2 * LOG2E * kernel.scale / kernel.soft_cap))
                root = lax.rsqrt(1.0 + power)
                scores = kernel.soft_cap * (1.0 - 2.0 * (root * root))
            scores = lax.cond(edge, lambda s: masked(s, length, j), lambda s: s, scores)
            higher = jnp.maximum(best, jnp.max(scores, axis=1))
            shrink = jnp.exp2((best - higher) * c)
            top = higher * c
            if tokens > 1:  # a query that sees nothing in this tile: no weights, not exp2(0)
                top = jnp.where(higher > NOTHING / 2, top, 0.0)
            weights = jnp.exp2(scores * c - spread(top, scores.shape))
            mass = mass * shrink + jnp.sum(weights, axis=1)
            acc = acc * spread(shrink, acc.shape)
            weights = weights.astype(jnp.bfloat16)
            if r.v_ready is not None:
                plgpu.barrier_wait(r.v_ready.at[slot])
            pl.when(edge)(lambda: clear_unseen(slot, length, j))
            acc = _accumulated(kernel.interpret, acc, weights, v_of(slot))

            @pl.when(j != last)
            def _() -> None:
                plgpu.barrier_arrive(r.free.at[slot])

            return higher, mass, acc, t + 1

        def tiles(low: jax.Array, high: jax.Array, t: jax.Array) -> tuple[Any, jax.Array]:
            *state, t = lax.fori_loop(
                low, high, functools.partial(tile, last=high - 1), (*fresh(), t)
            )
            return tuple(state), t

        def leave(slot: jax.Array, part: jax.Array, state: Any) -> None:
            leave_part(slot, part, index, state)
            if kernel.merges:

                @pl.when(low > item.begin)
                def _() -> None:
                    leader = r.schedule[worker, plan.LEADER]
                    merging.signal(r.schedule.at[leader, pl.ds(plan.COUNTER, 1)])

        begins = low == item.begin
        whole = begins & (high == item.end)
        if kernel.cut.by_position:
            first = lax.div(low, item.chunk)
            count = lax.div(high - 1, item.chunk) + 1 - first

            def fold_chunk(number: jax.Array, carry: Any) -> Any:
                total, t, part = carry
                start = (first + number) * item.chunk
                state, t = tiles(jnp.maximum(start, low), jnp.minimum(start + item.chunk, high), t)
                slot = base + lax.rem(t - 1, _I32(stages))
                # Chunks behind another worker's are folded one by one, by the merge.
                pl.when(jnp.logical_not(begins))(lambda: leave(slot, part, state))
                best, mass, more, weight = merging.fold_rows(
                    total[0], state[0], total[1], state[1], c
                )
                more, weight = spread(more, (rows, dim)), spread(weight, (rows, dim))
                acc = merging.fold_sums(total[2], state[2], more, weight)

                @pl.when(number != count - 1)
                def _() -> None:
                    plgpu.barrier_arrive(r.free.at[slot])

                return (best, mass, acc), t, part + jnp.where(begins, 0, 1)

            state, t, part = lax.fori_loop(_I32(0), count, fold_chunk, (fresh(), t, part))
            partial = begins & (high < item.end)
        else:
            state, t = tiles(low, high, t)
            partial = jnp.logical_not(whole)
        plgpu.barrier_arrive(r.q_free.at[buffer])
        slot = base + lax.rem(t - 1, _I32(stages))
        pl.when(whole)(lambda: leave_result(slot, index, state))
        pl.when(partial)(lambda: leave(slot, part, state))
        plgpu.barrier_arrive(r.free.at[slot])
        return t, part + jnp.where(partial, 1, 0)

    first_part = r.schedule[worker, plan.PART]
    for_each_item(kernel, r.schedule, worker, turn, (_I32(0), first_part))
    if kernel.merges:
        count = r.schedule[worker, plan.MERGE_PARTS]

        @pl.when(count > 0)
        def _() -> None:
            merging.await_parts(r.schedule.at[worker])
            merging.fold_parts(
                merging.Parts(r.part, r.stats),
                r.out,
                r.schedule,
                worker,
                queries=kernel.queries,
                exponent=c,
                together=4,
            )
            if r.lse is not None:
                merging.fold_lse(r.stats, r.lse, r.schedule, worker, exponent=c)
