"""The reference of `dense_chain`, and what runs wherever the chain is not one launch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.matmul import matmul, silu_gated
from lumen_kernels.target import Target


class Weights(NamedTuple):
    """Matrices [out, in] of a layer, and q, k and v of the one that follows it, if one does.

    o [hidden, q width], gate_up [2 * inner, hidden] with the gates first, down [hidden, inner],
    qkv [columns, hidden].
    """

    o: jax.Array
    gate_up: jax.Array
    down: jax.Array
    qkv: jax.Array | None


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scale x [..., n] to unit mean square, times weight float32 [n]; in float32, x's dtype out."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight).astype(x.dtype)


def run(
    attended: jax.Array,
    hidden: jax.Array,
    weights: Weights,
    norms: jax.Array,
    eps: float,
    target: Target,
    reduce: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array | None]:
    """See `lumen_kernels.dense_chain.dense_chain`: hidden and the next layer's projections."""
    summed = reduce or (lambda x: x)
    hidden = hidden + summed(matmul(attended, weights.o, target=target))
    x = rms_norm(hidden, norms[0], eps)
    inner = silu_gated(x, weights.gate_up, target=target)
    hidden = hidden + summed(matmul(inner, weights.down, target=target))
    if weights.qkv is None:
        return hidden, None
    return hidden, matmul(rms_norm(hidden, norms[1], eps), weights.qkv, target=target)
