"""KV write: store the K and V of new tokens in the arena, in place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.kv_write import mosaic_gpu, mosaic_tpu, xla
from lumen_kernels.target import Backend, Target

__all__ = ["write"]

_OPERATION = "kv_write.write"

# All layers of a program share one lowered kernel: the compiler does not see that they are the
# same, and takes some seconds for each.
_on_gpu: Callable[..., tuple[jax.Array, ...]] = jax.jit(mosaic_gpu.write, static_argnums=(6, 7))


def write(
    k: jax.Array,
    v: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array | int,
    *,
    target: Target,
) -> tuple[jax.Array, ...]:
    """Store one token's K and V, of every head, per row; nothing else of the arena changes.

    k, v [tokens, kv heads, head_dim], converted to the arena's dtype; arena: see
    `lumen_kernels.arena`; slots int32 [tokens]: slot base of the token's block, negative if the
    token is not stored; offsets int32 [tokens]: its position inside the block; layer_offset int32
    scalar, may be traced: layer * kv heads. No two tokens have the same place, and the tokens
    stored in one block stand next to each other, in order of position: a TPU writes them 16
    positions at a time.

    Returns the arena, in place where it is donated. Raises KernelArgumentError.
    """
    shape = _checked(k, v, arena, slots, offsets, layer_offset)
    arena = tuple(arena)
    if k.shape[0] == 0:
        return arena
    dtype = arena[0].dtype
    k, v = k.astype(dtype), v.astype(dtype)
    layer = jnp.asarray(layer_offset, jnp.int32)
    if target.backend is Backend.MOSAIC_GPU and mosaic_gpu.supports(shape, k.shape[1], dtype):
        return _on_gpu(k, v, arena, slots, offsets, layer, shape, target)
    if target.backend is Backend.MOSAIC_TPU and mosaic_tpu.supports(shape, dtype):
        return mosaic_tpu.write(k, v, arena, slots, offsets, layer, shape, target)
    return xla.write(k, v, arena, slots, offsets, layer, shape)


def _checked(
    k: jax.Array,
    v: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array | int,
) -> ArenaShape:
    """The arena's shape; raises for the first argument that does not fit."""

    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError(_OPERATION, argument, problem)

    if k.ndim != 3 or 0 in k.shape[1:]:
        raise wrong("k", f"must be [tokens, kv heads, head_dim]; its shape is {k.shape}.")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise wrong("v", f"must be like k, {k.dtype}{k.shape}; it is {v.dtype}{v.shape}.")
    shape = arena_shape(_OPERATION, arena, k.shape[2])
    for name, value in (("slots", slots), ("offsets", offsets)):
        if value.shape != k.shape[:1] or value.dtype != jnp.int32:
            raise wrong(
                name,
                f"must be int32[{k.shape[0]}], one per token; it is {value.dtype}{value.shape}.",
            )
    if jnp.shape(layer_offset) != () or not jnp.issubdtype(
        jnp.result_type(layer_offset), jnp.integer
    ):
        raise wrong("layer_offset", "must be an integer scalar: layer * kv heads.")
    return shape
