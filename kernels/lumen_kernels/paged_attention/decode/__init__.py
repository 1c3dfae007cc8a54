"""Decode attention: one or a few new tokens per sequence, over everything before them."""

from typing import Any

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention import mosaic_tpu_blocks, xla
from lumen_kernels.paged_attention.decode import mosaic_gpu, mosaic_tpu
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.streams import in_order, write_at
from lumen_kernels.target import Backend, Target


def attend_and_write(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    lengths: jax.Array,
    layer_offset: jax.Array,
    options: Options,
    schedule: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """`lumen_kernels.paged_attention.decode` with checked arguments, q always [rows, n, ...]."""
    backend = _backend(q, shape, options.kv_heads, options.target)
    if backend is Backend.MOSAIC_TPU:
        return mosaic_tpu.attend_and_write(
            q, k, v, arena, shape, tables, lengths, layer_offset, options, schedule
        )
    n = q.shape[1]
    positions = lengths[:, None] - n + jnp.arange(n, dtype=jnp.int32)
    if k is not None and v is not None:
        rows = jnp.repeat(jnp.arange(q.shape[0], dtype=jnp.int32), n)
        arena = write_at(
            k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]), arena, shape.block_size,
            tables, rows, positions.reshape(-1), layer_offset, options.target,
        )  # fmt: skip
    if backend is Backend.MOSAIC_GPU:
        out, lse = mosaic_gpu.attend(
            q, arena, shape, tables, lengths, layer_offset, options, schedule=schedule
        )
        return out, lse, arena
    # A TPU has another tiling for the wider rows that `read_one` gathers: a copy of the arena.
    if n == 1 and options.target.platform != "tpu":
        one, ones = xla.read_one(
            q[:, 0], arena, shape, tables, positions[:, 0], layer_offset, options
        )
        out, lse = one[:, None], ones[:, None]
    else:
        out, lse = xla.read(q, arena, shape, tables, positions, layer_offset, options)
    out, arena = in_order(out, arena)
    return out, lse if options.with_lse else None, arena


def schedule(
    lengths: jax.Array,
    q: Any,
    shape: ArenaShape,
    kv_heads: int,
    sliding_window: int | None,
    target: Target,
    batch_invariant: bool,
) -> jax.Array | None:
    """`lumen_kernels.paged_attention.decode_schedule`; q: [rows, n, heads, head_dim]."""
    backend = _backend(q, shape, kv_heads, target)
    if backend is Backend.MOSAIC_GPU:
        return mosaic_gpu.schedule(
            lengths, kv_heads=kv_heads, head_dim=shape.head_dim, tokens=q.shape[1],
            sliding_window=sliding_window, target=target, by_position=batch_invariant,
        )  # fmt: skip
    if backend is Backend.MOSAIC_TPU:
        return mosaic_tpu.schedule(lengths, kv_heads, target)
    return None


def _backend(q: Any, shape: ArenaShape, kv_heads: int, target: Target) -> Backend:
    """Who computes this call: the target's kernel, or XLA for what that does not cover."""
    if target.backend is Backend.MOSAIC_GPU:
        group = q.shape[2] // kv_heads
        if mosaic_gpu.supports(q.dtype, shape, group, q.shape[1]) is None:
            return Backend.MOSAIC_GPU
    elif target.backend is Backend.MOSAIC_TPU and mosaic_tpu_blocks.supports(shape, q.dtype):
        return Backend.MOSAIC_TPU
    return Backend.XLA
