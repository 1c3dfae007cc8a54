"""Block copies: blocks of the arena to and from a contiguous buffer, and from place to place.

A block is `slots_per_block` consecutive slots from its base: all layers and heads that a device
holds of it, or those of one sub-block. It lies in one segment of the arena. Lists of bases are
padded with negative ids, so that one compiled program serves any number of blocks.
"""

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.block_copy import mosaic_gpu, mosaic_tpu, xla
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Backend, Target

__all__ = ["copy", "gather", "scatter"]


def gather(
    arena: tuple[jax.Array, ...], bases: jax.Array, *, slots_per_block: int, target: Target
) -> jax.Array:
    """Blocks one after the other in one buffer.

    arena: see `lumen_kernels.arena`; bases int32 [blocks]: slot ids where blocks begin.

    Returns [blocks, slots_per_block, *slot shape]; what a negative base gets is unspecified.
    Raises KernelArgumentError.
    """
    operation = "block_copy.gather"
    shape = _arena(operation, arena)
    _check_ids(operation, "bases", bases)
    _check_block(operation, shape, slots_per_block)
    arena = tuple(arena)
    if bases.shape[0] == 0:
        return jnp.zeros((0, slots_per_block, *shape.page_shape), arena[0].dtype)
    match _backend(target, shape):
        case Backend.MOSAIC_GPU:
            return mosaic_gpu.gather(arena, bases, slots_per_block, shape, target)
        case Backend.MOSAIC_TPU:
            return mosaic_tpu.gather(arena, bases, slots_per_block, shape, target)
        case Backend.XLA:
            return xla.gather(arena, bases, slots_per_block, shape)


def scatter(
    arena: tuple[jax.Array, ...], bases: jax.Array, buffer: jax.Array, *, target: Target
) -> tuple[jax.Array, ...]:
    """The way back: blocks of a buffer to their places in the arena, in place if it is donated.

    bases int32 [blocks]: distinct; a negative one is left out; buffer [blocks, slots_per_block,
    *slot shape], as `gather` returns it. Returns the arena. Raises KernelArgumentError.
    """
    operation = "block_copy.scatter"
    shape = _arena(operation, arena)
    _check_ids(operation, "bases", bases)
    page = shape.page_shape
    if buffer.ndim != 5 or buffer.shape[0] != bases.shape[0] or buffer.shape[2:] != page:
        raise KernelArgumentError(
            operation,
            "buffer",
            f"must be [{bases.shape[0]}, slots per block, {page[0]}, {page[1]}, {page[2]}] for "
            f"these bases and this arena; its shape is {buffer.shape}.",
        )
    if buffer.dtype != arena[0].dtype:
        raise KernelArgumentError(
            operation, "buffer", f"is {buffer.dtype}, but the arena is {arena[0].dtype}."
        )
    _check_block(operation, shape, buffer.shape[1], argument="buffer")
    arena = tuple(arena)
    if bases.shape[0] == 0:
        return arena
    match _backend(target, shape):
        case Backend.MOSAIC_GPU:
            return mosaic_gpu.scatter(arena, bases, buffer, shape, target)
        case Backend.MOSAIC_TPU:
            return mosaic_tpu.scatter(arena, bases, buffer, shape, target)
        case Backend.XLA:
            return xla.scatter(arena, bases, buffer, shape)


def copy(
    arena: tuple[jax.Array, ...],
    sources: jax.Array,
    destinations: jax.Array,
    *,
    slots_per_block: int,
    target: Target,
) -> tuple[jax.Array, ...]:
    """Blocks from place to place inside the arena, in place if it is donated.

    sources, destinations int32 [blocks]: a pair with a negative id is left out. No destination is
    the source or the destination of another pair: copies are not ordered.

    Returns the arena. Raises KernelArgumentError.
    """
    operation = "block_copy.copy"
    shape = _arena(operation, arena)
    _check_ids(operation, "sources", sources)
    _check_ids(operation, "destinations", destinations)
    if destinations.shape != sources.shape:
        raise KernelArgumentError(
            operation,
            "destinations",
            f"must be as many as sources, {sources.shape[0]}; they are {destinations.shape[0]}.",
        )
    _check_block(operation, shape, slots_per_block)
    arena = tuple(arena)
    if sources.shape[0] == 0:
        return arena
    match _backend(target, shape):
        case Backend.MOSAIC_GPU:
            return mosaic_gpu.copy(arena, sources, destinations, slots_per_block, shape, target)
        case Backend.MOSAIC_TPU:
            return mosaic_tpu.copy(arena, sources, destinations, slots_per_block, shape, target)
        case Backend.XLA:
            return xla.copy(arena, sources, destinations, slots_per_block, shape)


def _backend(target: Target, shape: ArenaShape) -> Backend:
    """Where a TPU pads rows, a kernel would make XLA copy the arena."""
    if target.backend is Backend.MOSAIC_TPU and shape.page_shape[2] % 128:
        return Backend.XLA
    return target.backend


def _arena(operation: str, arena: tuple[jax.Array, ...]) -> ArenaShape:
    """The arena's shape; whether it is packed shows in its pages, not in a head_dim."""
    head_dim = 0
    if isinstance(arena, tuple | list) and arena and arena[0].ndim == 4:
        head_dim = arena[0].shape[3] // (2 if arena[0].shape[1] == 1 else 1)
    return arena_shape(operation, arena, head_dim)


def _check_ids(operation: str, argument: str, ids: jax.Array) -> None:
    if ids.ndim != 1 or ids.dtype != jnp.int32:
        raise KernelArgumentError(
            operation, argument, f"must be int32 [blocks]; it is {ids.dtype}{ids.shape}."
        )
    if ids.shape[0] > mosaic_tpu.MOST_BLOCKS:
        raise KernelArgumentError(
            operation,
            argument,
            f"has {ids.shape[0]} ids; one call moves at most {mosaic_tpu.MOST_BLOCKS} blocks.",
        )


def _check_block(
    operation: str, shape: ArenaShape, slots_per_block: int, argument: str = "slots_per_block"
) -> None:
    if not 1 <= slots_per_block <= min(shape.slots):
        raise KernelArgumentError(
            operation,
            argument,
            f"makes blocks of {slots_per_block} slots; it must be 1 to {min(shape.slots)} slots, "
            "those of the smallest segment.",
        )
