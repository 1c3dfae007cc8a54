"""RMS norm of hidden states, and of hidden states that a layer's product is added to first.

On Hopper one launch and one pass over memory; elsewhere XLA, which fuses as much by itself.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lumen_kernels.add_norm import mosaic_gpu, xla
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Backend, Target

__all__ = ["add_rms_norm", "rms_norm_and_zero"]

# All norms of a program share one lowered kernel: the compiler does not see that they are the same.
_on_gpu: Callable[..., list[jax.Array]] = jax.jit(
    mosaic_gpu.run, static_argnums=3, static_argnames="interpret"
)


def add_rms_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float, *, target: Target
) -> tuple[jax.Array, jax.Array]:
    """hidden = residual + x, rounded to their dtype, and its norm: both [rows, n].

    x and residual [rows, n] of one dtype; or x float32 [parts, rows, n], what a product cut along
    its depth leaves to be added up. weight float32 [n]. The norm is computed in float32 and rounded
    once: hidden / sqrt(mean(hidden ** 2) + eps) * weight. Raises KernelArgumentError.
    """
    _check("add_rms_norm", "residual", residual, weight)
    whole = x.shape == residual.shape and x.dtype == residual.dtype
    in_parts = x.ndim == 3 and x.shape[1:] == residual.shape and x.dtype == jnp.float32
    if not whole and not (in_parts and x.shape[0]):
        problem = (
            f"must be like residual, {_described(residual)}, or float32 [parts, rows, n]; "
            f"it is {_described(x)}."
        )
        raise KernelArgumentError("add_rms_norm", "x", problem)
    if not _has_kernel(residual, target):
        return xla.add_rms_norm(x, residual, weight, eps)
    hidden, normed = _on_gpu(x, residual, weight, eps, interpret=target.interpret)
    return hidden, normed


def rms_norm_and_zero(
    x: jax.Array, weight: jax.Array, eps: float, *, target: Target
) -> tuple[jax.Array, jax.Array]:
    """x / sqrt(mean(x ** 2) + eps) * weight, and an int32 [1] of 0 that may be written to.

    x [rows, n], weight float32 [n]; in float32, rounded to x's dtype. A kernel that counts in place
    wants such a zero. A constant would have to be copied first: a launch, where the norm's has time
    for it. Raises KernelArgumentError.
    """
    _check("rms_norm_and_zero", "x", x, weight)
    if not _has_kernel(x, target):
        return xla.rms_norm(x, weight, eps), jnp.zeros((1,), jnp.int32)
    normed, zero = _on_gpu(None, x, weight, eps, interpret=target.interpret)
    return normed, zero


def _has_kernel(x: jax.Array, target: Target) -> bool:
    rows, width = x.shape
    if target.backend is not Backend.MOSAIC_GPU or x.dtype != jnp.bfloat16:
        return False
    return rows > 0 and mosaic_gpu.supports(width)


def _check(operation: str, name: str, x: jax.Array, weight: jax.Array) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        problem = f"must be floating point [rows, n]; it is {_described(x)}."
        raise KernelArgumentError(operation, name, problem)
    if weight.shape != x.shape[1:] or weight.dtype != jnp.float32:
        problem = f"must be float32({x.shape[1]},); it is {_described(weight)}."
        raise KernelArgumentError(operation, "weight", problem)


def _described(x: jax.Array) -> str:
    return f"{x.dtype}{tuple(x.shape)}"
