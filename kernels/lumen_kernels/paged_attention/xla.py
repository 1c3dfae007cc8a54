"""Attention over the arena in plain XLA: the oracle of every backend, the fallback of some.

Reads fold over fixed chunks of context positions in ascending order, so a result does not depend
on who else is in the batch or on how a prompt was cut into chunks, as far as XLA's own products
of equal operands are equal. The trip count is dynamic: no context buckets, no wasted reads.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.arena import ArenaShape, segment_of
from lumen_kernels.paged_attention.options import Arena, Options

CHUNK_TOKENS = 64
"""Context positions folded at a time (a multiple of every block size that divides it)."""

_MASKED = -1e30  # below any score; finite, so that a row without keys stays free of NaN

_State = tuple[jax.Array, jax.Array, jax.Array]


def read_one(
    q: jax.Array,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query per row: `read` with tokens = 1 and that dimension left out.

    A block's heads are one contiguous row of the arena here, which XLA on CPU gathers faster than
    single pages, and the products are batched over blocks, so nothing gathered is transposed.
    """
    rows, query_heads, head_dim = q.shape
    heads = options.kv_heads
    block_size = shape.block_size
    blocks = max(CHUNK_TOKENS // block_size, 1)
    chunk = blocks * block_size
    tables = _whole_chunks(tables, blocks, layer_offset, shape, heads)
    precision = _precision(q)
    grouped = q.reshape(rows, heads, -1, head_dim)
    limits = positions[:, None, None, None, None]
    pages_of = _wide_pages(arena, shape, heads)
    in_chunk = jnp.arange(chunk, dtype=jnp.int32).reshape(blocks, 1, 1, block_size)

    def fold(index: jax.Array, state: _State) -> _State:
        best, mass, out = state
        keys, values = pages_of(lax.dynamic_slice_in_dim(tables, index * blocks, blocks, axis=1))
        scores = jnp.einsum(
            "rhgd,rbhtd->rbhgt", grouped, keys,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        key_positions = index * chunk + in_chunk
        seen = _seen(key_positions, limits, options)
        scores = jnp.where(seen, _scaled(scores, options), _MASKED)
        higher = jnp.maximum(best, jnp.max(scores, axis=(1, 4)))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None, :, :, None]), 0.0)
        shrink = jnp.exp(best - higher)
        mass = mass * shrink + jnp.sum(weights, axis=(1, 4))
        # Not left to zero weights: what an earlier owner of the block left may be NaN.
        values = jnp.where((key_positions <= limits)[:, :, 0, ..., None], values, 0)
        part = jnp.einsum(
            "rbhgt,rbhtd->rbhgd", weights.astype(values.dtype), values,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        part = jnp.sum(part, axis=1)
        return higher, mass, out * shrink[..., None] + part

    state = _nothing((rows, heads, query_heads // heads), head_dim)
    first, last = _chunks(positions, options.sliding_window, chunk)
    out, lse = _finished(*lax.fori_loop(first, last, fold, state))
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, query_heads)


def read(
    q: jax.Array,
    arena: Arena,
    shape: ArenaShape,
    tables: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries over the arena; what lies behind the last query is not looked at.

    q [rows, tokens, query heads, head_dim]; tables int32 [rows, blocks], slot bases; positions
    int32 [rows, tokens]: each query attends to the positions up to its own, -1 for padding.
    Returns the output, shaped as q (zero for padding), and the natural log-sum-exp of the scaled
    scores, float32 [rows, tokens, query heads] (-inf for padding).
    """
    rows, tokens, query_heads, head_dim = q.shape
    heads = options.kv_heads
    group = query_heads // heads
    blocks = max(CHUNK_TOKENS // shape.block_size, 1)
    chunk = blocks * shape.block_size
    tables = _whole_chunks(tables, blocks, layer_offset, shape, heads)
    precision = _precision(q)
    grouped = q.reshape(rows, tokens, heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(rows, heads, tokens * group, head_dim)
    limits = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [rows, 1, tokens*group, 1]
    ends = jnp.max(positions, axis=1)[:, None, None, None]
    pages_of = _pages(arena, shape, heads)

    def fold(index: jax.Array, state: _State) -> _State:
        best, mass, out = state
        keys, values = pages_of(lax.dynamic_slice_in_dim(tables, index * blocks, blocks, axis=1))
        scores = jnp.einsum(
            "rhqd,rhtd->rhqt", grouped, keys,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        key_positions = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # Not left to zero weights: what an earlier owner of the block left may be NaN.
        values = jnp.where(key_positions[:, None] <= ends, values, 0)
        seen = _seen(key_positions, limits, options)
        scores = jnp.where(seen, _scaled(scores, options), _MASKED)
        higher = jnp.maximum(best, jnp.max(scores, axis=3))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(best - higher)
        mass = mass * shrink + jnp.sum(weights, axis=3)
        part = jnp.einsum(
            "rhqt,rhtd->rhqd", weights.astype(values.dtype), values,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return higher, mass, out * shrink[..., None] + part

    state = _nothing((rows, heads, tokens * group), head_dim)
    first, last = _chunks(positions, options.sliding_window, chunk)
    out, lse = _finished(*lax.fori_loop(first, last, fold, state))
    out = out.reshape(rows, heads, tokens, group, head_dim).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(rows, heads, tokens, group).transpose(0, 2, 1, 3)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, tokens, query_heads)


def _whole_chunks(
    tables: jax.Array, blocks: int, layer_offset: jax.Array, shape: ArenaShape, heads: int
) -> jax.Array:
    """Slots of head 0 in this layer, int32 [rows, a multiple of `blocks`], all of them real."""
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % blocks)))
    # Clamped before the sum: columns past the last block may hold anything.
    last = sum(shape.slots) - heads
    return jnp.clip(jnp.clip(tables, 0, last) + layer_offset, 0, last)


_PagesOf = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Slots of head 0, int32 [rows, blocks], to the keys and values of those blocks."""


def _wide_pages(arena: Arena, shape: ArenaShape, heads: int) -> _PagesOf:
    """Keys and values as [rows, blocks, heads, block_size, head_dim]."""
    block_size, head_dim = shape.block_size, shape.head_dim
    wide = [segment.reshape(-1, heads * 2 * block_size * head_dim) for segment in arena]

    def pages_of(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = _selected(wide, shape, slots, heads)
        # Gather once: fused into the products it would run once per query head.
        pages = lax.optimization_barrier(pages)
        if shape.packed:
            pages = pages.reshape(*slots.shape, heads, block_size, 2 * head_dim)
            return pages[..., :head_dim], pages[..., head_dim:]
        pages = pages.reshape(*slots.shape, heads, 2, block_size, head_dim)
        return pages[:, :, :, 0], pages[:, :, :, 1]

    return pages_of


def _pages(arena: Arena, shape: ArenaShape, heads: int) -> _PagesOf:
    """Keys and values as [rows, heads, blocks * block_size, head_dim]."""
    block_size, head_dim = shape.block_size, shape.head_dim
    head_ids = jnp.arange(heads, dtype=jnp.int32)[:, None]

    def pages_of(slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, blocks = slots.shape
        ids = slots[:, None, :] + head_ids  # [rows, heads, blocks]
        kv_shape = (rows, heads, blocks * block_size, head_dim)
        if shape.packed:
            rows_of_lanes = [segment.reshape(-1, block_size, 2 * head_dim) for segment in arena]
            both = _selected(rows_of_lanes, shape, ids, 1)
            return (
                both[..., :head_dim].reshape(kv_shape),
                both[..., head_dim:].reshape(kv_shape),
            )
        halves = [segment.reshape(-1, block_size, head_dim) for segment in arena]
        keys, values = (_selected(halves, shape, ids, 1, (2, half)) for half in range(2))
        return keys.reshape(kv_shape), values.reshape(kv_shape)

    return pages_of


def _selected(
    segments: list[jax.Array],
    shape: ArenaShape,
    slots: jax.Array,
    slots_per_row: int,
    row: tuple[int, int] = (1, 0),
) -> jax.Array:
    """Rows of the segment each slot lies in. row: (rows per slot, which of them)."""
    found: jax.Array | None = None
    for segment, (inside, local) in zip(segments, segment_of(shape, slots), strict=True):
        index = local // slots_per_row * row[0] + row[1]
        rows = segment.at[index].get(mode="promise_in_bounds")
        wanted = inside.reshape(*inside.shape, *(1,) * (rows.ndim - inside.ndim))
        found = rows if found is None else jnp.where(wanted, rows, found)
    assert found is not None
    return found


def _seen(key_positions: jax.Array, limits: jax.Array, options: Options) -> jax.Array:
    seen = key_positions <= limits
    if options.sliding_window is not None:
        seen &= key_positions > limits - options.sliding_window
    return seen


def _scaled(scores: jax.Array, options: Options) -> jax.Array:
    scores = scores * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    return scores


def _precision(x: jax.Array) -> lax.Precision:
    """float32 products are float32 products, also where the hardware prefers less."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def _nothing(shape: tuple[int, ...], head_dim: int) -> _State:
    return (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )


def _chunks(
    positions: jax.Array, sliding_window: int | None, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """First chunk that some query sees, and one past the last."""
    last = (jnp.max(positions) + chunk) // chunk
    if sliding_window is None:
        return jnp.zeros_like(last), last
    earliest = jnp.min(jnp.where(positions < 0, 2**31 - 1, positions))
    return jnp.maximum(earliest - (sliding_window - 1), 0) // chunk, last


def _finished(best: jax.Array, mass: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normalised output and log-sum-exp; zeros and -inf where nothing was seen."""
    some = jnp.where(mass > 0, mass, 1.0)
    return out / some[..., None], jnp.where(mass > 0, best + jnp.log(some), -math.inf)
