"""Decode attention in Mosaic TPU: an item per row of the batch, the new token's write fused in."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape
from lumen_kernels.paged_attention.mosaic_tpu_blocks import Blocks, decode_blocks
from lumen_kernels.paged_attention.mosaic_tpu_kernel import Interpret, Items, attend, packed_tokens
from lumen_kernels.paged_attention.options import Arena, Options
from lumen_kernels.paged_attention.streams import write_at
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
    schedule: jax.Array | None = None,
    *,
    blocks: Blocks | None = None,
    interpret: Interpret | None = None,
    bounds_checks: bool = False,
) -> tuple[jax.Array, jax.Array | None, Arena]:
    """`lumen_kernels.paged_attention.decode` with checked arguments, q always [rows, n, ...].

    schedule: `schedule` of the same lengths. blocks: instead of `decode_blocks`. interpret: None:
    as the target says. bounds_checks: have the chip check every transfer, at two to four times
    the cost of starting it.
    """
    rows, n, query_heads, head_dim = q.shape
    heads = options.kv_heads
    group = query_heads // heads
    if blocks is None:
        blocks = decode_blocks(shape, q.dtype, query_heads, heads, n, tables.shape, options.target)
    if k is not None and v is not None and n > 1:
        positions = lengths[:, None] - n + jnp.arange(n, dtype=jnp.int32)
        arena = write_at(
            k.reshape(-1, heads, head_dim), v.reshape(-1, heads, head_dim), arena,
            shape.block_size, tables, jnp.repeat(jnp.arange(rows, dtype=jnp.int32), n),
            positions.reshape(-1), layer_offset, options.target,
        )  # fmt: skip
        k = v = None
    order = schedule
    if order is None and blocks.item_groups > 1:
        order = _order(lengths, blocks.item_groups)
    spare = -rows % blocks.item_groups

    def dealt(per_row: jax.Array) -> jax.Array:
        """In the cores' order, with empty items behind."""
        per_row = per_row if order is None else per_row[order]
        return jnp.pad(per_row, ((0, spare), *((0, 0),) * (per_row.ndim - 1)))

    grouped = q.reshape(rows, n, heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, heads, group * n, head_dim)
    if shape.packed:
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, head_dim)))
    new_kv = None
    if k is not None and v is not None:
        new_kv = dealt(packed_tokens(k[:, 0], v[:, 0], shape))
    ends = dealt(lengths)
    items = Items(dealt(jnp.arange(rows, dtype=jnp.int32)), ends - n, ends)
    out, lse, arena = attend(
        dealt(grouped), new_kv, arena, shape, tables, items, layer_offset, options, blocks,
        operation="decode", unrolled=True, interpret=interpret,
        bounds_checks=bounds_checks,
    )  # fmt: skip
    if order is not None:
        back = jnp.argsort(order)
        out, lse = out[back], None if lse is None else lse[back]
    out = out.reshape(rows, heads, group, n, head_dim).transpose(0, 3, 1, 2, 4)
    if lse is not None:
        lse = lse.reshape(rows, heads, group, n).transpose(0, 3, 1, 2).reshape(q.shape[:3])
    return out.reshape(q.shape), lse, arena


def schedule(lengths: jax.Array, kv_heads: int, target: Target) -> jax.Array | None:
    """`lumen_kernels.paged_attention.decode_schedule`: in which order rows are dealt to cores.

    int32 [rows]; None where cores share the heads, or there is one: then all have equal work.
    """
    return _order(lengths, target.cores) if kv_heads % target.cores else None


def _order(lengths: jax.Array, item_groups: int) -> jax.Array:
    """Longest first, dealt forwards and backwards in turn, as teams are picked in a schoolyard."""
    rows = lengths.shape[0]
    whole = rows // item_groups * item_groups
    order = jnp.argsort(-lengths).astype(jnp.int32)
    hands = order[:whole].reshape(-1, item_groups)
    backwards = jnp.arange(hands.shape[0])[:, None] % 2 == 1
    dealt = jnp.where(backwards, hands[:, ::-1], hands).reshape(-1)
    return jnp.concatenate([dealt, order[whole:]])
