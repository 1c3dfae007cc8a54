"""The computing warpgroups of the Hopper prefill kernel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as work
from lumen_kernels.paged_attention.prefill.mosaic_gpu_kernel import (
    ROWS,
    Plan,
    buffers_of,
    for_each_item,
    rows_of,
)

_LOG2E = math.log2(math.e)

_Carry = tuple[Any, Any, Any, Any]  # highest score, sum of weights, last weights, weighted values
_Fold = Callable[[Any, Any, Any], tuple[Any, Any, Any, Any]]


def compute(
    plan: Plan, consumer: Any, tiles: Any, outputs: list[Any], scratch: tuple[Any, ...]
) -> None:
    """Attend with 64 query rows to one item's keys after the other."""
    buffers, rows, lses, (k_ring, v_ring), (k_loaded, v_loaded), (k_freed, v_freed), *rest = scratch
    queries, staging = (buffer.at[consumer] for buffer in buffers_of(plan, buffers))
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
        token, head = rows_of(plan, row[work.FIRST], first_head, consumer)

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
    for_each_item(plan, tiles, item, jnp.int32(0))
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
    plan: Plan, position: Any, first_key: Any, masked: bool, scores: Any, best: Any, mass: Any
) -> tuple[Any, Any, Any, Any]:
    """Take a tile's scores [ROWS, keys] into the running softmax.

    position, first_key: positions of the first query and the first key. best: highest score so
    far, in units of log 2; mass: sum of weights. Returns them, the tile's weights, and what sums
    so far shrink by.
    """
    options = plan.options
    unit = options.scale * _LOG2E
    if options.soft_cap is not None:
        # The hardware's tanh, of 11 bits. One from an exponential took a call of 1.06 ms to 1.26 ms
        # (H200, 2026-11-25) and gave no closer outputs for scores of deviation 16 under a cap of
        # 50; log-sum-exps were off by 1e-5 instead of 4e-4.
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
