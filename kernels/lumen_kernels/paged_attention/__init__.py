"""Paged attention: write new K and V into the arena and attend to everything there.

The arena of a device is `[slots, 2, block_size, head_dim]`: a slot holds the K page and the V page
of one block, one layer, one KV head. Block tables hold *slot bases*; layer l, head h of a block is
slot `base + l * heads + h`, with `heads` the KV heads of the device. `layer_offset` is
`l * heads`; it is traced, so one compiled program serves every layer. Slot bases are multiples
of `heads`.

The write belongs to the operation, so that a backend can fuse it. Every backend keeps a donated
arena in place. Today there is one backend, plain XLA, for every platform.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.paged_attention import xla

__all__ = ["decode", "prefill"]


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    arena: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    layer_offset: jax.Array,
    *,
    platform: str,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One new token per sequence.

    q [rows, query heads, head_dim]; k, v [rows, kv heads, head_dim]: of the token at position
    lengths - 1; tables int32 [rows, blocks]; lengths int32 [rows]: tokens including the new one,
    0 for a padding row, which writes nothing and gets zeros. platform: of the mesh this is traced
    for ("cpu", "gpu", "tpu"). Query head i attends to KV head i // (query heads / kv heads).

    Returns the output, shaped as q; the natural log-sum-exp of the scaled scores, float32
    [rows, query heads]; and the arena.
    """
    positions = lengths - 1
    arena = _write(k[:, None], v[:, None], arena, tables, positions[:, None], layer_offset)
    heads = k.shape[1]
    rest = (layer_offset, heads, scale, sliding_window)
    if platform == "tpu":
        # The wider rows that `read_one` gathers have another tiling there: a copy of the arena.
        outs, lses = xla.read(q[:, None], arena, tables, positions[:, None], *rest)
        out, lse = outs[:, 0], lses[:, 0]
    else:
        out, lse = xla.read_one(q, arena, tables, positions, *rest)
    out, arena = _in_order(out, arena)
    return out, lse, arena


def prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    arena: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    *,
    platform: str,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Consecutive new tokens of several sequences, each with a prefix in the arena; causal.

    q [rows, tokens, query heads, head_dim]; k, v [rows, tokens, kv heads, head_dim]; tables int32
    [rows, blocks]; starts int32 [rows]: position of the first new token; counts int32 [rows]: new
    tokens of the row, the rest is padding. Otherwise as `decode`; the log-sum-exp is float32
    [rows, tokens, query heads], -inf for padding.
    """
    del platform  # one backend so far
    steps = jnp.arange(k.shape[1], dtype=jnp.int32)
    positions = jnp.where(steps < counts[:, None], starts[:, None] + steps, -1)
    arena = _write(k, v, arena, tables, positions, layer_offset)
    heads = k.shape[2]
    out, lse = xla.read(q, arena, tables, positions, layer_offset, heads, scale, sliding_window)
    out, arena = _in_order(out, arena)
    return out, lse, arena


def _write(
    k: jax.Array,
    v: jax.Array,
    arena: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
) -> jax.Array:
    """Store k, v [rows, tokens, kv heads, head_dim] at positions [rows, tokens], -1 nowhere."""
    _, _, heads, head_dim = k.shape
    block_size = arena.shape[2]
    valid = positions >= 0
    at = jnp.maximum(positions, 0)
    bases = jnp.take_along_axis(tables, at // block_size, axis=1) + layer_offset
    return xla.write(
        arena,
        k.reshape(-1, heads, head_dim),
        v.reshape(-1, heads, head_dim),
        bases.reshape(-1),
        (at % block_size).reshape(-1),
        valid.reshape(-1),
    )


def _in_order(out: jax.Array, arena: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keep the next layer's write behind this layer's reads.

    Otherwise XLA on CPU moves the write forward and copies the arena to make that legal.
    """
    out, arena = lax.optimization_barrier((out, arena))
    return out, arena
