"""Random operands, and outputs that show where nothing was written."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

_DRAWN = 1 << 22  # values; arrays up to this size start at different places of these
_PLACES = 1 << 16
_HOST_BYTES = 64 << 20  # up to here a copy from the host is faster than compiling a fill


def random_bf16(seed: int, shape: Sequence[int]) -> jax.Array:
    """Standard normal. Small arrays are made on the host, where no shape has to be compiled."""
    size = math.prod(shape)
    if size > _DRAWN:
        random: jax.Array = _random(jax.random.key(seed, impl="rbg"), tuple(shape))
        return random
    start = seed * 9973 % _PLACES
    return jnp.asarray(_drawn()[start : start + size].reshape(shape))


@functools.cache
def _drawn() -> npt.NDArray[Any]:
    values = np.random.default_rng(0).standard_normal(_DRAWN + _PLACES, np.float32)
    return values.astype(ml_dtypes.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def _random(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def hollow(structs: Any) -> Any:
    """Arrays to be overwritten, of NaN where their type has it."""
    return jax.tree.map(_hollow, structs)


def _hollow(struct: jax.ShapeDtypeStruct) -> jax.Array:
    value = jnp.nan if jnp.issubdtype(struct.dtype, jnp.floating) else 0
    if math.prod(struct.shape) * struct.dtype.itemsize > _HOST_BYTES:
        return jnp.full(struct.shape, value, struct.dtype)
    return jnp.asarray(np.full(struct.shape, value, struct.dtype))
