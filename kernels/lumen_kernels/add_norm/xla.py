"""The reference of `add_norm`, and what runs wherever no kernel of ours is faster."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scale x [..., n] to unit mean square, times weight float32 [n]; in float32, x's dtype out."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight).astype(x.dtype)


def add_rms_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `lumen_kernels.add_norm.add_rms_norm`."""
    if x.ndim == 3:
        hidden = (residual.astype(jnp.float32) + jnp.sum(x, axis=0)).astype(residual.dtype)
    else:
        hidden = residual + x
    return hidden, rms_norm(hidden, weight, eps)
