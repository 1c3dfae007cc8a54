"""From a layer's fused projections to rotated queries, and keys and values in the arena.

RoFormer (Su et al., 2021), section 3.4; the partners of a rotation are i and i + head_dim / 2. On
Hopper all of it is one launch; elsewhere XLA rotates, and `lumen_kernels.kv_write` stores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lumen_kernels import kv_write
from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.rotary_write import mosaic_gpu, xla
from lumen_kernels.rotary_write.xla import Projections
from lumen_kernels.target import Backend, Target

__all__ = ["Projections", "is_one_launch", "rotate", "write"]

_OPERATION = "rotary_write.write"

# All layers of a program share one lowered kernel: the compiler does not see that they are the
# same, and takes some seconds for each.
_on_gpu: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]] = jax.jit(
    mosaic_gpu.write, static_argnums=(5, 6, 7, 8)
)


def write(
    projections: Projections,
    rotation: jax.Array,
    arena: tuple[jax.Array, ...],
    places: jax.Array,
    layer_offset: jax.Array | int,
    *,
    kv_heads: int,
    eps: float = 0.0,
    target: Target,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Rotate a layer's queries and keys, and store keys and values; nothing else there changes.

    projections: of the step's tokens. rotation: float32 [tokens, head_dim], the cosines of each
    token's position and then the sines. arena: see `lumen_kernels.arena`. places: int32
    [2, tokens], the slot base of each token's block, negative if the token is not stored, and its
    position inside the block, as `lumen_kernels.kv_write.write` takes them. layer_offset: int32
    scalar, may be traced: layer * kv heads. eps: of the norms, if there are any. Computed in
    float32, and rounded to the dtype of the projections, which is the arena's.

    Returns q [tokens, q heads, head_dim] and the arena, in place where it is donated. Raises
    KernelArgumentError.
    """
    shape = _checked(projections, rotation, arena, places, layer_offset, kv_heads)
    arena = tuple(arena)
    layer = jnp.asarray(layer_offset, jnp.int32)
    if projections.fused.shape[0] and _fuses(projections.fused, shape, target):
        return _on_gpu(projections, rotation, arena, places, layer, shape, kv_heads, eps, target)
    q, k, v = xla.rotate(projections, rotation, kv_heads, eps)
    return q, kv_write.write(k, v, arena, places[0], places[1], layer, target=target)


def rotate(
    projections: Projections, rotation: jax.Array, *, kv_heads: int, eps: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same q, and k and v [tokens, kv heads, head_dim] for another operation to store.

    Arguments as `write` takes them. Raises KernelArgumentError.
    """
    _check_projections("rotary_write.rotate", projections, rotation, kv_heads)
    return xla.rotate(projections, rotation, kv_heads, eps)


def is_one_launch(fused: Any, arena: Sequence[Any], *, head_dim: int, target: Target) -> bool:
    """Whether `write` is one launch for such projections, or several operations.

    fused, arena: arrays or shape structs. Raises KernelArgumentError.
    """
    shape = arena_shape("rotary_write.is_one_launch", arena, head_dim)
    return _fuses(fused, shape, target)


def _fuses(fused: Any, shape: ArenaShape, target: Target) -> bool:
    return target.backend is Backend.MOSAIC_GPU and mosaic_gpu.supports(
        shape, fused.shape[1], fused.dtype
    )


def _checked(
    projections: Projections,
    rotation: jax.Array,
    arena: tuple[jax.Array, ...],
    places: jax.Array,
    layer_offset: jax.Array | int,
    kv_heads: int,
) -> ArenaShape:
    """The arena's shape; raises for the first argument that does not fit."""

    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError(_OPERATION, argument, problem)

    _check_projections(_OPERATION, projections, rotation, kv_heads)
    fused = projections.fused
    shape = arena_shape(_OPERATION, arena, rotation.shape[1])
    if arena[0].dtype != fused.dtype:
        raise wrong("arena", f"is {arena[0].dtype}; it must be {fused.dtype}, as projections are.")
    if places.shape != (2, fused.shape[0]) or places.dtype != jnp.int32:
        raise wrong(
            "places",
            f"must be int32[2,{fused.shape[0]}], slots and offsets of the tokens; it is "
            f"{places.dtype}{list(places.shape)}.",
        )
    if jnp.shape(layer_offset) != () or not jnp.issubdtype(
        jnp.result_type(layer_offset), jnp.integer
    ):
        raise wrong("layer_offset", "must be an integer scalar: layer * kv heads.")
    return shape


def _check_projections(
    operation: str, projections: Projections, rotation: jax.Array, kv_heads: int
) -> None:
    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError(operation, argument, problem)

    fused, bias, norms = projections
    if fused.ndim != 2:
        raise wrong("projections", f"must be [tokens, columns]; their shape is {fused.shape}.")
    tokens, columns = fused.shape
    if rotation.ndim != 2 or rotation.shape[0] != tokens or rotation.dtype != jnp.float32:
        raise wrong(
            "rotation",
            f"must be float32[{tokens}, head_dim], one row per token; it is "
            f"{rotation.dtype}{list(rotation.shape)}.",
        )
    head_dim = rotation.shape[1]
    if head_dim < 2 or head_dim % 2:
        raise wrong("rotation", f"has {head_dim} columns; they must be cosines and sines of pairs.")
    heads = columns // head_dim
    if columns % head_dim or kv_heads < 1 or heads <= 2 * kv_heads:
        raise wrong(
            "projections",
            f"have {columns} columns, which are not q heads of {head_dim} and 2 x {kv_heads} more.",
        )
    for name, array, expected in (("bias", bias, (columns,)), ("norms", norms, (2, head_dim))):
        if array is not None and (array.shape != expected or array.dtype != jnp.float32):
            raise wrong(
                f"projections.{name}",
                f"must be float32{list(expected)}; it is {array.dtype}{list(array.shape)}.",
            )
