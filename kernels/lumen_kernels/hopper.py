"""What every kernel for NVIDIA Hopper (Pallas Mosaic GPU) needs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzled(columns: int, item_bytes: int) -> tuple[Any, Any]:
    """Transforms of a buffer that WGMMA reads: 8 rows of `columns` elements, at most 128 bytes."""
    # Both have methods that mypy takes for abstract.
    tiles = plgpu.TilingTransform((8, columns))  # type: ignore[abstract]
    return tiles, plgpu.SwizzleTransform(columns * item_bytes)  # type: ignore[abstract]


def i32(value: int) -> jax.Array:
    """An int32 scalar: Python's numbers would be weakly typed, and some operations refuse that."""
    return jnp.asarray(value, jnp.int32)
