"""KV write: store the K and V of new tokens in the arena, in place."""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.kv_write import xla
from lumen_kernels.target import Target

__all__ = ["write"]

_OPERATION = "kv_write.write"


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
    scalar, may be traced: layer * kv heads. No two tokens have the same place, and tokens stored
    in one block stand in order of their positions, with none of another block between them: a
    TPU writes them 16 positions at a time.

    Returns the arena, in place where it is donated. Raises KernelArgumentError.
    """
    shape = _checked(k, v, arena, slots, offsets, layer_offset)
    k, v = k.astype(arena[0].dtype), v.astype(arena[0].dtype)
    slots = jnp.where(slots < 0, -1, slots + layer_offset)
    if k.shape[0] == 0:
        return tuple(arena)
    return xla.write(k, v, tuple(arena), slots, offsets, shape)


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
