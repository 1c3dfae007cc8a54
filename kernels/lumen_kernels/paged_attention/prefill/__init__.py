"""Prefill attention: consecutive new tokens of several sequences, causal, each over its prefix."""

from typing import Any

import jax

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention import mosaic_tpu_blocks
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.prefill import mosaic_gpu, mosaic_tpu, xla
from lumen_kernels.paged_attention.streams import in_order, stream_positions, write_at
from lumen_kernels.target import Backend

# All layers of a program share one lowered kernel: each further one would take a second to lower,
# and some seconds to compile, as the compiler does not see that it is the same.
_attend_on_gpu = jax.jit(mosaic_gpu.attend, static_argnames=("shape", "options"))


def attend_and_write(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    options: Options,
    schedule: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """`lumen_kernels.paged_attention.prefill` with checked arguments."""
    if k is not None and v is not None:
        rows, positions = stream_positions(starts, counts, q.shape[0])
        arena = write_at(
            k, v, arena, shape.block_size, tables, rows, positions, layer_offset, options.target
        )
    place = (arena, shape, tables, starts, counts, layer_offset, options)
    if mosaic_gpu.supports(q, shape, options):
        return *_attend_on_gpu(q, *place, schedule=schedule), arena
    backend = options.target.backend
    if backend is Backend.MOSAIC_TPU and mosaic_tpu_blocks.supports(shape, q.dtype):
        return *mosaic_tpu.attend(q, *place), arena
    out, lse = xla.attend(q, *place)
    out, arena = in_order(out, arena)
    return out, lse if options.with_lse else None, arena


def schedule(
    starts: jax.Array, counts: jax.Array, q: Any, shape: ArenaShape, options: Options
) -> jax.Array | None:
    """`lumen_kernels.paged_attention.prefill_schedule`; q: [tokens, heads, head_dim]."""
    if mosaic_gpu.supports(q, shape, options):
        return mosaic_gpu.schedule(starts, counts, q, shape, options)
    return None
