"""x @ w.T on NVIDIA Hopper (Pallas Mosaic GPU) for many rows of x: limited by multiplying.

A persistent grid of clusters; a block owns a tile of the result at a time. One warpgroup of it only
loads, slices of x and w together through a ring of shared memory; the others multiply, each its own
rows of the tile. The blocks of a cluster own tiles below one another: they load one tile of w
together, each a part of it for all.

Tiles are taken in bands of rows, column after column, so that what is multiplied at a time comes
from few rows of x and of w and most of it from the L2 cache; every other band goes back.

The multiplying warpgroups need not keep step: while one stores its rows, the other has the tensor
cores to itself, as far as the ring reaches.

A gated product takes half of each tile from the gate's rows of w and half from the rows of up that
belong to them: one block then has both sums of a result, and stores silu(gate) * up.

All of K is summed by one warpgroup in order: a row's result has the same bits whatever the others
are.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.hopper import i32, swizzled
from lumen_kernels.matmul.rule import Blocking

_REGISTERS = 232
"""Of a thread that multiplies: 128 sums, and room to make results of them."""

_LOADER_REGISTERS = 40


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a product of these shapes is cut."""

    m: int
    n: int
    k: int
    blocking: Blocking
    gated: bool

    @property
    def parts(self) -> int:
        """Copies that bring a tile of w: one or, gated, two."""
        return 2 if self.gated else 1

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.n // self.parts

    @property
    def tile_width(self) -> int:
        """Columns of the result in a tile."""
        return self.blocking.tile_n // self.parts

    @property
    def steps(self) -> int:
        """Stages along K."""
        return self.k // self.blocking.tile_k

    @property
    def down(self) -> int:
        """Tiles of a cluster below one another."""
        return -(-self.m // (self.blocking.block_rows * self.blocking.row_blocks))

    @property
    def across(self) -> int:
        """Tiles side by side."""
        return -(-self.width // self.tile_width)

    @property
    def clusters(self) -> int:
        """As few as finish in the same number of rounds as all that fit."""
        groups = self.down * self.across
        rounds = -(-groups // self.blocking.clusters)
        return -(-groups // rounds)

    @property
    def row_unit(self) -> int:
        """Every tile and every warpgroup's part of it start at a multiple of so many rows."""
        return math.gcd(self.m, self.blocking.rows)

    @property
    def column_unit(self) -> int:
        """Every tile and every store start at a multiple of so many columns."""
        return math.gcd(self.width, self.tile_width, self.blocking.stored)

    def scratch(self, x_dtype: Any, out_dtype: Any, interpret: bool) -> dict[str, Any]:
        """Rings, staging buffers and barriers."""
        b, out_bytes = self.blocking, jnp.dtype(out_dtype).itemsize
        operand = swizzled(64, 2)
        result = swizzled(math.gcd(self.column_unit, 128 // out_bytes), out_bytes)
        scratch: dict[str, Any] = {
            "x_ring": plgpu.SMEM((b.stages, b.block_rows, b.tile_k), x_dtype, transforms=operand),
            "w_ring": plgpu.SMEM((b.stages, b.tile_n, b.tile_k), x_dtype, transforms=operand),
            "staging": plgpu.SMEM(
                (b.warpgroups, b.slots, b.rows, b.stored), out_dtype, transforms=result
            ),
            "full": plgpu.Barrier(num_arrivals=1 + self.parts, num_barriers=b.stages),
            "free": plgpu.Barrier(num_arrivals=b.warpgroups, num_barriers=b.stages),
        }
        if b.row_blocks > 1 and not interpret:
            # Of every block of the cluster: each loads for all.
            scratch["free"] = plgpu.ClusterBarrier(
                collective_axes=("row",), num_arrivals=b.warpgroups, num_barriers=b.stages
            )
        return scratch


def matmul(
    x: jax.Array,
    w: jax.Array,
    blocking: Blocking,
    out_dtype: Any,
    *,
    gated: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """x [M, K] times w [N, K] transposed: [M, N], or [M, N / 2] of silu(gate) * up if gated.

    bfloat16 in; M is at least `blocking.block_rows` and a multiple of 8.
    """
    cut = _Cut(x.shape[0], w.shape[0], w.shape[1], blocking, gated)

    def body(x_ref: Any, w_ref: Any, out_ref: Any, **scratch: Any) -> None:
        block = _Block(cut, scratch, interpret)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == blocking.warpgroups)(lambda: block.load(x_ref, w_ref))
        pl.when(warpgroup < blocking.warpgroups)(lambda: block.multiply(out_ref, warpgroup))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((cut.m, cut.width), out_dtype),
        scratch_types=cut.scratch(x.dtype, out_dtype, interpret),
        grid=(cut.clusters,),
        grid_names=("cluster",),
        cluster=(blocking.row_blocks,),
        cluster_names=("row",),
        num_threads=blocking.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=gated, reduction_scratch_bytes=128),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="many_rows_gated" if gated else "many_rows_matmul",
    )
    result: jax.Array = kernel(x, w)
    return result


class _Block:
    """What the warpgroups of one block do."""

    def __init__(self, cut: _Cut, scratch: dict[str, Any], interpret: bool) -> None:
        self.cut, self.blocking = cut, cut.blocking
        self.scratch, self.interpret = scratch, interpret
        self.cluster, self.row = lax.axis_index("cluster"), lax.axis_index("row")
        groups, every = cut.down * cut.across, i32(cut.clusters)
        self.tile_count = lax.div(i32(groups - 1) - self.cluster, every) + i32(1)

    def _start(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where tile number `index` starts: row and column of the result, both in units.

        The last tiles overlap those before them, and store the same results.
        """
        cut, b = self.cut, self.blocking
        band, across = i32(min(b.band, cut.down)), i32(cut.across)
        group = self.cluster + index * i32(cut.clusters)
        above = lax.div(group, band * across)
        inside = group - above * band * across
        rows = lax.min(band, i32(cut.down) - above * band)
        column = lax.div(inside, rows)
        row = (above * band + inside - column * rows) * i32(b.row_blocks) + self.row
        column = lax.select(lax.rem(above, i32(2)) == 0, column, i32(cut.across - 1) - column)
        return (
            _limited(row, b.block_rows, cut.m, cut.row_unit),
            _limited(column, cut.tile_width, cut.width, cut.column_unit),
        )

    def load(self, x_ref: Any, w_ref: Any) -> None:
        """Bring x and w into the ring, tile after tile."""
        b, cut, scratch = self.blocking, self.cut, self.scratch
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        w_rows = b.tile_n // cut.parts
        # The interpreter does not know copies of a cluster: there every block loads all of w.
        w_axis = "row" if b.row_blocks > 1 and not self.interpret else None

        def tile(index: jax.Array, turn: jax.Array) -> jax.Array:
            row, column = self._start(index)

            def step(at: jax.Array, turn: jax.Array) -> jax.Array:
                slot, depth = lax.rem(turn, i32(b.stages)), pl.ds(at * b.tile_k, b.tile_k)
                full, free = scratch["full"].at[slot], scratch["free"].at[slot]
                pl.when(turn >= b.stages)(lambda: plgpu.barrier_wait(free))
                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(row * cut.row_unit, b.block_rows), depth],
                    scratch["x_ring"].at[slot],
                    full,
                )
                for part in range(cut.parts):
                    start = column + i32(part * (cut.width // cut.column_unit))
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[pl.ds(start * cut.column_unit, w_rows), depth],
                        scratch["w_ring"].at[slot, pl.ds(part * w_rows, w_rows)],
                        full,
                        collective_axes=w_axis,
                    )
                return turn + i32(1)

            after: jax.Array = lax.fori_loop(i32(0), i32(cut.steps), step, turn)
            return after

        turns = lax.fori_loop(i32(0), self.tile_count, tile, i32(0))
        if self.interpret or w_axis:
            # The interpreter wants every arrival awaited. The chip does not mind, but no block
            # may end while another of its cluster still signals it.
            def await_readers(turn: jax.Array, carry: jax.Array) -> jax.Array:
                plgpu.barrier_wait(scratch["free"].at[lax.rem(turn, i32(b.stages))])
                return carry

            last = lax.max(turns - i32(b.stages), i32(0))
            lax.fori_loop(last, turns, await_readers, i32(0))

    def multiply(self, out_ref: Any, warpgroup: jax.Array) -> None:
        """Multiply tile after tile with one warpgroup's rows of x and store the results."""
        plgpu.set_max_registers(_REGISTERS, action="increase")

        def tile(index: jax.Array, turn: jax.Array) -> jax.Array:
            sums, turn = self._sums(warpgroup, turn)
            self._store(sums, out_ref, warpgroup, *self._start(index))
            return turn

        lax.fori_loop(i32(0), self.tile_count, tile, i32(0))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sums(self, warpgroup: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One tile's sums, [rows, tile_n] float32, and the next turn of the ring."""
        b, cut, scratch = self.blocking, self.cut, self.scratch

        def free_before(turn: jax.Array) -> None:
            plgpu.barrier_arrive(scratch["free"].at[lax.rem(turn - i32(1), i32(b.stages))])

        def accumulate(accumulator: Any) -> tuple[jax.Array, jax.Array]:
            def step(at: jax.Array, turn: jax.Array) -> jax.Array:
                slot = lax.rem(turn, i32(b.stages))
                plgpu.barrier_wait(scratch["full"].at[slot])
                left = scratch["x_ring"].at[slot, pl.ds(warpgroup * b.rows, b.rows)]
                right = scratch["w_ring"].at[slot]
                plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
                plgpu.wgmma_wait(1)  # the product before this one has been made
                pl.when(at > 0)(lambda: free_before(turn))
                return turn + i32(1)

            turns = lax.fori_loop(i32(0), i32(cut.steps), step, turn)
            return accumulator[...], turns

        accumulator = plgpu.WGMMAAccumulatorRef((b.rows, b.tile_n), jnp.float32)
        sums, turn = pl.run_scoped(accumulate, accumulator)
        free_before(turn)
        return sums, turn

    def _store(
        self,
        sums: jax.Array,
        out_ref: Any,
        warpgroup: jax.Array,
        row: jax.Array,
        column: jax.Array,
    ) -> None:
        """Store one warpgroup's results of the tile that starts at these units."""
        cut, b = self.cut, self.blocking
        row = row + warpgroup * i32(b.rows // cut.row_unit)
        rows = pl.ds(row * cut.row_unit, b.rows)
        for index in range(cut.tile_width // b.stored):
            at = index * b.stored
            value = sums[:, at : at + b.stored]
            if cut.gated:
                up = sums[:, cut.tile_width + at : cut.tile_width + at + b.stored]
                value = value * lax.logistic(value) * up
            staging = self.scratch["staging"].at[warpgroup, index % b.slots]
            plgpu.wait_smem_to_gmem(b.slots - 1, wait_read_only=True)
            staging[...] = value.astype(out_ref.dtype)
            plgpu.commit_smem()
            start = column + i32(at // cut.column_unit)
            columns = pl.ds(start * cut.column_unit, b.stored)
            plgpu.copy_smem_to_gmem(staging, out_ref.at[rows, columns])


def _limited(tile: jax.Array, size: int, whole: int, unit: int) -> jax.Array:
    """Where a tile starts in units; past the end, the last place where one fits."""
    return lax.min(tile * i32(size // unit), i32((whole - size) // unit))
