"""Decode attention on Hopper GPUs, in Pallas' Mosaic GPU dialect.

One persistent kernel, one block per core. A worker is a warpgroup that loads (TMA) and one that
computes (WGMMA), with a ring of K and V tiles between them; two workers share a core and hide each
other's softmax. What each worker does is in the schedule (`mosaic_gpu_schedule`); items that are
cut leave partial results, which the worker that began one folds (`mosaic_gpu_merge`).

The query heads of a KV head, times the query tokens of the row, are the rows of one 64-row
product: up to 63 of them are waste, which costs nothing, since loading K and V takes twice the
time of computing (measured on one H200). Rows are independent, so that whatever the unused rows
hold never matters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import PACKED_HEAD_DIM, ArenaShape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention.decode import mosaic_gpu_schedule as plan
from lumen_kernels.paged_attention.decode.mosaic_gpu_compute import compute
from lumen_kernels.paged_attention.decode.mosaic_gpu_kernel import Kernel, Refs, scratch_types
from lumen_kernels.paged_attention.decode.mosaic_gpu_load import load
from lumen_kernels.paged_attention.decode.mosaic_gpu_merge import Parts, merge
from lumen_kernels.paged_attention.decode.mosaic_gpu_schedule import Cut
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.target import Target

MAX_QUERIES = 64
"""Query heads per KV head times query tokens per row: rows of one WGMMA."""

_I32 = jnp.int32


def supports(dtype: Any, shape: ArenaShape, group: int, tokens: int) -> str | None:
    """Why this kernel cannot do a case, or None if it can. Such cases go to plain XLA."""
    if dtype != jnp.bfloat16:
        return f"the kernel is for bfloat16, not {dtype}"
    if shape.head_dim not in (64, 128, 256):
        return f"the kernel is for heads of 64, 128 and 256, not {shape.head_dim}"
    if shape.packed != (shape.head_dim == PACKED_HEAD_DIM):
        return "the kernel reads heads of 64 from packed slots only"
    if shape.block_size not in (16, 32, 64, 128):
        return f"the kernel is for blocks of 16, 32, 64 and 128, not {shape.block_size}"
    if group * tokens > MAX_QUERIES:
        return f"{group} query heads per KV head x {tokens} tokens exceed {MAX_QUERIES} rows"
    return None


def schedule(
    lengths: jax.Array,
    *,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    sliding_window: int | None,
    target: Target,
    by_position: bool = False,
) -> jax.Array:
    """What each worker does in this step: make it once and give it to `attend` for all layers.

    lengths int32 [rows]; tokens: query tokens per row. Returns int32 [workers + rows, COLUMNS].
    """
    cut = _cut(lengths.shape[0], kv_heads, head_dim, tokens, sliding_window, target, by_position)
    return plan.schedule(lengths, cut)


def _cut(
    rows: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    window: int | None,
    target: Target,
    by_position: bool,
) -> Cut:
    return Cut(rows, kv_heads, tokens, window, plan.workers(head_dim, target), by_position)


def attend(
    q: jax.Array,
    arena: tuple[jax.Array, ...],
    shape: ArenaShape,
    tables: jax.Array,
    lengths: jax.Array,
    layer_offset: jax.Array,
    options: Options,
    *,
    schedule: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of the last tokens of each row over the arena, which holds them already.

    q bf16 [rows, tokens, heads, head_dim]; the rest as `lumen_kernels.paged_attention.decode`.
    Returns the output, shaped as q, and float32 [rows, tokens, heads] or None.
    Raises KernelArgumentError for a schedule of another shape.
    """
    rows, tokens, heads, head_dim = q.shape
    kv_heads, target = options.kv_heads, options.target
    group = heads // kv_heads
    cut = _cut(
        rows, kv_heads, head_dim, tokens, options.sliding_window, target, options.batch_invariant
    )
    if schedule is None:
        schedule = plan.schedule(lengths, cut)
    expected = (cut.workers + rows, plan.COLUMNS)
    if schedule.shape != expected or schedule.dtype != _I32:
        raise KernelArgumentError(
            "decode",
            "schedule",
            f"is {schedule.dtype}{list(schedule.shape)}; for these rows and this target it is "
            f"int32{list(expected)}, as `decode_schedule` makes it.",
        )
    # The queries of an item are consecutive rows already, or are made so, padded to eights.
    direct = tokens == 1 and _direct(rows * kv_heads, group, head_dim)
    queries = group if direct else (group * tokens + 7) // 8 * 8
    kernel = Kernel(
        cut, shape, group, queries, options.scale, options.soft_cap, options.with_lse,
        target.cores, target.interpret,
    )  # fmt: skip
    if direct:
        flat = q.reshape(rows * heads, head_dim)
    else:
        flat = q.reshape(rows, tokens, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
        flat = flat.reshape(rows, kv_heads, tokens * group, head_dim)
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, queries - tokens * group), (0, 0)))
        flat = flat.reshape(rows * kv_heads * queries, head_dim)
    out, lse = _run(kernel, flat, arena, tables, lengths, layer_offset, schedule)
    if not direct:
        out = out.reshape(rows, kv_heads, queries, head_dim)[:, :, : tokens * group]
        out = out.reshape(rows, kv_heads, tokens, group, head_dim).transpose(0, 2, 1, 3, 4)
    out = out.reshape(q.shape)
    if lse is None:
        return out, None
    skipped = (queries * jnp.arange(rows * kv_heads)) % 8 if direct else 0
    if direct and queries < 8:
        place = jnp.arange(queries) + jnp.asarray(skipped)[:, None]
        lse = jnp.take_along_axis(lse, place, axis=1)
    lse = lse[:, : tokens * group].reshape(rows, kv_heads, tokens, group)
    lse = lse.transpose(0, 2, 1, 3).reshape(rows, tokens, heads)
    return out, jnp.where(lengths[:, None, None] > 0, lse, -jnp.inf)


def _direct(items: int, group: int, head_dim: int) -> bool:
    """Whether items' queries can be loaded from q as it is: eights, or whole parts of eights."""
    if group % 8 == 0:
        return True
    return group in (1, 2, 4) and group * head_dim >= 128 and items * group % 8 == 0


@functools.partial(jax.jit, static_argnums=0)
def _run(
    kernel: Kernel,
    q: jax.Array,
    arena: tuple[jax.Array, ...],
    tables: jax.Array,
    lengths: jax.Array,
    layer_offset: jax.Array,
    schedule: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """The kernel, and the merge of what it left in parts.

    A jitted function of its own: a program of many layers traces, lowers and compiles it once.
    """
    items = kernel.cut.rows * kernel.cut.kv_heads
    dim, f32 = kernel.head_dim, jnp.float32
    parts = kernel.cut.parts
    out_type = [
        jax.ShapeDtypeStruct((items * kernel.queries, dim), q.dtype),
        jax.ShapeDtypeStruct((parts, kernel.loaded, dim), f32),
        jax.ShapeDtypeStruct((parts, 2, 64), f32),
    ]
    if kernel.with_lse:
        out_type.append(jax.ShapeDtypeStruct((items, 64), f32))
    # Integer rows instead of one more dimension: a TMA descriptor has five.
    if kernel.joined:
        pages = [x.reshape(x.shape[0], -1, x.shape[3]) for x in arena]
    else:
        pages = [x.reshape(-1, *x.shape[2:]) for x in arena]
    results = plgpu.kernel(
        functools.partial(_body, kernel, len(pages)),
        out_type=out_type,
        scratch_types=scratch_types(kernel, q.dtype),
        grid=(kernel.cores,),
        grid_names=("core",),
        num_threads=2 * kernel.workers,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=plgpu.InterpretGPUParams() if kernel.interpret else False,
        kernel_name="paged_attention_decode",
    )(q, *pages, tables, lengths, layer_offset.reshape(1), schedule)
    out, part, stats, *lse = results
    if kernel.merges:
        return out, lse[0] if lse else None
    return merge(
        Parts(part, stats),
        out,
        lse[0] if lse else None,
        schedule,
        workers=kernel.cut.workers,
        queries=kernel.queries,
        exponent=kernel.exponent,
    )


def _body(kernel: Kernel, segments: int, *refs: Any, **scratch: Any) -> None:
    """One core: half of its warpgroups compute, the other half load for them."""
    q, pages, rest = refs[0], refs[1 : 1 + segments], refs[1 + segments :]
    tables, lengths, layer_offset, schedule, out, part, stats, *lse = rest
    tiles, results, partials = scratch["ring"]
    r = Refs(
        q, pages, tables, lengths, layer_offset, schedule, out, part, stats,
        lse[0] if lse else None, tiles, results, partials, scratch["q_smem"],
        scratch["k_ready"], scratch.get("v_ready"), scratch["free"],
        scratch["q_ready"], scratch["q_free"],
    )  # fmt: skip
    warpgroup = lax.axis_index("warpgroup").astype(_I32)
    local = lax.rem(warpgroup, _I32(kernel.workers))
    # Neighbours in the line sit on different cores, so that few items spread over all of them.
    worker = lax.axis_index("core").astype(_I32) + local * _I32(kernel.cores)

    compute_registers, load_registers = kernel.registers

    @pl.when(warpgroup >= kernel.workers)
    def _() -> None:
        plgpu.set_max_registers(load_registers, action="decrease")
        load(kernel, r, worker, local)

    @pl.when(warpgroup < kernel.workers)
    def _() -> None:
        plgpu.set_max_registers(compute_registers, action="increase")
        compute(kernel, r, worker, local)
