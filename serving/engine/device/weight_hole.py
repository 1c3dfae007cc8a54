"""Room for weights that may be dropped later: side by side, so that they leave one piece.

JAX's allocator on a GPU joins free pieces only if they touch. Arrays of the weights' shapes are
therefore the first that a replica allocates, while nothing divides its memory, and loading fills
them in place; whatever is loaded or compiled meanwhile lies behind them.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lumen.model import ModuleDef
from lumen.placement import Weights
from serving.errors import ConfigurationError

ALLOCATION_BYTES = 256
"""JAX's allocator on a GPU gives out multiples of this."""

Extent = tuple[int, int]
"""Address of an array on one device, and its bytes."""

Extents = Callable[[jax.Array], Sequence[Extent]]
"""Of an array, that on each device of its mesh, in the mesh's order."""


def stays(device: jax.Device) -> bool:
    """Whether free memory of this device is only worth what lies in one piece.

    So it is where JAX gives out parts of what it took at once. CUDA's own allocator, like that of
    a CPU, moves pages together.
    """
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default")
    return device.platform == "gpu" and allocator in {"default", "bfc"}


def reserve(unit: ModuleDef[Any], mesh: Mesh, numbers: Sequence[int]) -> dict[int, Weights]:
    """Arrays of zeros like the weights of units, by number. Call before anything is allocated."""
    shardings = tuple(NamedSharding(mesh, spec) for spec in unit.specs)

    def unit_zeros() -> Weights:
        shapes = zip(unit.global_shapes, unit.dtypes, strict=True)
        return tuple(jnp.zeros(shape, dtype) for shape, dtype in shapes)

    zeros = jax.jit(unit_zeros, out_shardings=shardings)
    return {number: jax.block_until_ready(zeros()) for number in numbers}


def hole_bytes(weights: Mapping[int, Weights], extents: Extents | None = None) -> int:
    """What one allocation can have once all of these weights are deleted, per device.

    extents: how to find an array's memory. Raises ConfigurationError if they are not in one piece
    on some device.
    """
    arrays = [array for unit in weights.values() for array in unit]
    found = [(extents or _extents)(array) for array in arrays]
    least: int | None = None
    for of_device in zip(*found, strict=True):
        pieces = sorted(of_device)
        for (start, size), (following, _) in itertools.pairwise(pieces):
            # Where nothing lies between them, what is between them is rounding.
            if following - (start + size) >= ALLOCATION_BYTES:
                raise ConfigurationError(
                    f"The weights of {len(weights)} units that may be dropped are not in one piece "
                    f"of a device's memory: {following - start - size} bytes lie between two "
                    "matrices. Build a replica before anything else allocates there, or set "
                    "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async, which moves memory together itself."
                )
        (first, _), (last, size) = pieces[0], pieces[-1]
        held = last + size - first
        least = held if least is None else min(least, held)
    return least or 0


def _extents(array: jax.Array) -> Sequence[Extent]:
    parts = (shard.data for shard in array.addressable_shards)
    return [(part.unsafe_buffer_pointer(), part.nbytes) for part in parts]
