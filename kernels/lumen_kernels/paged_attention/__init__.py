"""Paged attention: write new K and V into the arena and attend to everything there.

Arena, slots and block tables: `lumen_kernels.arena`. `layer_offset` is l * kv_heads for layer l;
it is traced, so one compiled program serves every layer. The write belongs to the operation, so
that a backend can fuse it. Every backend keeps a donated arena in place, reads nothing beyond a
row's context, whatever lies there, and does not follow table columns past a row's last block.
"""

from collections.abc import Sequence
from typing import Any

import jax

from lumen_kernels.arena import arena_shape
from lumen_kernels.paged_attention import decode as _decode
from lumen_kernels.paged_attention import prefill as _prefill
from lumen_kernels.paged_attention.options import Arena, Options, check_options, checked
from lumen_kernels.target import Target

__all__ = ["decode", "decode_schedule", "prefill", "prefill_schedule"]


def decode(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    arena: Sequence[jax.Array],
    tables: jax.Array,
    lengths: jax.Array,
    layer_offset: jax.Array,
    *,
    target: Target,
    scale: float,
    kv_heads: int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    with_lse: bool = False,
    batch_invariant: bool = False,
    schedule: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """One or a few new tokens per sequence.

    q [rows, query heads, head_dim], or [rows, n, query heads, head_dim] for n tokens per row;
    k, v alike with kv heads: what is written, or None (then kv_heads says how many there are):
    only read. arena: its segments. tables int32 [rows, blocks]: slot bases. lengths int32 [rows]:
    tokens in the context with the new ones, 0 for a padding row, which writes nothing. Token i of
    n stands at position lengths - n + i; where that is negative it is padding. Query head i
    attends to KV head i // (query heads / kv heads). batch_invariant: a row has the same bits in
    any batch; XLA and TPUs keep that anyway. schedule: `decode_schedule` of the same lengths and
    the same `batch_invariant`, made once for all layers; without it each call makes its own.

    Returns the output, shaped as q (zeros for padding); with_lse: the natural log-sum-exp of the
    scores, float32, shaped as q without head_dim (-inf for padding), else None; and the arena.
    Raises KernelArgumentError.
    """
    several = q if q.ndim == 4 else q[:, None]
    pair = tuple(x if x is None or x.ndim == 4 else x[:, None] for x in (k, v))
    new_kv = (pair[0], pair[1])
    per_row = {"lengths": lengths}
    shape, heads = checked("decode", several, new_kv, arena, tables, per_row, kv_heads)
    options = Options(heads, scale, sliding_window, soft_cap, with_lse, target, batch_invariant)
    check_options("decode", options)
    out, lse, arena = _decode.attend_and_write(
        several, *new_kv, tuple(arena), shape, tables, lengths, layer_offset, options, schedule
    )
    if q.ndim == 3:
        out, lse = out[:, 0], None if lse is None else lse[:, 0]
    return out, lse, arena


def prefill(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    arena: Sequence[jax.Array],
    tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer_offset: jax.Array,
    *,
    target: Target,
    scale: float,
    kv_heads: int | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    with_lse: bool = False,
    schedule: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """Consecutive new tokens of several sequences, each with a prefix in the arena; causal.

    q [tokens, query heads, head_dim]; k, v [tokens, kv heads, head_dim]: the rows' tokens one row
    behind the other, the rest is padding. tables int32 [rows, blocks]; starts int32 [rows]:
    position of a row's first new token; counts int32 [rows]: new tokens of the row. schedule:
    `prefill_schedule` of the same starts and counts, made once for all layers. Otherwise as
    `decode`.
    """
    per_row = {"starts": starts, "counts": counts}
    shape, heads = checked("prefill", q, (k, v), arena, tables, per_row, kv_heads)
    options = Options(heads, scale, sliding_window, soft_cap, with_lse, target)
    check_options("prefill", options)
    return _prefill.attend_and_write(
        q, k, v, tuple(arena), shape, tables, starts, counts, layer_offset, options, schedule
    )


def decode_schedule(
    lengths: jax.Array,
    q: Any,
    arena: Sequence[Any],
    *,
    kv_heads: int,
    target: Target,
    sliding_window: int | None = None,
    batch_invariant: bool = False,
) -> jax.Array | None:
    """How a decode step's work is cut over the chip: the same for all layers of a step.

    lengths int32 [rows], as `decode` takes them; q, arena: arrays or shape structs like those of
    the `decode` calls that it is for. None where the backend needs no such thing. Calls that
    share a schedule run one behind the other, as layers do: a GPU counts in it and leaves it as
    it was. Raises KernelArgumentError.
    """
    shape = arena_shape("decode_schedule", arena, q.shape[-1])
    like = q if q.ndim == 4 else jax.ShapeDtypeStruct((q.shape[0], 1, *q.shape[1:]), q.dtype)
    return _decode.schedule(lengths, like, shape, kv_heads, sliding_window, target, batch_invariant)


def prefill_schedule(
    starts: jax.Array,
    counts: jax.Array,
    q: Any,
    arena: Sequence[Any],
    *,
    kv_heads: int,
    target: Target,
    sliding_window: int | None = None,
) -> jax.Array | None:
    """How the work of a prefill call is cut over the chip: the same for all layers of a step.

    starts, counts int32 [rows], as `prefill` takes them; q, arena: arrays or shape structs like
    those of the `prefill` calls that it is for. None where the backend needs no such thing, or
    makes it for each layer. Raises KernelArgumentError.
    """
    shape = arena_shape("prefill_schedule", arena, q.shape[-1])
    options = Options(kv_heads, 1.0, sliding_window, None, False, target)
    return _prefill.schedule(starts, counts, q, shape, options)
