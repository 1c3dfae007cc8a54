"""Prefill attention on Hopper: two warpgroups of queries over one stream of keys and values.

A persistent grid, one program per multiprocessor. An item is a tile of 64 tokens and two query
heads of one KV head, or, if the heads of a KV head are odd in number, of 128 tokens and one head;
each of two consumer warpgroups holds 64 rows of it. A producer warpgroup brings K and V pages
through rings in shared memory. A consumer issues the scores of tile j + 1 and the sum over tile
j's values together, and the two consumers take turns in that, so that one exponentiates while the
tensor cores work for the other. Where a KV head has four query heads or another multiple, two
programs of a cluster take two of them each and load one half of every tile for both: that saves L2
reads, and the power they take. Keys are folded in tiles at fixed positions, in ascending order,
so that a token's result does not depend on how its prompt was cut into chunks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.prefill import mosaic_gpu_schedule as work
from lumen_kernels.paged_attention.prefill.mosaic_gpu_compute import compute
from lumen_kernels.paged_attention.prefill.mosaic_gpu_kernel import (
    CONSUMERS,
    TUNINGS,
    Plan,
    Tuning,
)
from lumen_kernels.paged_attention.prefill.mosaic_gpu_load import load
from lumen_kernels.target import Backend


def supports(q: Any, shape: ArenaShape, options: Options) -> bool:
    """Whether the kernel covers this call; plain XLA does the rest."""
    return (
        options.target.backend is Backend.MOSAIC_GPU
        and q.dtype == jnp.bfloat16
        and shape.head_dim in TUNINGS
        and shape.packed == (shape.head_dim == 64)
        and shape.block_size in (16, 32, 64, 128)
    )


def schedule(
    starts: jax.Array,
    counts: jax.Array,
    q: Any,
    shape: ArenaShape,
    options: Options,
    tuning: Tuning | None = None,
) -> jax.Array:
    """The kernel's work for these rows: make it once and give it to `attend` for all layers.

    q: an array like that of `attend`, or its shape. Returns int32 [tiles, COLUMNS].
    """
    tokens, heads, head_dim = q.shape
    tuning = tuning or TUNINGS[head_dim]
    return _listed(starts, counts, tokens, Plan.of(heads, shape, options, tuning)).tiles


def _listed(starts: jax.Array, counts: jax.Array, tokens: int, plan: Plan) -> work.WorkList:
    window = plan.options.sliding_window
    padded = _padded(tokens, plan)
    return work.work_list(starts, counts, padded, plan.tile_tokens, plan.tuning.key_tile, window)


def _padded(tokens: int, plan: Plan) -> int:
    return max(-(-tokens // work.ALIGN) * work.ALIGN, plan.tile_tokens)


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
    schedule: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Output, shaped as q [tokens, heads, head_dim], and log-sum-exp [tokens, heads] or None.

    Arguments are checked and `supports` holds. K and V of all tokens are in the arena. Raises
    KernelArgumentError for a schedule of another shape.
    """
    tokens, heads, head_dim = q.shape
    tuning = tuning or TUNINGS[head_dim]
    plan = Plan.of(heads, shape, options, tuning)
    padded = _padded(tokens, plan)
    if padded != tokens:
        q = jnp.pad(q, ((0, padded - tokens), (0, 0), (0, 0)))
    listed = _listed(starts, counts, tokens, plan)
    tiles = listed.tiles if schedule is None else schedule
    if tiles.shape != listed.tiles.shape or tiles.dtype != listed.tiles.dtype:
        raise KernelArgumentError(
            "prefill",
            "schedule",
            f"is {tiles.dtype}{list(tiles.shape)}; for these tokens and rows it is "
            f"int32{list(listed.tiles.shape)}, as `prefill_schedule` makes it.",
        )
    halves = 1 if shape.packed else 2
    lanes = head_dim * 2 if shape.packed else head_dim
    pages = [segment.reshape(-1, shape.block_size, lanes) for segment in arena]
    out_type = [jax.ShapeDtypeStruct((padded, heads, head_dim), q.dtype)]
    if options.with_lse:
        tile_lse = (tiles.shape[0], heads, plan.tile_tokens)
        out_type.append(jax.ShapeDtypeStruct(tile_lse, jnp.float32))
    target = options.target
    results = plgpu.kernel(
        lambda *refs: _body(plan, halves, refs),
        out_type=out_type,
        scratch_types=plan.scratch(),
        grid=(target.cores // plan.programs,),
        grid_names=("cluster",),
        cluster=(plan.programs,),
        cluster_names=("pair",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
    )(q, tables, layer_offset.reshape(1).astype(jnp.int32), tiles, *pages)
    out = results[0][:tokens]
    if not options.with_lse:
        return out, None
    tile, row = listed.token_tile[:tokens], listed.token_row[:tokens]
    return out, results[1][tile, :, row]


def _body(plan: Plan, halves: int, refs: tuple[Any, ...]) -> None:
    scratch = refs[-10:]
    segments = len(plan.shape.slots)
    q, tables, layer, tiles, *rest = refs[:-10]
    pages, outputs = rest[:segments], rest[segments:]
    warpgroup = lax.axis_index("warpgroup")
    tuning = plan.tuning

    @pl.when(warpgroup < CONSUMERS)
    def consume() -> None:
        plgpu.set_max_registers(tuning.consumer_registers, action="increase")
        compute(plan, warpgroup, tiles, outputs, scratch)

    @pl.when(warpgroup == CONSUMERS)
    def produce() -> None:
        plgpu.set_max_registers(tuning.producer_registers, action="decrease")
        load(plan, halves, q, tables, layer, tiles, pages, scratch)
