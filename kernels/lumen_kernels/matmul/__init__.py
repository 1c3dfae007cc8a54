"""x @ w.T: with few rows limited by how fast the weights stream, with many by multiplying.

Weights are [out, in], Hugging Face's orientation. On Hopper a kernel of ours runs where it was
measured to beat XLA (`rule`); XLA multiplies everywhere else and all other types than bfloat16.

A feed-forward block's first half, silu(x @ gate.T) * (x @ up.T), is an operation of its own: the
kernel then stores the result instead of twice as many products for another pass to read.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.matmul import many_rows, mosaic_gpu, rule, xla
from lumen_kernels.target import Target

__all__ = ["matmul", "silu_gated"]

_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))

# All products of one shape in a program share one lowered kernel: the compiler does not see that
# they are the same, and takes some seconds for each.
_on_gpu = jax.jit(mosaic_gpu.matmul, static_argnums=(2, 3), static_argnames=("gated", "interpret"))
_many_rows_on_gpu = jax.jit(
    many_rows.matmul, static_argnums=(2, 3), static_argnames=("gated", "interpret")
)


def matmul(x: jax.Array, w: jax.Array, *, target: Target, out_dtype: Any = None) -> jax.Array:
    """x [M, K] times w [N, K] transposed: [M, N].

    bfloat16, float16 or float32, both alike; accumulated in float32. out_dtype: x's dtype unless
    given; float32 keeps the sums as they are. float32 operands are multiplied as float32. Raises
    KernelArgumentError.
    """
    dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    _check("matmul", x, w, dtype)
    tiling = rule.tiling(x.shape[0], w.shape, x.dtype, dtype, target)
    if tiling is None:
        return xla.matmul(x, w, target, dtype)
    out: jax.Array = _on_gpu(x, w, tiling, dtype, interpret=target.interpret)
    return out


def silu_gated(x: jax.Array, w: jax.Array, *, target: Target) -> jax.Array:
    """silu(x @ gate.T) * (x @ up.T), of x [M, K] and w = [gate | up] [2 * I, K]: [M, I].

    bfloat16, float16 or float32, all three alike. silu and the product are in float32; of float32
    sums where a kernel fuses all of it, of sums rounded to x's dtype elsewhere. Raises
    KernelArgumentError.
    """
    _check("silu_gated", x, w, x.dtype)
    if w.shape[0] % 2:
        problem = f"must be [gate | up] with as many rows each; it has {w.shape[0]}."
        raise KernelArgumentError("silu_gated", "w", problem)
    tiling = rule.gated_tiling(x.shape[0], w.shape, x.dtype, target)
    if tiling is not None:
        out: jax.Array = _on_gpu(x, w, tiling, x.dtype, gated=True, interpret=target.interpret)
        return out
    blocking = rule.gated_blocking(x.shape[0], w.shape, x.dtype, target)
    if blocking is not None:
        out = _many_rows_on_gpu(x, w, blocking, x.dtype, gated=True, interpret=target.interpret)
        return out
    gate, up = jnp.split(matmul(x, w, target=target).astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


def _check(operation: str, x: jax.Array, w: jax.Array, out_dtype: Any) -> None:
    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError(operation, argument, problem)

    if x.ndim != 2:
        raise wrong("x", f"must be [M, K]; its shape is {tuple(x.shape)}.")
    if x.dtype not in _DTYPES:
        raise wrong("x", f"must be bfloat16, float16 or float32; it is {x.dtype}.")
    if w.ndim != 2 or w.shape[1] != x.shape[1]:
        raise wrong(
            "w", f"must be [N, {x.shape[1]}], as x is [M, K]; its shape is {tuple(w.shape)}."
        )
    if w.dtype != x.dtype:
        raise wrong("w", f"must have x's dtype, {x.dtype}; it is {w.dtype}.")
    if out_dtype not in (x.dtype, jnp.dtype(jnp.float32)):
        raise wrong("out_dtype", f"must be {x.dtype} or float32; it is {out_dtype}.")
