"""Paged attention in plain XLA: the oracle of every backend, and the fallback where none exists.

Reads fold over fixed chunks of context positions in ascending order, so a result does not depend
on who else is in the batch or on how a prompt was cut into chunks, as far as XLA's own products
of equal operands are equal. The trip count is dynamic: no context buckets, no wasted reads.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_TOKENS = 64
"""Context positions folded at a time (a multiple of every block size that divides it)."""

_MASKED = -1e30  # below any score; finite, so that a row without keys stays free of NaN


def write(
    arena: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_bases: jax.Array,
    offsets: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """Store one token's K and V per row, in place if the arena is donated.

    arena [slots, 2, block_size, head_dim]; k, v [rows, kv heads, head_dim]; slot_bases int32
    [rows]: slot of the row's block, of this layer's head 0; offsets int32 [rows]: position in the
    block; valid bool [rows]: others are not stored. Returns the arena.

    The scatter goes through the flat view of the arena: in the natural form XLA on TPU copies the
    whole arena into another layout.
    """
    slots, _, block_size, head_dim = arena.shape
    heads = k.shape[1]
    slot = slot_bases[:, None] + jnp.arange(heads, dtype=jnp.int32)
    row = (slot * 2) * block_size + offsets[:, None]
    rows = jnp.stack([row, row + block_size], axis=2)  # [rows, heads, 2]
    # Distinct and out of range: dropped, and the indices stay unique.
    spare = slots * 2 * block_size + jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
    rows = jnp.where(valid[:, None, None], rows, spare)
    values = jnp.stack([k, v], axis=2).astype(arena.dtype)
    flat = arena.reshape(-1, head_dim)
    flat = flat.at[rows].set(values, mode="drop", unique_indices=True)
    return flat.reshape(arena.shape)


def read_one(
    q: jax.Array,
    arena: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
    heads: int,
    scale: float,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query per row: `read` with tokens = 1 and that dimension left out.

    A block's heads are one contiguous row of the arena here, which XLA on CPU gathers faster than
    single pages, and the products are batched over blocks, so nothing gathered is transposed.
    """
    rows, query_heads, head_dim = q.shape
    block_size = arena.shape[2]
    blocks = max(CHUNK_TOKENS // block_size, 1)
    chunk = blocks * block_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % blocks)))
    tables = (tables + layer_offset) // heads
    precision = _precision(q)
    grouped = q.reshape(rows, heads, -1, head_dim)
    limits = positions[:, None, None, None, None]
    wide = arena.reshape(-1, heads * 2 * block_size * head_dim)
    in_chunk = jnp.arange(chunk, dtype=jnp.int32).reshape(blocks, 1, 1, block_size)

    def fold(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, mass, out = state
        ids = lax.dynamic_slice_in_dim(tables, index * blocks, blocks, axis=1)
        pages = wide.at[ids].get(mode="promise_in_bounds")
        # Gather once: fused into the products it would run once per query head.
        pages = lax.optimization_barrier(pages)
        pages = pages.reshape(rows, blocks, heads, 2, block_size, head_dim)
        scores = jnp.einsum(
            "rhgd,rbhtd->rbhgt", grouped, pages[:, :, :, 0],
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        key_positions = index * chunk + in_chunk
        seen = key_positions <= limits
        if sliding_window is not None:
            seen &= key_positions > limits - sliding_window
        scores = jnp.where(seen, scores * scale, _MASKED)
        higher = jnp.maximum(best, jnp.max(scores, axis=(1, 4)))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None, :, :, None]), 0.0)
        shrink = jnp.exp(best - higher)
        mass = mass * shrink + jnp.sum(weights, axis=(1, 4))
        # Not left to zero weights: what an earlier owner of the block left may be NaN.
        values = jnp.where((key_positions <= limits)[:, :, 0, ..., None], pages[:, :, :, 1], 0)
        part = jnp.einsum(
            "rbhgt,rbhtd->rbhgd", weights.astype(arena.dtype), values,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        part = jnp.sum(part, axis=1)
        return higher, mass, out * shrink[..., None] + part

    shape = (rows, heads, query_heads // heads)
    state = (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    first, last = _chunks(positions, sliding_window, chunk)
    best, mass, out = lax.fori_loop(first, last, fold, state)
    out, lse = _finished(best, mass, out)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, query_heads)


def read(
    q: jax.Array,
    arena: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    layer_offset: jax.Array,
    heads: int,
    scale: float,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries over the arena; what lies behind the last query is not looked at.

    q [rows, tokens, query heads, head_dim]; tables int32 [rows, blocks], slot bases; positions
    int32 [rows, tokens]: each query attends to the positions up to its own, -1 for padding.
    Returns the output, shaped as q (zero for padding), and the natural log-sum-exp of the scaled
    scores, float32 [rows, tokens, query heads] (-inf for padding).
    """
    rows, tokens, query_heads, head_dim = q.shape
    block_size = arena.shape[2]
    group = query_heads // heads
    chunk = max(CHUNK_TOKENS // block_size, 1) * block_size
    blocks = chunk // block_size
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % blocks)))
    precision = _precision(q)
    grouped = q.reshape(rows, tokens, heads, group, head_dim)
    grouped = grouped.transpose(0, 2, 1, 3, 4).reshape(rows, heads, tokens * group, head_dim)
    limits = jnp.repeat(positions, group, axis=1)[:, None, :, None]  # [rows, 1, tokens*group, 1]
    ends = jnp.max(positions, axis=1)[:, None, None, None]
    pages = arena.reshape(-1, block_size, head_dim)
    head_ids = jnp.arange(heads, dtype=jnp.int32)[:, None]

    def fold(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, mass, out = state
        bases = lax.dynamic_slice_in_dim(tables, index * blocks, blocks, axis=1) + layer_offset
        page = (bases[:, None, :] + head_ids) * 2  # [rows, heads, blocks]
        shape = (rows, heads, chunk, head_dim)
        keys = pages.at[page].get(mode="promise_in_bounds").reshape(shape)
        values = pages.at[page + 1].get(mode="promise_in_bounds").reshape(shape)
        scores = jnp.einsum(
            "rhqd,rhtd->rhqt", grouped, keys,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        key_positions = index * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # Not left to zero weights: what an earlier owner of the block left may be NaN.
        values = jnp.where(key_positions[:, None] <= ends, values, 0)
        seen = key_positions <= limits
        if sliding_window is not None:
            seen &= key_positions > limits - sliding_window
        scores = jnp.where(seen, scores * scale, _MASKED)
        higher = jnp.maximum(best, jnp.max(scores, axis=3))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
        shrink = jnp.exp(best - higher)
        mass = mass * shrink + jnp.sum(weights, axis=3)
        part = jnp.einsum(
            "rhqt,rhtd->rhqd", weights.astype(values.dtype), values,
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return higher, mass, out * shrink[..., None] + part

    shape = (rows, heads, tokens * group)
    state = (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    first, last = _chunks(positions, sliding_window, chunk)
    best, mass, out = lax.fori_loop(first, last, fold, state)
    out, lse = _finished(best, mass, out)
    out = out.reshape(rows, heads, tokens, group, head_dim).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(rows, heads, tokens, group).transpose(0, 2, 1, 3)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(rows, tokens, query_heads)


def _precision(x: jax.Array) -> lax.Precision:
    """float32 products are float32 products, also where the hardware prefers less."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


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
