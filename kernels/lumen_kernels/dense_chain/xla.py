"""The reference of `dense_chain`, and what runs wherever the chain is not one launch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.add_norm import add_rms_norm
from lumen_kernels.matmul import matmul, rule, silu_gated
from lumen_kernels.target import Backend, Target

_TILE = 128  # rows and columns of what a core of a GPU multiplies at a time
_FEW_ROWS = 64  # up to here parts were not measured


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

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return _product(x, w, target) if reduce is None else reduce(matmul(x, w, target=target))

    x = product(attended, weights.o)
    hidden, x = add_rms_norm(x, hidden, norms[0], eps, target=target)
    inner = silu_gated(x, weights.gate_up, target=target)
    if weights.qkv is None:
        x = matmul(inner, weights.down, target=target)
        return hidden + (x if reduce is None else reduce(x)), None
    x = product(inner, weights.down)
    hidden, x = add_rms_norm(x, hidden, norms[1], eps, target=target)
    return hidden, matmul(x, weights.qkv, target=target)


def _product(x: jax.Array, w: jax.Array, target: Target) -> jax.Array:
    """x [m, k] times w [n, k] transposed as `add_rms_norm` takes it: [m, n] or its parts.

    XLA too would cut a product of few tiles along its depth, and add the parts up in a launch of
    its own; the norm adds them up while it is at it.
    """
    parts = _parts(x, w, target)
    if parts == 1:
        return matmul(x, w, target=target)
    (m, k), n = x.shape, w.shape[0]
    cut: jax.Array = lax.dot_general(
        x.reshape(m, parts, k // parts),
        w.reshape(n, parts, k // parts),
        (((2,), (2,)), ((1,), (1,))),
        preferred_element_type=jnp.float32,
    )
    return cut


def _parts(x: jax.Array, w: jax.Array, target: Target) -> int:
    """As many as keep the chip busy with tiles of all of them at once."""
    (m, k), n = x.shape, w.shape[0]
    if target.backend is not Backend.MOSAIC_GPU or x.dtype != jnp.bfloat16:
        return 1
    if m <= _FEW_ROWS or rule.tiling(m, w.shape, x.dtype, x.dtype, target) is not None:
        return 1
    tiles = -(-m // _TILE) * -(-n // _TILE)
    fitting = [
        count for count in (1, 2, 4) if tiles * count <= target.cores and k % (count * _TILE) == 0
    ]
    return max(fitting, default=1)
