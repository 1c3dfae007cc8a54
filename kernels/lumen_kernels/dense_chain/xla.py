"""The reference of `dense_chain`, and what runs wherever the chain is not one launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.add_norm import add_rms_norm
from lumen_kernels.matmul import matmul, rule, silu_gated
from lumen_kernels.reduce_norm import SumOverDevices, reduce_add_rms_norm
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

    def joined(
        x: jax.Array, hidden: jax.Array, norm: jax.Array | None, half: int
    ) -> tuple[jax.Array, Any]:
        if isinstance(reduce, SumOverDevices):
            return reduce_add_rms_norm(x, hidden, norm, eps, reduce, half=half, target=target)
        x = x if reduce is None else reduce(x)
        if norm is None:
            return hidden + x, None
        return add_rms_norm(x, hidden, norm, eps, target=target)

    x = matmul(attended, weights.o, target=target)
    hidden, x = joined(x, hidden, norms[0], 0)
    inner = silu_gated(x, weights.gate_up, target=target)
    parts = 1
    if reduce is None and weights.qkv is not None:  # a norm follows right behind
        parts = rule.parts(inner.shape[0], weights.down.shape, inner.dtype, target)
    if parts > 1:
        x = _in_parts(inner, weights.down, parts)
    else:
        x = matmul(inner, weights.down, target=target)
    hidden, x = joined(x, hidden, None if weights.qkv is None else norms[1], 1)
    return hidden, None if weights.qkv is None else matmul(x, weights.qkv, target=target)


def _in_parts(x: jax.Array, w: jax.Array, parts: int) -> jax.Array:
    """x [m, k] times w [n, k] transposed as float32 [parts, m, n], which add up to it.

    XLA too would cut a product of few tiles along its depth, and add the parts up in a launch of
    its own; the norm does it while it is at it.
    """
    (m, k), n = x.shape, w.shape[0]
    product: jax.Array = lax.dot_general(
        x.reshape(m, parts, k // parts),
        w.reshape(n, parts, k // parts),
        (((2,), (2,)), ((1,), (1,))),
        preferred_element_type=jnp.float32,
    )
    return product
