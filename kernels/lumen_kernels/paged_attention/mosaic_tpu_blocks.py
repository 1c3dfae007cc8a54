"""Block sizes of the Mosaic TPU attention kernels, by formula from shapes and generation.

Numbers come from the schedules that the compiler emits (bundles per chunk and what they are used
for) and from the bandwidths of the chips: nothing has run on a TPU.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from lumen_kernels.arena import PACKED_HEAD_DIM, ArenaShape
from lumen_kernels.target import Target

LANES = 128
"""Width of a vector register: rows of an arena are whole multiples of it."""

_MIB = 2**20

_VMEM = {
    "TPU v5 lite": 64 * _MIB,  # of 128
    "TPU v5": 48 * _MIB,  # of 64
    "TPU v6 lite": 64 * _MIB,  # of 128
    "TPU7x": 48 * _MIB,  # of 64
}
"""Vector memory a kernel may take; the rest is left to XLA, which reads weights ahead into it."""

_LEAST_VMEM = 15 * _MIB
"""Of the 16 MiB of a TPU v4; taken for kinds that are not known, too."""

_MOST_HEADS = 8
"""KV heads of one grid step. Decode unrolls over them."""

_DECODE_CHUNK_BYTES = {"TPU7x": 2 * _MIB}
"""Bytes of a chunk, 1 MiB elsewhere: long enough a transfer to hide the latency of the one before.
A TPU7x moves them in half the time, and takes 15 % fewer bundles per byte for longer ones."""

_PREFILL_CHUNK = 512
"""Keys of a chunk. Twice as many gain 14 % on v6e and TPU7x and nothing elsewhere, but lose more
than that below 4,096 tokens, where most of the last chunk lies behind the diagonal."""

_PREFILL_ROWS = 512
"""Query rows of an item: they share one read of K and V, so that a v6e is not bound by that."""

_MOST_TILE = 256
"""Query tokens of an item, where few heads share a KV head: short rows pad less."""

_PASS_ROWS = 512
"""Query rows of one product: 98 % of the bundles of a v5e and v5p keep their matrix units busy,
and 55 % of those of a v6e and TPU7x, whose units are wider."""

_MOST_TABLE_BYTES = 900_000
"""Of a table in scalar memory, which holds 1 MiB; the items take some."""

MOST_COLUMNS = 56_000
"""Of a wider table. Its rows come to scalar memory in threes, which take the room of four."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a kernel cuts its work.

    head_groups, item_groups: the leading grid dimension cuts the KV heads, or deals the items to
    so many cores; one of the two is 1. chunk_tokens: keys per step, a multiple of the block size
    and of 128. Sums are folded chunk by chunk, so it decides the last bits. tile_tokens: query
    tokens of an item. pass_rows: query rows of one product, a multiple of tile_tokens.
    table_in_smem: prefetch the whole block table; else its rows come when they are needed.
    """

    head_groups: int
    item_groups: int
    chunk_tokens: int
    tile_tokens: int
    pass_rows: int
    table_in_smem: bool
    vmem_limit_bytes: int


def supports(shape: ArenaShape, dtype: DTypeLike) -> bool:
    """Whether the kernels take such an arena: bfloat16 or float32 in rows of whole 128 lanes."""
    _, block_size, width = shape.page_shape
    packed = not shape.packed or shape.head_dim == PACKED_HEAD_DIM
    known = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
    return known and packed and width % LANES == 0 and block_size in (16, 32, 64, 128)


def decode_blocks(
    shape: ArenaShape,
    dtype: DTypeLike,
    query_heads: int,
    kv_heads: int,
    tokens: int,
    table_shape: tuple[int, ...],
    target: Target,
) -> Blocks:
    """For decode of `tokens` query tokens per row, with tables of table_shape."""
    heads, head_groups, item_groups = _cut(kv_heads, target.cores)
    chunk_bytes = _DECODE_CHUNK_BYTES.get(target.kind, _MIB)
    # Narrow enough for short contexts, of which the last chunk is wasted work; wide enough for
    # what a chunk costs whatever its size.
    chunk = min(max(_power_of_two(chunk_bytes // _token_bytes(shape, dtype, heads)), 256), 1024)
    pass_rows = _pass_rows(query_heads // kv_heads, tokens)
    in_smem = _in_smem(table_shape)
    blocks = Blocks(head_groups, item_groups, chunk, tokens, pass_rows, in_smem, 0)
    return _fitted(blocks, shape, dtype, heads, query_heads // kv_heads, target, least_tile=tokens)


def prefill_blocks(
    shape: ArenaShape,
    dtype: DTypeLike,
    query_heads: int,
    kv_heads: int,
    tokens: int,
    table_shape: tuple[int, ...],
    target: Target,
) -> Blocks:
    """For prefill of a stream of `tokens` of table_shape[0] rows."""
    heads, head_groups, item_groups = _cut(kv_heads, target.cores)
    group = query_heads // kv_heads
    # Every row may end in a tile of one token: with this, tiles are at most twice the stream.
    per_row = max(_power_of_two(tokens // max(table_shape[0], 1)), 16)
    tile = min(_power_of_two(_PREFILL_ROWS // group), _MOST_TILE, per_row)
    pass_rows = _pass_rows(group, tile)
    blocks = Blocks(
        head_groups, item_groups, _PREFILL_CHUNK, tile, pass_rows, _in_smem(table_shape), 0
    )
    return _fitted(blocks, shape, dtype, heads, group, target, least_tile=16)


def _cut(kv_heads: int, cores: int) -> tuple[int, int, int]:
    """KV heads per step, head groups and item groups."""
    if kv_heads % cores:  # one head, mostly: the cores share the items instead
        return kv_heads, 1, cores
    per_core = kv_heads // cores
    heads = max(h for h in range(1, min(per_core, _MOST_HEADS) + 1) if per_core % h == 0)
    return heads, kv_heads // heads, 1


def _fitted(
    blocks: Blocks,
    shape: ArenaShape,
    dtype: DTypeLike,
    heads: int,
    group: int,
    target: Target,
    *,
    least_tile: int,
) -> Blocks:
    """Halve chunk and tile until buffers and temporaries fit the vector memory."""
    room = _VMEM.get(target.kind, _LEAST_VMEM)
    while (need := _vmem_bytes(blocks, shape, dtype, heads, group)) > room:
        half = blocks.chunk_tokens // 2
        if half >= max(shape.block_size, 256):
            blocks = replace(blocks, chunk_tokens=half)
        elif blocks.tile_tokens > least_tile:
            tile = blocks.tile_tokens // 2
            pass_rows = _pass_rows(group, tile)
            blocks = replace(blocks, tile_tokens=tile, pass_rows=pass_rows)
        elif half >= LANES:
            blocks = replace(blocks, chunk_tokens=half)
        else:
            break
    return replace(blocks, vmem_limit_bytes=min(max(need * 5 // 4, 16 * _MIB), room + _MIB))


def _vmem_bytes(blocks: Blocks, shape: ArenaShape, dtype: DTypeLike, heads: int, group: int) -> int:
    item = jnp.dtype(dtype).itemsize
    width = shape.page_shape[2]
    rows = -(-group * blocks.tile_tokens // 16) * 16
    pages = 2 * blocks.chunk_tokens * _token_bytes(shape, dtype, heads)
    queries = heads * rows * (4 * width * item + 2 * LANES * 4)  # in, out and lse, twice each
    state = heads * rows * (2 * LANES + width) * 4
    in_a_pass = max(blocks.pass_rows, 16) * blocks.chunk_tokens * (3 * 4 + item)
    return pages + queries + state + in_a_pass + 2 * blocks.chunk_tokens * width * item


def _token_bytes(shape: ArenaShape, dtype: DTypeLike, heads: int) -> int:
    pages, _, width = shape.page_shape
    return heads * pages * width * jnp.dtype(dtype).itemsize


def _pass_rows(group: int, tile: int) -> int:
    """The most rows, up to the limit, that are whole tiles and divide an item's rows."""
    most = max(_PASS_ROWS // tile, 1)
    return tile * max(g for g in range(1, min(group, most) + 1) if group % g == 0)


def _in_smem(table_shape: tuple[int, ...]) -> bool:
    return table_shape[0] * table_shape[1] * 4 <= _MOST_TABLE_BYTES


def _power_of_two(value: int) -> int:
    """The largest power of two up to value, at least 1."""
    return 1 << max(value.bit_length() - 1, 0)
