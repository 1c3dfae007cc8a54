"""Fold the partial results of items that several workers shared.

The worker that began an item merges it, as the last thing it does: it waits for the others, who
leave their parts as the first thing they do, and so never wait themselves. The counters for that
are in the schedule; they are zero again when the kernel ends. The interpreter knows no such
counters: there, the merge is a kernel of its own.
"""

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

    Written so that there is one way to contract it into fused multiply-adds: folding in the
    kernel or in the merge gives the same bits.
    """
    more = other > best
    higher = jnp.maximum(best, other)
    weight = jnp.exp2((jnp.minimum(best, other) - higher) * exponent)
    mass, others = jnp.where(more, others, mass), jnp.where(more, mass, others)
    return higher, others * weight + mass, more, weight


def fold_sums(acc: jax.Array, sums: jax.Array, more: jax.Array, weight: jax.Array) -> jax.Array:
    """Fold two sums as `fold_rows` says."""
    return jnp.where(more, acc, sums) * weight + jnp.where(more, sums, acc)


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
        fold_parts(
            Parts(sums, stats),
            out,
            lse,
            schedule,
            worker,
            queries=queries,
            exponent=exponent,
            thread=lax.axis_index("warpgroup").astype(_I32),
            threads=4,
        )

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
    lse: Any,
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
        if rows == 1:
            return lax.broadcast_in_dim(values[0], shape, [])
        row = plgpu.broadcasted_iota(_I32, shape, 0, layout=layout)
        spread = jnp.where(row == 0, values[0], values[1])
        for index in range(2, rows):
            spread = jnp.where(row == index, values[index], spread)
        return spread

    def do(index: jax.Array, carry: None) -> None:
        row = (_I32(thread) + index * _I32(threads)) * _I32(rows)

        def fold(block: jax.Array, state: Any) -> Any:
            loaded = []
            for ahead in range(_AHEAD):
                number = block * _AHEAD + ahead
                part = first + jnp.minimum(number, count - 1)
                sums = plgpu.load(parts.sums.at[part, pl.ds(row, rows)], layout=layout)
                best = [parts.stats[part, 0, offset + row + i] for i in range(rows)]
                mass = [parts.stats[part, 1, offset + row + i] for i in range(rows)]
                best = [jnp.where(number < count, b, NOTHING) for b in best]
                loaded.append((best, mass, sums))
            best, mass, acc = state
            for other, others, sums in loaded:
                pairs = [
                    fold_rows(a, b, m, o, exponent)
                    for a, b, m, o in zip(best, other, mass, others, strict=True)
                ]
                more, weight = ([p[i] for p in pairs] for i in (2, 3))
                acc = fold_sums(acc, sums, spread(more), spread(weight))
                best, mass = ([p[i] for p in pairs] for i in (0, 1))
            return best, mass, acc

        start = (
            [jnp.float32(NOTHING)] * rows,
            [jnp.float32(0)] * rows,
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout),
        )
        blocks = lax.div(count + _I32(_AHEAD - 1), _I32(_AHEAD))
        best, mass, acc = lax.fori_loop(_I32(0), blocks, fold, start)
        seen = [b > NOTHING / 2 for b in best]
        share = [jnp.where(s, 1.0 / m, 0.0) for s, m in zip(seen, mass, strict=True)]
        out.at[pl.ds(item * _I32(queries) + row, rows)][...] = (acc * spread(share)).astype(
            out.dtype
        )
        if lse is not None:
            for i in range(rows):
                value = (best[i] * exponent + jnp.log2(mass[i])) * (1 / LOG2E)
                lse[item, offset + row + i] = jnp.where(seen[i], value, -jnp.inf)

    # A masked partial result beyond the last one counts nothing: its maximum is NOTHING, and so
    # is that of rows that see nothing; both differ from any score by more than exp2 can hold.
    chunks = queries // rows
    mine = lax.div(_I32(chunks + threads - 1) - _I32(thread), _I32(threads))
    lax.fori_loop(_I32(0), jnp.where(count > 0, mine, 0), do, None)


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
