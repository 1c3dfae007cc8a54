"""Rotation and KV write on NVIDIA Hopper (Pallas Mosaic GPU): registers only, a block per token.

A decoding step has few tokens, and then the time is that of a launch, one load and one store: all
loads of a token are issued before anything is computed, and nothing goes through shared memory.
Many tokens are as many blocks, some of which share a core and hide each other's loads.

A token's heads are the rows of two arrays, their first and their second halves: the partners of a
rotation then sit in the same registers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.rotary_write.xla import Projections
from lumen_kernels.target import Target

_THREADS = 128
_WARP = 32
_WARPS = 4
_WIDEST = 8  # elements of one load: 16 bytes
_MOST_COLUMNS = 16_384  # of a token: 128 in each thread's registers


def supports(shape: ArenaShape, columns: int, dtype: Any) -> bool:
    """Whether this kernel can write such an arena from projections of so many columns."""
    fits = shape.head_dim in (64, 128, 256) and columns <= _MOST_COLUMNS
    return bool(dtype == jnp.bfloat16) and fits


def write(
    projections: Projections,
    rotation: jax.Array,
    arena: tuple[jax.Array, ...],
    places: jax.Array,
    layer_offset: jax.Array,
    shape: ArenaShape,
    kv_heads: int,
    eps: float,
    target: Target,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """See `lumen_kernels.rotary_write.write`; layer_offset int32."""
    fused, bias, norms = projections
    tokens, head_dim = fused.shape[0], shape.head_dim
    heads = fused.shape[1] // head_dim
    q_heads, half = heads - 2 * kv_heads, head_dim // 2
    halves = (pl.ds(0, half), pl.ds(half, half))
    turned = {"q": pl.ds(0, q_heads), "k": pl.ds(q_heads, kv_heads)}
    # One layout for both: equal loads become one, which then has one layout.
    layout = _layout(math.gcd(q_heads, kv_heads), half)
    v_rows, v_layout = pl.ds(q_heads + kv_heads, kv_heads), _layout(kv_heads, head_dim)
    given = {
        "fused": fused.reshape(tokens, heads, head_dim),
        "rotation": rotation,
        "places": places,
    }
    given["layer"] = layer_offset.reshape(1)
    if bias is not None:
        given["bias"] = bias.reshape(heads, head_dim)
    if norms is not None:
        given["norms"] = norms

    def body(*refs: Any) -> None:
        names = dict(zip([*given, "q"], [*refs[: len(given)], refs[-1]], strict=True))
        segments = refs[len(given) : -1]
        token = lax.axis_index("token")

        def loaded(rows: Any, columns: Any, layout: Any) -> jax.Array:
            """Of the token's projections."""
            part = _load(names["fused"].at[token, rows, columns], layout)
            if bias is None:
                return part
            added = _load(names["bias"].at[rows, columns], layout)
            return (part.astype(jnp.float32) + added).astype(part.dtype)

        parts = {
            name: [loaded(rows, columns, layout) for columns in halves]
            for name, rows in turned.items()
        }
        v = loaded(v_rows, pl.ds(0, head_dim), v_layout)
        rotation = [_load(names["rotation"].at[token, half], layout, row=True) for half in halves]
        slot, offset = names["places"][0, token], names["places"][1, token]
        stored, slot = slot >= 0, slot + names["layer"][0]
        for index, name in enumerate(turned):
            first, second = (part.astype(jnp.float32) for part in parts[name])
            if norms is not None:
                weights = [
                    _load(names["norms"].at[index, half], layout, row=True) for half in halves
                ]
                first, second = _normed(first, second, weights, head_dim, eps, fused.dtype)
            cos, sin = (lax.broadcast_in_dim(one, first.shape, (1,)) for one in rotation)
            rotated = first * cos - second * sin, second * cos + first * sin
            parts[name] = [one.astype(fused.dtype) for one in rotated]
        for columns, value in zip(halves, parts["q"], strict=True):
            names["q"].at[token, :, columns][...] = value
        for segment, begin, size in zip(segments, shape.first_slots, shape.slots, strict=True):

            @pl.when(stored & (slot >= begin) & (slot < begin + size))
            def _(segment: Any = segment, slot: jax.Array = slot - begin) -> None:
                rows = segment.at[pl.ds(slot, kv_heads)]
                for columns, value in zip(halves, parts["k"], strict=True):
                    rows.at[:, 0, offset, columns][...] = value
                if shape.packed:
                    rows.at[:, 0, offset, pl.ds(head_dim, head_dim)][...] = v
                else:
                    rows.at[:, 1, offset][...] = v

    refs = [jax.new_ref(segment) for segment in arena]
    q = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, q_heads, head_dim), fused.dtype),
        grid=(tokens,),
        grid_names=("token",),
        interpret=plgpu.InterpretGPUParams() if target.interpret else None,
        kernel_name="rotary_write",
    )(*given.values(), *refs)
    return q, tuple(jax.freeze(ref) for ref in refs)


def _load(ref: Any, layout: Any, *, row: bool = False) -> jax.Array:
    """All of ref, [rows, columns]; or with row: [columns], for every row."""
    loaded: jax.Array = plgpu.load(ref, layout=layout.reduce(0) if row else layout, optimized=False)
    return loaded


def _normed(
    first: jax.Array,
    second: jax.Array,
    weights: list[jax.Array],
    head_dim: int,
    eps: float,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """RMS norm of rows in two halves, rounded to dtype and wide again."""
    squares = jnp.sum(first * first + second * second, axis=1)
    scale = lax.broadcast_in_dim(lax.rsqrt(squares / head_dim + eps), first.shape, (0,))
    first, second = (
        (half * scale * lax.broadcast_in_dim(weight, half.shape, (1,))).astype(dtype)
        for half, weight in zip((first, second), weights, strict=True)
    )
    return first.astype(jnp.float32), second.astype(jnp.float32)


def _layout(divisor: int, columns: int) -> Any:
    """Of arrays [rows, columns] whose rows, and those of its parts, are multiples of `divisor`.

    A warp's lanes lie along a row, then over rows; the widest loads that leave no thread idle.
    With few rows some warps or lanes do the same.
    """
    rows = math.gcd(divisor, _WIDEST * _THREADS // columns)
    vector = max(rows * columns // _THREADS, 2, columns // _WARP)
    lanes = columns // vector  # of one row
    per_warp = min(rows, _WARP // lanes)
    idle_warps, idle_lanes = _WARPS * per_warp // rows, _WARP // (per_warp * lanes)
    tiles = ((rows, columns), (per_warp, columns), (1, vector))
    # After tiling: [warps, 1, rows of a warp, 1, 1, lanes of a row, 1, vector], or so.
    same_warps = (plgpu.Replicated(idle_warps),) * (idle_warps > 1)
    same_lanes = (plgpu.Replicated(idle_lanes),) * (idle_lanes > 1)
    made = mgpu.TiledLayout(
        plgpu.Tiling(tiles), (-6, *same_warps), (-4, -3, *same_lanes), -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(made.tiling, made.warp_dims, made.lane_dims, made.vector_dim)
