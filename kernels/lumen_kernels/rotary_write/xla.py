"""Bias, norms and rotation in plain XLA: the oracle, and what runs where nothing is fused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lumen_kernels.dense_chain import rms_norm


class Projections(NamedTuple):
    """A layer's queries, keys and values before their rotation.

    fused [tokens, (q heads + 2 kv heads) * head_dim]: q | k | v. bias: float32, one per column of
    `fused`, added first, or None. norms: float32 [2, head_dim], weights of the RMS norms of each
    head of q and of k, which follow, or None. What comes of either is rounded to fused's dtype.
    """

    fused: jax.Array
    bias: jax.Array | None = None
    norms: jax.Array | None = None


def rotate(
    projections: Projections, rotation: jax.Array, kv_heads: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `lumen_kernels.rotary_write.rotate`."""
    fused, bias, norms = projections
    head_dim = rotation.shape[1]
    if bias is not None:
        fused = (fused.astype(jnp.float32) + bias).astype(fused.dtype)
    tokens, heads = fused.shape[0], fused.shape[1] // head_dim
    fused = fused.reshape(tokens, heads, head_dim)
    q, k, v = jnp.split(fused, (heads - 2 * kv_heads, heads - kv_heads), axis=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    return _turned(q, rotation), _turned(k, rotation), v


def _turned(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Every head of x [tokens, heads, head_dim], computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.split(rotation[:, None, :], 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
