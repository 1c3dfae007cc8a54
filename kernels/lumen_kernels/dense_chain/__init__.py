"""The dense half of a decoder layer, and the projections of the layer that follows it.

From attention's result: output projection, residual, norm, gated feed-forward block, residual, and
with the next layer's norm its q, k and v. On Hopper, for the few rows of a decoding step, all of it
is one launch in which the weights never stop streaming; elsewhere XLA runs product by product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lumen_kernels.add_norm import rms_norm_and_zero
from lumen_kernels.add_norm.xla import rms_norm
from lumen_kernels.dense_chain import cut, mosaic_gpu, xla
from lumen_kernels.dense_chain.xla import Weights
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Backend, Target

__all__ = ["Meetings", "Result", "Weights", "dense_chain", "first_norm", "no_meetings", "rms_norm"]


class Meetings(NamedTuple):
    """Of the blocks of a program's chains, between their phases.

    counter: int32 [1], counts every block that arrives. arrivals: what it holds by now.
    """

    counter: jax.Array
    arrivals: int


class Result(NamedTuple):
    """What `dense_chain` returns.

    hidden: [m, hidden]. projected: [m, qkv columns] of the next layer; None without one. meetings:
    for the next call of the same program.
    """

    hidden: jax.Array
    projected: jax.Array | None
    meetings: Meetings


# All layers of a program share one lowered kernel: the compiler does not see that they are the
# same, and takes some seconds for each.
_on_gpu = jax.jit(mosaic_gpu.run, static_argnums=(0, 3), static_argnames=("interpret",))


def no_meetings() -> Meetings:
    """What the first call of a program starts from."""
    return Meetings(jnp.zeros((1,), jnp.int32), 0)


def first_norm(
    hidden: jax.Array, norms: jax.Array, *, eps: float, target: Target
) -> tuple[jax.Array, Meetings]:
    """The norm before a program's first layer, and what its first `dense_chain` starts from.

    hidden [m, hidden], norms float32 [rows, hidden], of which this is row 0. Cheaper than
    `no_meetings`, which costs a launch. Raises KernelArgumentError.
    """
    normed, zero = rms_norm_and_zero(hidden, norms[0], eps, target=target)
    return normed, Meetings(zero, 0)


def dense_chain(
    attended: jax.Array,
    hidden: jax.Array,
    weights: Weights,
    norms: jax.Array,
    meetings: Meetings,
    *,
    norm: int = 0,
    eps: float,
    target: Target,
    reduce: Callable[[jax.Array], jax.Array] | None = None,
) -> Result:
    """Run the dense half of a layer.

    attended [m, q width] and hidden [m, hidden], both of the weights' dtype. norms float32
    [rows, hidden]: row `norm` before the feed-forward block, the one after it before the next
    layer's attention. meetings: of `first_norm`, `no_meetings()` or the call before. eps: of both
    norms. reduce: sums a product over the devices of tensor parallelism, after o and after down.
    Raises KernelArgumentError.
    """
    _check(attended, hidden, weights, norms, norm)
    m = attended.shape[0]
    chosen = None
    if reduce is None and hidden.dtype == jnp.bfloat16 and target.backend is Backend.MOSAIC_GPU:
        # More than eight rows are copied in eights, and no copy may reach past the end.
        chosen = _cut(m if m <= 8 else cut.rows_of(m), weights, target)
    if chosen is None:
        out, projected = xla.run(attended, hidden, weights, norms[norm:], eps, target, reduce)
        return Result(out, projected, meetings)
    buffers = {"attended": _to_rows(attended, chosen.m), "hidden": _to_rows(hidden, chosen.m)}
    buffers |= {name: w for name, w in weights._asdict().items() if w is not None}
    # The place is data: were it static, each layer would be a kernel of its own.
    place = jnp.array((norm, meetings.arrivals), jnp.int32)
    buffers |= {"norms": norms, "place": place}
    made, counter = _on_gpu(chosen, buffers, meetings.counter, eps, interpret=target.interpret)
    projected = None if weights.qkv is None else made["projected"][:m]
    meetings = Meetings(counter, meetings.arrivals + chosen.arrivals)
    return Result(made["out"][:m], projected, meetings)


def _cut(m: int, weights: Weights, target: Target) -> cut.Cut | None:
    hidden, q_width = weights.o.shape
    qkv = None if weights.qkv is None else weights.qkv.shape[0]
    phases = cut.layer_phases(hidden, q_width, weights.down.shape[1], qkv)
    return cut.cut(m, phases, target.cores)


def _to_rows(x: jax.Array, m: int) -> jax.Array:
    return x if x.shape[0] == m else jnp.pad(x, ((0, m - x.shape[0]), (0, 0)))


def _check(
    attended: jax.Array, hidden: jax.Array, weights: Weights, norms: jax.Array, norm: int
) -> None:
    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError("dense_chain", argument, problem)

    if hidden.ndim != 2:
        raise wrong("hidden", f"must be [m, hidden]; its shape is {tuple(hidden.shape)}.")
    m, width = hidden.shape
    if attended.ndim != 2 or attended.shape[0] != m:
        raise wrong("attended", f"must be [{m}, q width]; its shape is {tuple(attended.shape)}.")
    inner = weights.down.shape[-1]
    expected = {
        "o": (width, attended.shape[1]),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }
    for name, shape in expected.items():
        found = getattr(weights, name).shape
        if found != shape:
            raise wrong(f"weights.{name}", f"must be {shape}; its shape is {tuple(found)}.")
    if weights.qkv is not None and (weights.qkv.ndim != 2 or weights.qkv.shape[1] != width):
        raise wrong(
            "weights.qkv", f"must be [columns, {width}]; its shape is {tuple(weights.qkv.shape)}."
        )
    matrices = {f"weights.{name}": one for name, one in weights._asdict().items()}
    for name, one in {"attended": attended, **matrices}.items():
        if one is not None and one.dtype != hidden.dtype:
            raise wrong(name, f"must have hidden's dtype, {hidden.dtype}; it is {one.dtype}.")
    if norms.ndim != 2 or norms.shape[1] != width or norms.dtype != jnp.float32:
        found = f"{norms.dtype} {tuple(norms.shape)}"
        raise wrong("norms", f"must be float32 [rows, {width}]; it is {found}.")
    rows = norms.shape[0] - (weights.qkv is not None)
    if not 0 <= norm < rows:
        raise wrong("norm", f"must be a row from 0 to {rows - 1} of norms; it is {norm}.")
