"""Decode attention: one or a few new tokens per sequence, over everything before them."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention import xla
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.streams import in_order, write_at
from lumen_kernels.target import Target


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
    del schedule
    n = q.shape[1]
    positions = lengths[:, None] - n + jnp.arange(n, dtype=jnp.int32)
    if k is not None and v is not None:
        rows = jnp.repeat(jnp.arange(q.shape[0], dtype=jnp.int32), n)
        arena = write_at(
            k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]), arena, shape.block_size,
            tables, rows, positions.reshape(-1), layer_offset, options.target,
        )  # fmt: skip
    # A TPU has another tiling for the wider rows that `read_one` gathers: a copy of the arena.
    if n == 1 and options.target.platform != "tpu":
        out, lse = xla.read_one(
            q[:, 0], arena, shape, tables, positions[:, 0], layer_offset, options
        )
        out, lse = out[:, None], lse[:, None]
    else:
        out, lse = xla.read(q, arena, shape, tables, positions, layer_offset, options)
    out, arena = in_order(out, arena)
    return out, lse if options.with_lse else None, arena


def schedule(
    lengths: jax.Array,
    block_size: int,
    kv_heads: int,
    sliding_window: int | None,
    target: Target,
) -> jax.Array | None:
    """`lumen_kernels.paged_attention.decode_schedule`."""
    del lengths, block_size, kv_heads, sliding_window, target
    return None
