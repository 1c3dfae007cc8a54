"""Which products our kernel makes, and how it cuts them: by shape alone.

Where the kernel beat XLA on one H200 (bfloat16, the weights of Llama-3.1-8B, November 2026,
docs/results/kernels.md). Terabytes of weights per second, XLA's and the kernel's; - was not
measured, and stays with XLA; so does a tie.

| rows of x | qkv | o | gate_up | down | lm head |
|---|---|---|---|---|---|
| 1 | 3.26, - | 2.98, - | 4.04, - | 3.88, - | 4.27, - |
| 8 | 3.27, - | 2.95, - | 3.98, 4.06 | 3.69, - | |
| 32 | 2.82, - | 2.65, - | 3.95, - | 3.43, - | 4.12, - |
| 64 | 2.53, 3.28 | 2.20, 2.74 | 3.76, - | 2.92, 3.58 | |
| 128 | 2.22, 2.69 | 2.07, 2.26 | 3.41, 3.41 | 2.93, - | 3.67, 3.46 |
| 256 (TFLOP/s) | 472, - | 425, - | 546, 585 | 548, - | |

An earlier run of the kernel's prototype lost at qkv, o and down of 8 and 256 rows.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lumen_kernels.target import Backend, Target

_SHARED_MEMORY = 232448
"""Bytes a block may use on Hopper."""

_RESERVED = 2048
"""Bytes of it for barriers and alignment."""

_SMALL = 1 << 24
"""Elements of w under which a product is all latency: XLA's launches are shorter."""

_LONGEST = 1 << 16
"""Rows of w from which XLA streams as fast as the memory gives: an lm head."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut over the chip.

    tile_n: rows of w per tile, a multiple of 8 * splits up to 256. tile_k: columns per stage, a
    multiple of 64 that divides K. splits: slices of K, each of one block of a cluster. sharing:
    blocks of a cluster that load x for one another. clusters: of splits * sharing blocks, that run
    at a time. rows: of x per multiplying warpgroup, 64 or 128. warpgroups: that multiply. stages:
    of the ring. stored: columns of one store, a divisor of tile_n / splits. staggered: blocks start
    at different places of K. registers: of a multiplying thread, 0 for the compiler's choice.
    """

    tile_n: int
    tile_k: int
    splits: int
    clusters: int
    rows: int
    warpgroups: int
    stages: int
    stored: int
    staggered: bool = False
    registers: int = 0
    sharing: int = 1

    @property
    def padded_rows(self) -> int:
        """Rows of x a block multiplies."""
        return self.rows * self.warpgroups


def tiling(
    m: int, w_shape: tuple[int, ...], dtype: Any, out_dtype: Any, target: Target
) -> Tiling | None:
    """The cut of x [m, K] times w [N, K] transposed for our kernel; None where XLA multiplies."""
    n, k = w_shape
    if target.backend is not Backend.MOSAIC_GPU or dtype != jnp.bfloat16:
        return None
    if n % 8 or k % 256 or n * k < _SMALL or n > _LONGEST:
        return None
    cores, out_bytes = target.cores, jnp.dtype(out_dtype).itemsize
    if n >= 128 * cores:
        if 1 < m <= 16:
            return _fitted(m, _tile_n(n, 1, cores, 64), 256, 1, cores, out_bytes, staggered=True)
        if 128 < m <= 256:
            tile_n = _tile_n(n, 1, cores, 112)
            return _fitted(m, tile_n, 64, 1, cores, out_bytes, staggered=True, sharing=2)
        return None
    if n < 24 * cores or not 32 < m <= 128:
        return None
    if k > 8192:
        # Long rows of w: with half of K each, blocks read x half as often.
        tile_n = _tile_n(n, 2, cores, 64)
        return _fitted(m, tile_n, 128, 2, cores, out_bytes) if m <= 64 else None
    tile_n = _tile_n(n, 1, cores, 64)
    wide = _fitted(m, tile_n, 128, 1, cores, out_bytes)
    return wide if wide.stages > 4 else _fitted(m, tile_n, 64, 1, cores, out_bytes)


def _tile_n(n: int, splits: int, cores: int, most: int) -> int:
    """The largest tile from 32 to `most` rows that keeps the chip as busy as any, within 2 %."""

    def busy(rows: int) -> float:
        blocks = -(-n // rows) * splits
        return n * splits / (-(-blocks // cores) * cores * rows)

    sizes = range(32, most + 1, 8)
    best = max(map(busy, sizes))
    return max(rows for rows in sizes if busy(rows) > best - 0.02)


def _fitted(
    m: int,
    tile_n: int,
    tile_k: int,
    splits: int,
    cores: int,
    out_bytes: int,
    *,
    staggered: bool = False,
    sharing: int = 1,
) -> Tiling:
    """With as many stages as shared memory holds."""
    rows, warpgroups = 64 if m <= 128 else 128, 1 if m <= 64 else 2
    padded = rows * warpgroups
    loaded = -(-m // 8) * 8 if m <= 64 else padded
    stored = tile_n // splits
    while padded * stored * out_bytes > 16384 and stored % 16 == 0:
        stored //= 2
    used = _RESERVED + (padded - loaded) * tile_k * 2 + padded * stored * out_bytes
    used += padded * tile_n * 4 if splits > 1 else 0
    stages = (_SHARED_MEMORY - used) // ((loaded + tile_n) * tile_k * 2)
    return Tiling(
        tile_n=tile_n,
        tile_k=tile_k,
        splits=splits,
        clusters=cores // (splits * sharing),
        rows=rows,
        warpgroups=warpgroups,
        stages=min(stages, 24),
        stored=stored,
        staggered=staggered,
        registers=232 if rows == 128 else 0,
        sharing=sharing,
    )
