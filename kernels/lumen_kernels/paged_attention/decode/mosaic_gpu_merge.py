"""Fold the partial results of items that several workers shared.

The worker that began an item merges it, as the last thing it does: it waits for the others, who
leave their parts as the first thing they do, and so never wait themselves. The counters for that
are in the schedule; they are zero again when the kernel ends. The interpreter knows no such
counters: there, the merge is a kernel of its own.

All arithmetic here is on vectors. Mosaic contracts their products and sums into fused multiply-adds
and leaves those of scalars alone: folded as scalars, statistics would have other bits than those
that a worker folds itself, seen on an H200.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref

from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.decode.mosaic_gpu_kernel import LOG2E, NOTHING

_AHEAD = 8  # partial results asked for at a time
_I32 = jnp.int32


class Parts(NamedTuple):
    """Partial results: sums [parts, queries rounded up to 8, head_dim], and [parts, 2, 64]: the
    maximum and the mass of each row of the product; all float32."""

    sums: Any
    stats: Any


def fold_rows(
    best: jax.Array, other: jax.Array, mass: jax.Array, others: jax.Array, exponent: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Fold two maxima and masses: the new ones, whether the other's is larger, and the weight of
    the smaller one.

    Written so that there is one way to contract it: folding in the kernel or in the merge gives
    the same bits.
    """
    more = other > best
    higher = jnp.maximum(best, other)
    weight = jnp.exp2((jnp.minimum(best, other) - higher) * exponent)
    mass, others = jnp.where(more, others, mass), jnp.where(more, mass, others)
    return higher, others * weight + mass, more, weight


def fold_sums(acc: jax.Array, sums: jax.Array, more: jax.Array, weight: jax.Array) -> jax.Array:
    """Fold two sums as `fold_rows` says."""
    return jnp.where(more, acc, sums) * weight + jnp.where(more, sums, acc)


def log_sum_exp(best: jax.Array, mass: jax.Array, exponent: float) -> jax.Array:
    """In natural units; whatever where nothing is seen."""
    return (best * exponent + jnp.log2(mass)) * (1 / LOG2E)


def merge(
    parts: Parts,
    out: jax.Array,
    lse: jax.Array | None,
    schedule: jax.Array,
    *,
    workers: int,
    queries: int,
    exponent: float,
) -> tuple[jax.Array, jax.Array | None]:
    """Write the items that were cut into out (and lse), in place: for the interpreter only."""
    out_ref = jax.new_ref(out)
    lse_ref = None if lse is None else jax.new_ref(lse)
    refs = [out_ref] if lse_ref is None else [out_ref, lse_ref]

    def body(sums: Any, stats: Any, schedule: Any, out: Any, lse: Any = None) -> None:
        worker = lax.axis_index("worker").astype(_I32)
        warpgroup = lax.axis_index("warpgroup").astype(_I32)
        fold_parts(
            Parts(sums, stats),
            out,
            schedule,
            worker,
            queries=queries,
            exponent=exponent,
            thread=warpgroup,
            threads=4,
        )
        if lse is not None:

            @pl.when(warpgroup == 0)
            def _() -> None:
                fold_lse(stats, lse, schedule, worker, exponent=exponent)

    plgpu.kernel(
        body,
        out_type=(),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(),
        kernel_name="paged_attention_decode_merge",
    )(parts.sums, parts.stats, schedule, *refs)
    return jax.freeze(out_ref), None if lse_ref is None else jax.freeze(lse_ref)


def fold_parts(
    parts: Parts,
    out: Any,
    schedule: Any,
    worker: jax.Array,
    *,
    queries: int,
    exponent: float,
    thread: jax.Array | int = 0,
    threads: int = 1,
    together: int = 1,
) -> None:
    """Fold the parts of the item that this worker merges, in order, into its output.

    thread, threads: which share of the rows this warpgroup does. together: rows at a time.
    """
    first, count = schedule[worker, plan.MERGE_PART], schedule[worker, plan.MERGE_PARTS]
    item = schedule[worker, plan.MERGE_ITEM]
    dim = parts.sums.shape[2]
    rows = max(128 // dim, min(together, queries))
    shape = (rows, dim)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=rows * dim // 128)
    offset = lax.rem(item * _I32(queries), _I32(8))

    def spread(values: list[jax.Array]) -> jax.Array:
        """One number per row."""
        spread: jax.Array
        if rows == 1:
            spread = plgpu.layout_cast(lax.broadcast_in_dim(values[0], shape, []), layout)
            return spread
        row = plgpu.broadcasted_iota(_I32, shape, 0, layout=layout)
        spread = jnp.where(row == 0, values[0], values[1])
        for index in range(2, rows):
            spread = jnp.where(row == index, values[index], spread)
        return spread

    def constant(value: float) -> Any:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def do(index: jax.Array, carry: None) -> None:
        row = (_I32(thread) + index * _I32(threads)) * _I32(rows)

        def load(number: jax.Array) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
            part = first + jnp.minimum(number, count - 1)
            sums = plgpu.load(parts.sums.at[part, pl.ds(row, rows)], layout=layout)
            best = [parts.stats[part, 0, offset + row + i] for i in range(rows)]
            mass = [parts.stats[part, 1, offset + row + i] for i in range(rows)]
            return [jnp.where(number < count, b, NOTHING) for b in best], mass, sums

        def fold(state: Any, part: Any) -> Any:
            (best, mass, acc), (other, others, sums) = state, part
            best, mass, more, weight = fold_rows(
                best, spread(other), mass, spread(others), exponent
            )
            return best, mass, fold_sums(acc, sums, more, weight)

        start = constant(NOTHING), constant(0.0), constant(0.0)
        best, mass, acc = _fold_all(count, load, fold, start)
        share = jnp.where(best > NOTHING / 2, 1.0 / mass, 0.0)
        out.at[pl.ds(item * _I32(queries) + row, rows)][...] = (acc * share).astype(out.dtype)

    chunks = queries // rows
    mine = lax.div(_I32(chunks + threads - 1) - _I32(thread), _I32(threads))
    lax.fori_loop(_I32(0), jnp.where(count > 0, mine, 0), do, None)


def fold_lse(stats: Any, lse: Any, schedule: Any, worker: jax.Array, *, exponent: float) -> None:
    """Fold the statistics of the item that this worker merges into its log-sum-exp.

    stats: as in `Parts`. In the registers, and so with the operations, of an item that is not cut.
    """
    first, count = schedule[worker, plan.MERGE_PART], schedule[worker, plan.MERGE_PARTS]
    layout = plgpu.Layout.WGMMA.reduce(1)

    def load(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = first + jnp.minimum(number, count - 1)
        pair = (stats.at[part, i] for i in range(2))
        best, mass = (plgpu.load(x, layout=layout, optimized=False) for x in pair)
        return jnp.minimum(best, jnp.where(number < count, jnp.inf, NOTHING)), mass

    def fold(state: Any, part: Any) -> Any:
        return fold_rows(state[0], part[0], state[1], part[1], exponent)[:2]

    def constant(value: float) -> Any:
        return plgpu.layout_cast(jnp.full((64,), value, jnp.float32), layout)

    @pl.when(count > 0)
    def _() -> None:
        best, mass = _fold_all(count, load, fold, (constant(NOTHING), constant(0.0)))
        value = log_sum_exp(best, mass, exponent)
        value = jnp.where(best > NOTHING / 2, value, -jnp.inf)
        lse.at[schedule[worker, plan.MERGE_ITEM]][...] = value


def _fold_all(
    count: jax.Array,
    load: Callable[[jax.Array], Any],
    fold: Callable[[Any, Any], Any],
    state: Any,
) -> Any:
    """state = fold(state, load(number)) for numbers below `count`, some loads at a time.

    Numbers beyond are loaded and folded too. Their maximum is to be NOTHING, and so is that of rows
    that see nothing; both differ from any score by more than exp2 can hold, and so count nothing.
    """

    def block(index: jax.Array, state: Any) -> Any:
        for part in [load(index * _AHEAD + ahead) for ahead in range(_AHEAD)]:
            state = fold(state, part)
        return state

    return lax.fori_loop(_I32(0), lax.div(count + _I32(_AHEAD - 1), _I32(_AHEAD)), block, state)


def signal(counter: Any) -> None:
    """Tell the worker that merges that a part is in memory."""

    def go(ctx: Any, counter: Any) -> None:
        del ctx
        mgpu.utils.warpgroup_barrier()
        pointer = mgpu.utils.memref_ptr(counter)
        mgpu.utils.SemaphoreRef(pointer).signal(1, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(go)(counter)


def await_parts(entry: Any) -> None:
    """Wait for all parts but this worker's own, and set the counter back to zero."""

    def go(ctx: Any, entry: Any) -> None:
        del ctx
        index = ir.IndexType.get()
        i32 = ir.IntegerType.get_signless(32)
        parts = memref.load(entry, [mgpu.utils.c(plan.MERGE_PARTS, index)])
        others = arith.subi(parts, mgpu.utils.c(1, i32))
        counter = mgpu.utils.memref_slice(entry, (slice(plan.COUNTER, plan.COUNTER + 1),))
        pointer = mgpu.utils.memref_ptr(counter)
        mgpu.utils.SemaphoreRef(pointer).wait(others, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(go)(entry)
