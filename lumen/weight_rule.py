"""Deterministic pseudo-random weights by (seed, tensor name): the same bits on every backend.

Pure integer hashing, then one exact conversion to float32 and one multiplication, so numpy and
XLA agree to the last bit, and any slice can be generated alone, on the device that wants it. The
script that makes the golden files imports this file with numpy only, under Python 3.11.
"""

import zlib
from typing import Any

import numpy as np


def salt(seed: int, name: str) -> int:
    """What sets one tensor apart: a uint32 from the seed and the canonical tensor name."""
    return zlib.crc32(f"{seed}:{name}".encode())


def weight_values(name: str, shape: tuple[int, ...], salt: Any, xp: Any) -> Any:
    """The weights of one tensor, float32, uniform around 0 (norm weights: around 1).

    Matrices [out, in] have variance 1 / in, so activations keep their size through the layers.
    name: decides the kind only (any layer's name will do). salt: uint32 scalar array, may be
    traced. xp: numpy or jax.numpy.
    """
    if "norm" in name:
        return 1 + _uniform(shape, salt, 2.0**-3, xp)  # exact, so fused multiply-add is harmless
    if name.endswith(".bias"):
        return _uniform(shape, salt, 2.0**-3, xp)
    return _uniform(shape, salt, (3.0 / shape[1]) ** 0.5, xp)


def _uniform(shape: tuple[int, ...], salt: Any, bound: float, xp: Any) -> Any:
    """float32 in [-bound, bound), one hash of (salt, flat index) each."""
    bits = _mixed(_mixed(_flat_index(shape, xp), xp) ^ salt, xp)
    centred = (bits >> xp.uint32(8)).astype(np.int32) - xp.int32(1 << 23)
    return centred.astype(np.float32) * np.float32(bound * 2.0**-23)


def _flat_index(shape: tuple[int, ...], xp: Any) -> Any:
    """uint32 index of every element in row-major order, modulo 2^32."""
    index = xp.arange(shape[-1], dtype=np.uint32)
    if len(shape) == 2:
        rows = xp.arange(shape[0], dtype=np.uint32)[:, None] * xp.uint32(shape[1])
        index = rows + index[None, :]
    return index


def _mixed(x: Any, xp: Any) -> Any:
    """A bijection of uint32 whose output bits all depend on all input bits.

    Shifts and constants are those of Chris Wellons' "lowbias32" (Hash Prospector, 2018).
    """
    x = x ^ (x >> xp.uint32(16))
    x = x * xp.uint32(0x7FEB352D)
    x = x ^ (x >> xp.uint32(15))
    x = x * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))
