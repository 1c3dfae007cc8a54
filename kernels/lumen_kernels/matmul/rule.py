"""Which products our kernel makes, and how it cuts them: by shape alone.

Where the kernel beat XLA on one H200 (bfloat16, the weights of Llama-3.1-8B, November 2026,
docs/results/kernels.md). Terabytes of weights per second, XLA's and the kernel's; - was not
measured, and stays with XLA; so does a tie. gated: gate_up with silu(gate) * up made of it, XLA's
in one more pass.

| rows of x | qkv | o | gate_up | gated | down | lm head |
|---|---|---|---|---|---|---|
| 1 | 3.26, - | 2.98, - | 4.04, - | | 3.88, - | 4.27, - |
| 8 | 3.27, - | 2.95, - | 3.98, 4.06 | | 3.69, - | |
| 32 | 2.79, 3.27 | 2.62, 3.01 | 3.95, - | 3.82, 3.96 | 3.44, 3.71 | 4.12, - |
| 64 | 2.55, 3.23 | 2.18, 2.94 | 3.83, 3.95 | 3.67, 3.91 | 2.92, 3.58 | |
| 128 | 2.13, 2.56 | 2.08, 2.26 | 3.55, 3.50 | 3.23, 3.56 | 2.93, 2.77 | 3.67, 3.46 |
| 256 (TFLOP/s) | 458, 522 | 425, 322 | 560, 615 | 528, 599 | 548, 331 | |

qkv, o and down of 17 to 31 rows were not measured. They are taken because with 32 rows our kernel
takes no longer than XLA with 8. Clusters have at most two blocks: with four or eight the same cuts
took 1.4 to 1.9 times as long, as if not all of them fitted on the chip at once.

Many rows, gated (Llama-3.1-8B's gate_up): microseconds under sustained load, when the chip's power
limits both, in turns with XLA's product and pass. Each is the mean of two stretches of 0.15 s that
differed by up to 5 %:

| rows of x | XLA | kernel | gain |
|---|---|---|---|
| 512 | 194.7 | 187.7 | 3.8 % |
| 1024 | 378.1 | 361.8 | 4.5 % |
| 2048 | 746.9 | 734.1 | 1.7 % |
| 4096 | 1464.1 | 1396.3 | 4.9 % |

In an earlier run, in stretches of 25 ms, the same cut gained 2 % with 512 rows and lost 1 % with
4,096. Everything between two attentions, with this cut of gate_up, gained 2 % with 1,024 rows.

Gated products between those, in turns with XLA's product and pass on another H200, medians of three
turns: 102 us and XLA's 95 with 192 rows, which the kernel takes for 256; 148 and 163 with 384. Of
320 and 448 rows tiles of many rows would leave too much of the chip idle.

Long products whose parts the norm behind them adds up, microseconds of down with its norm, XLA's
product either way, medians of two or three turns on two H200s; one of our own for parts, cut in
clusters or not, was never faster:

| rows of x | whole | two parts | four |
|---|---|---|---|
| 96 | 38.2 | 38.3 | |
| 128 | 45.4 | 41.0 | 43.6 |
| 192 | 52.6 | 47.6 | |
| 256 | 60.9 | 57.6 | 64.6 |
| 320 | 70.3 | 69.3 | |
| 384, 512 | 80.7, 97.2 | 81.2, 101.7 | |

o, with 128 and 256 rows, gained nothing in two parts and lost in four.

Of clusters of four blocks 30 fit on a chip, 120 of its 132 cores, and of eight 15, as the driver
says of an H200. Cut for 32 of them, products took 1.2 to 1.7 times as long as in pairs.

Plain products of many rows stay with XLA: no cut of qkv, o or down gained more than 1.5 % in both
runs. Clusters of four blocks took twice as long as XLA.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lumen_kernels.target import Backend, Target

_SHARED_MEMORY = 232448
"""Bytes a block may use on Hopper."""

_RESERVED = 2048
"""Bytes of it for barriers and alignment."""

_STAGED = 32768
"""Bytes of a result that wait for their store, at most."""

_SMALL = 1 << 24
"""Elements of w under which a product is all latency: XLA's launches are shorter."""

_LONGEST = 1 << 16
"""Rows of w from which XLA streams as fast as the memory gives: an lm head."""

_WIDE = 128
"""Rows of w per core from which tiles can be wide and blocks still have one or more each."""

_WIDE_GATED = 96
"""The same of gated products of few rows, which XLA makes in two passes. Between this and `_WIDE`
none was measured: a quarter of Llama-3.1-70B's has 7,168 columns, 128 tiles of 56. Half of it, with
twice as many tiles, streamed at 4.26 TB/s with 32 rows."""

_MANY = 384
"""Rows of x from which a gated product is cut for multiplying rather than for streaming w."""

_TOO_FEW = 192
"""Rows of x up to which a cut for 256 rows multiplies too many that are not there."""

_PARTED = (96, 256)
"""Rows of x between which a long product is best made in two parts."""

_BUSY = 0.9
"""Share of the chip that tiles of many rows have to keep busy. All cuts measured had 0.97."""

_LONG = 8192
"""Columns of w over which a block reads more of x than is good."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut over the chip.

    tile_n: rows of w per tile, a multiple of 8 * splits up to 256. tile_k: columns per stage, a
    multiple of 64 that divides K. splits: slices of K, each of one block of a cluster. clusters:
    of splits * sharing * row_blocks blocks, that run at a time. rows: of x per multiplying
    warpgroup, 64 or 128. warpgroups: that multiply. stages: of the ring. stored: columns of one
    store, a divisor of a tile's columns in the result divided by splits. staggered: blocks start at
    different places of K. registers: of a multiplying thread, 0 for the compiler's choice. sharing:
    blocks of a cluster that load x for one another. row_blocks: blocks of a cluster that each
    multiply other rows of x, and load w for one another.

    In a gated product half of the rows of a tile are the gate's: its result has tile_n / 2 columns,
    they are a multiple of 8, and splits is 1.
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
    row_blocks: int = 1

    @property
    def block_rows(self) -> int:
        """Rows of x a block multiplies."""
        return self.rows * self.warpgroups


@dataclass(frozen=True, slots=True)
class Blocking:
    """How a product with many rows is cut over the chip.

    tile_n: rows of w per tile, a multiple of 32 up to 256. clusters: of row_blocks blocks, that run
    at a time. stored: columns of one store, a multiple of 16 that divides a tile's columns in the
    result. slots: stores of a warpgroup that may be under way. row_blocks: blocks of a cluster
    below one another, which load w for each other. band: clusters' tiles below one another that are
    gone through column by column. rows: of x per multiplying warpgroup, 64 or 128. warpgroups: that
    multiply. tile_k: columns per stage, a multiple of 64 that divides K. stages: of the ring.
    """

    tile_n: int
    clusters: int
    stored: int
    slots: int = 2
    row_blocks: int = 1
    band: int = 8
    rows: int = 64
    warpgroups: int = 2
    tile_k: int = 64
    stages: int = 4

    @property
    def block_rows(self) -> int:
        """Rows of x in a tile."""
        return self.rows * self.warpgroups


def tiling(
    m: int, w_shape: tuple[int, ...], dtype: Any, out_dtype: Any, target: Target
) -> Tiling | None:
    """The cut of x [m, K] times w [N, K] transposed for our kernel; None where XLA multiplies."""
    n, k = w_shape
    # Sums kept as they are come from lm heads: whole ones are XLA's, shards were not measured.
    if not _streams(n, k, dtype, target) or jnp.dtype(out_dtype) != dtype:
        return None
    cores = target.cores
    fitted = functools.partial(_fitted, m, cores=cores, out_bytes=jnp.dtype(out_dtype).itemsize)
    if n >= _WIDE * cores:
        if 1 < m <= 16:
            return fitted(_tile(n, cores, 64), 256, staggered=True)
        if 32 < m <= 64:
            return fitted(_tile(n, cores, 112), 128)
        if _TOO_FEW < m <= 256:
            return fitted(_tile(n, cores, 224, blocks=2), 64, row_blocks=2, staggered=True)
        return None
    if n < 24 * cores or not 16 < m <= 256:
        return None
    if m > 128:
        tile_n = _tile(n, cores, 96, blocks=2)
        # Narrower tiles read x too often, and so do K's as long as down's.
        return fitted(tile_n, 64, row_blocks=2) if k <= _LONG and tile_n >= 96 else None
    if k > _LONG and m > 32:
        # With half of K each, blocks read x half as often.
        return fitted(_tile(n, cores, 64, blocks=2), 128, splits=2) if m <= 64 else None
    tile_n = _tile(n, cores, 64)
    deep = fitted(tile_n, 128)
    return deep if deep.stages > 4 else fitted(tile_n, 64)


def gated_tiling(m: int, w_shape: tuple[int, ...], dtype: Any, target: Target) -> Tiling | None:
    """The cut of the gated product of x [m, K] and w [2 * I, K]; None where XLA makes it."""
    n, k = w_shape
    if not _streams(n, k, dtype, target) or n % 16 or n < _WIDE_GATED * target.cores:
        return None
    cores, width = target.cores, n // 2
    fitted = functools.partial(
        _fitted, m, cores=cores, out_bytes=jnp.dtype(dtype).itemsize, gated=True
    )
    if 16 < m <= 64:
        return fitted(2 * _tile(width, cores, 56), 128)
    if 64 < m <= 128:
        return fitted(2 * _tile(width, cores, 112), 64, sharing=2)
    if _TOO_FEW < m <= 256:
        return fitted(2 * _tile(width, cores, 56), 64, sharing=2, rows=128, staggered=True)
    return None


def gated_blocking(m: int, w_shape: tuple[int, ...], dtype: Any, target: Target) -> Blocking | None:
    """The cut of the gated product of x [m, K], many rows, and w [2 * I, K]; None for all else."""
    n, k = w_shape
    if not _streams(n, k, dtype, target) or n % 32 or n < _WIDE * target.cores:
        return None
    if m < _MANY or (m % 256 and m != _MANY):
        return None
    width = n // 2
    # One tile of 256 rows and one of 128, which nobody shares w with, would not be alike.
    row_blocks = 1 if m % 256 else 2
    clusters, rows = target.cores // row_blocks, 128 * row_blocks

    def busy(tile_n: int) -> float:
        tiles = -(-m // rows) * -(-2 * width // tile_n)
        return m * n / (-(-tiles // clusters) * clusters * rows * tile_n)

    wide, narrow = 256, 224
    tile_n = narrow if busy(narrow) > busy(wide) + 0.02 else wide
    if busy(tile_n) < _BUSY:
        return None
    stored = math.gcd(tile_n // 2, 64)
    return Blocking(tile_n, clusters, stored, slots=min(128 // stored, 4), row_blocks=row_blocks)


def parts(m: int, w_shape: tuple[int, ...], dtype: Any, target: Target) -> int:
    """In how many parts along K the product of x [m, K] and w [N, K] is best made, for someone to
    add up who reads it anyway."""
    n, k = w_shape
    fewest, most = _PARTED
    long = k > _LONG and _streams(n, k, dtype, target)
    return 2 if long and fewest < m <= most else 1


def _streams(n: int, k: int, dtype: Any, target: Target) -> bool:
    """Whether w [n, k] is for the kernel at all."""
    if target.backend is not Backend.MOSAIC_GPU or dtype != jnp.bfloat16:
        return False
    return not (n % 8 or k % 256 or n * k < _SMALL or n > _LONGEST)


def _tile(columns: int, cores: int, most: int, *, blocks: int = 1) -> int:
    """The largest tile of 32 to `most` columns of a result that keeps the chip as busy as any,
    within 2 %. blocks: that work on one tile."""

    def busy(size: int) -> float:
        needed = -(-columns // size) * blocks
        return columns * blocks / (-(-needed // cores) * cores * size)

    sizes = range(32, most + 1, 8)
    best = max(map(busy, sizes))
    return max(size for size in sizes if busy(size) > best - 0.02)


def _fitted(
    m: int,
    tile_n: int,
    tile_k: int,
    *,
    cores: int,
    out_bytes: int,
    splits: int = 1,
    sharing: int = 1,
    row_blocks: int = 1,
    rows: int = 64,
    staggered: bool = False,
    gated: bool = False,
) -> Tiling:
    """With as many stages as shared memory holds."""
    warpgroups = 1 if m <= 64 else 2
    block_rows = rows * warpgroups
    loaded = -(-m // 8) * 8 if m <= 64 else block_rows
    stored = tile_n // (2 if gated else 1) // splits
    while block_rows * stored * out_bytes > _STAGED and stored % 16 == 0:
        stored //= 2
    used = _RESERVED + (block_rows - loaded) * tile_k * 2 + block_rows * stored * out_bytes
    used += block_rows * tile_n * 4 if splits > 1 else 0
    stages = (_SHARED_MEMORY - used) // ((loaded + tile_n) * tile_k * 2)
    return Tiling(
        tile_n=tile_n,
        tile_k=tile_k,
        splits=splits,
        clusters=cores // (splits * sharing * row_blocks),
        rows=rows,
        warpgroups=warpgroups,
        stages=min(stages, 24),
        stored=stored,
        staggered=staggered,
        registers=232 if rows == 128 else 0,
        sharing=sharing,
        row_blocks=row_blocks,
    )
