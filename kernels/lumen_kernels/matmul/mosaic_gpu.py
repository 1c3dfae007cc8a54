"""x @ w.T on NVIDIA Hopper (Pallas Mosaic GPU) for up to 256 rows of x: the weights stream once.

A persistent grid; every block owns whole tiles of `tile_n` rows of w and, with `splits` > 1, one
slice of K: then a cluster of `splits` blocks shares a tile. One warpgroup of a block only loads,
tiles of w and of x together through a ring of shared memory; the others multiply: x is WGMMA's
left operand, 64 or 128 rows of it for each warpgroup, w.T the right one, so a tile may have any
multiple of 8 rows and the result stands as it is stored.

x has as many rows in shared memory as it has (rounded up to 8); the left operand's window of 64
then reaches into the next stages. Those rows are never stored.

Blocks may start at different places of K and go round: side by side they read the same columns of
x at once, from the few slices of the L2 cache that hold them. Neighbours in step read w better,
though; `staggered` pays with long stages only.

With many rows, reading x over and over costs as well: `sharing` blocks of a cluster, each with its
own tile, then load a part of x each and send it to all. In the same way `row_blocks` blocks of a
cluster multiply one tile with different rows of x, and each sends a part of the tile to all.

The blocks that split K exchange float32 partial sums through distributed shared memory; each adds
one piece of the tile in the order of K and stores it. The order of every sum depends on the cut
only: a row's result has the same bits whatever the other rows are.

A gated product takes half of each tile from the gate's rows of w and half from the rows of up that
belong to them: one block then has both sums of a result, and stores silu(gate) * up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lumen_kernels.hopper import i32, swizzled
from lumen_kernels.matmul.rule import Tiling

_LOADER_REGISTERS = 40


@dataclass(frozen=True, slots=True)
class _Cut:
    """How a product of these shapes is cut."""

    m: int
    n: int
    k: int
    tiling: Tiling
    gated: bool

    def __post_init__(self) -> None:
        assert self.tiling.splits == 1 or not self.gated, "a piece has no gate and up of its own"

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.n // 2 if self.gated else self.n

    @property
    def tile_width(self) -> int:
        """Columns of the result in a tile."""
        return self.tiling.tile_n // 2 if self.gated else self.tiling.tile_n

    @property
    def steps(self) -> int:
        """Stages of w along all of K."""
        return self.k // self.tiling.tile_k

    @property
    def loaded_rows(self) -> int:
        """Rows of x in a stage."""
        return self.tiling.block_rows if self.m > 64 else _up(self.m, 8)

    @property
    def piece(self) -> int:
        """Columns of the result one block adds and stores per tile."""
        return self.tile_width // self.tiling.splits

    @property
    def groups(self) -> int:
        """Tiles or, with shared x, sets of neighbouring tiles: what a cluster does in a round."""
        return -(-self.width // (self.tile_width * self.tiling.sharing))

    @property
    def clusters(self) -> int:
        """As few as finish in the same number of rounds as all that fit."""
        rounds = -(-self.groups // self.tiling.clusters)
        return -(-self.groups // rounds)

    @property
    def unit(self) -> int:
        """Every tile and every piece starts at a multiple of it."""
        return math.gcd(self.width, self.tile_width, self.tiling.stored)

    @property
    def parts(self) -> int:
        """Copies that bring a tile of w: one or, gated, two."""
        return 2 if self.gated else 1

    def scratch(self, x_dtype: Any, out_dtype: Any, interpret: bool) -> dict[str, Any]:
        """Rings, staging buffers and barriers."""
        t, rows = self.tiling, self.tiling.rows
        operand = swizzled(64, 2)
        window = t.block_rows - self.loaded_rows
        scratch: dict[str, Any] = {
            "x_ring": plgpu.SMEM(
                (t.stages * self.loaded_rows + window, t.tile_k), x_dtype, transforms=operand
            ),
            "w_ring": plgpu.SMEM((t.stages, t.tile_n, t.tile_k), x_dtype, transforms=operand),
            "staging": plgpu.SMEM((t.warpgroups, rows, t.stored), out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 + self.parts, num_barriers=t.stages),
            "free": plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages),
        }
        if t.sharing * t.row_blocks > 1 and not interpret:
            # Of every block that this one loads for, or that loads for it.
            scratch["free"] = plgpu.ClusterBarrier(
                collective_axes=("share", "row"), num_arrivals=t.warpgroups, num_barriers=t.stages
            )
        if t.splits > 1:
            by_all = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=t.warpgroups)
            scratch["read"] = by_all
            if interpret:
                scratch["sent"] = by_all
            else:
                scratch["received"] = plgpu.SMEM(
                    (t.splits, t.warpgroups, rows, self.piece),
                    jnp.float32,
                    transforms=swizzled(math.gcd(t.stored, 32), 4),
                )
                scratch["sent"] = plgpu.Barrier(num_arrivals=t.splits, num_barriers=t.warpgroups)
        return scratch


def matmul(
    x: jax.Array,
    w: jax.Array,
    tiling: Tiling,
    out_dtype: Any,
    *,
    gated: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """x [M, K] times w [N, K] transposed: [M, N], or [M, N / 2] of silu(gate) * up if gated.

    bfloat16 in; M up to `tiling.block_rows * tiling.row_blocks`.
    """
    cut = _Cut(x.shape[0], w.shape[0], w.shape[1], tiling, gated)
    if cut.m > 8 and cut.m % 8:
        # Bulk copies of swizzled tiles reach past the end of an array of less than 8 rows only.
        x = jnp.pad(x, ((0, -cut.m % 8), (0, 0)))
    out: list[Any] = [jax.ShapeDtypeStruct((cut.m, cut.width), out_dtype)]
    if interpret and tiling.splits > 1:
        # The interpreter knows no distributed shared memory: the partial sums go through here.
        cluster = (tiling.sharing, tiling.row_blocks, tiling.splits)
        lanes = (cut.clusters, *cluster, tiling.splits, tiling.warpgroups)
        out.append(jax.ShapeDtypeStruct((*lanes, tiling.rows, cut.piece), jnp.float32))

    def body(x_ref: Any, w_ref: Any, out_ref: Any, *exchange: Any, **scratch: Any) -> None:
        block = _Block(cut, scratch, exchange[0] if exchange else None, interpret)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == tiling.warpgroups)(lambda: block.load(x_ref, w_ref))
        pl.when(warpgroup < tiling.warpgroups)(lambda: block.multiply(out_ref, warpgroup))

    kernel = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=cut.scratch(x.dtype, out_dtype, interpret),
        grid=(cut.clusters,),
        grid_names=("cluster",),
        cluster=(tiling.sharing, tiling.row_blocks, tiling.splits),
        cluster_names=("share", "row", "split"),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=gated, reduction_scratch_bytes=128),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="gated_matmul" if gated else "skinny_matmul",
    )
    result: jax.Array = kernel(x, w)[0]
    return result


class _Block:
    """What the warpgroups of one block do."""

    def __init__(self, cut: _Cut, scratch: dict[str, Any], exchange: Any, interpret: bool) -> None:
        self.cut, self.tiling, self.interpret = cut, cut.tiling, interpret
        self.scratch, self.exchange = scratch, exchange
        self.cluster = lax.axis_index("cluster")
        self.share, self.row = lax.axis_index("share"), lax.axis_index("row")
        self.split = lax.axis_index("split")
        steps, splits = i32(cut.steps), i32(self.tiling.splits)
        self.first_step = lax.div(self.split * steps, splits)
        self.tile_steps = lax.div((self.split + i32(1)) * steps, splits) - self.first_step
        every = i32(cut.clusters)
        self.tile_count = lax.div(i32(cut.groups - 1) - self.cluster, every) + i32(1)

    def _first_unit(self, index: jax.Array) -> jax.Array:
        """Where the results of tile number `index` start, in units; the last tiles overlap."""
        cut, group = self.cut, self.cluster + index * i32(self.cut.clusters)
        tile = group * i32(self.tiling.sharing) + self.share
        last = (cut.width - cut.tile_width) // cut.unit
        return lax.min(tile * i32(cut.tile_width // cut.unit), i32(last))

    def _step_columns(self, at: jax.Array) -> Any:
        """Columns of x and w for step `at` of a tile."""
        if self.tiling.staggered:
            every = i32(self.cut.clusters)
            at = lax.rem(at + lax.div(self.cluster * self.tile_steps, every), self.tile_steps)
        step = self.first_step + at
        return pl.ds(step * self.tiling.tile_k, self.tiling.tile_k)

    def load(self, x_ref: Any, w_ref: Any) -> None:
        """Bring x and this block's part of w into the ring, tile after tile."""
        t, cut, scratch = self.tiling, self.cut, self.scratch
        if t.registers:
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        x_rows, w_rows = cut.loaded_rows, t.tile_n // cut.parts
        all_load = not self.interpret  # the interpreter does not know copies of a cluster
        x_axis = "share" if t.sharing > 1 and all_load else None
        w_axis = "row" if t.row_blocks > 1 and all_load else None

        def tile(index: jax.Array, turn: jax.Array) -> jax.Array:
            first_unit = self._first_unit(index)

            def step(at: jax.Array, turn: jax.Array) -> jax.Array:
                slot, columns = lax.rem(turn, i32(t.stages)), self._step_columns(at)
                full, x_slot = scratch["full"].at[slot], pl.ds(slot * x_rows, x_rows)
                free = scratch["free"].at[slot]
                pl.when(turn >= t.stages)(lambda: plgpu.barrier_wait(free))
                for part in range(cut.parts):
                    start = first_unit + i32(part * (cut.width // cut.unit))
                    plgpu.copy_gmem_to_smem(
                        w_ref.at[pl.ds(start * cut.unit, w_rows), columns],
                        scratch["w_ring"].at[slot, pl.ds(part * w_rows, w_rows)],
                        full,
                        collective_axes=w_axis,
                    )
                # Rows past the end of x read as zeros; only a traced start may reach there.
                plgpu.copy_gmem_to_smem(
                    x_ref.at[pl.ds(self.row * t.block_rows, x_rows), columns],
                    scratch["x_ring"].at[x_slot],
                    full,
                    collective_axes=x_axis,
                )
                return turn + i32(1)

            after: jax.Array = lax.fori_loop(i32(0), self.tile_steps, step, turn)
            return after

        turns = lax.fori_loop(i32(0), self.tile_count, tile, i32(0))
        if self.interpret or x_axis or w_axis:
            # The interpreter wants every arrival awaited. The chip does not mind, but no block
            # may end while another of its cluster still signals it.
            def await_readers(turn: jax.Array, carry: jax.Array) -> jax.Array:
                plgpu.barrier_wait(scratch["free"].at[lax.rem(turn, i32(t.stages))])
                return carry

            last = lax.max(turns - i32(t.stages), i32(0))
            lax.fori_loop(last, turns, await_readers, i32(0))

    def multiply(self, out_ref: Any, warpgroup: jax.Array) -> None:
        """Multiply tile after tile with one warpgroup's rows of x and store the results."""
        t, cut = self.tiling, self.cut
        if t.registers:
            plgpu.set_max_registers(t.registers, action="increase")

        def tile(index: jax.Array, turn: jax.Array) -> jax.Array:
            sums, turn = self._sums(warpgroup, turn)
            start = self._first_unit(index) + self.split * i32(cut.piece // cut.unit)
            if t.splits == 1:
                self._store(
                    lambda at, size: self._result(sums, at, size), out_ref, warpgroup, start
                )
                return turn
            pl.when(index > 0)(lambda: plgpu.barrier_wait(self.scratch["read"]))
            self._send(sums, warpgroup)
            self._store(
                lambda at, size: self._added(warpgroup, at, size), out_ref, warpgroup, start
            )
            plgpu.barrier_arrive(self.scratch["read"])
            return turn

        lax.fori_loop(i32(0), self.tile_count, tile, i32(0))
        if t.splits > 1:
            # No block may end while another of its cluster still signals it.
            plgpu.barrier_wait(self.scratch["read"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sums(self, warpgroup: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One tile's sums over this block's part of K, [rows, tile_n] float32."""
        t, scratch = self.tiling, self.scratch

        def free_before(turn: jax.Array) -> None:
            plgpu.barrier_arrive(scratch["free"].at[lax.rem(turn - i32(1), i32(t.stages))])

        def accumulate(accumulator: Any) -> tuple[jax.Array, jax.Array]:
            def step(at: jax.Array, turn: jax.Array) -> jax.Array:
                slot = lax.rem(turn, i32(t.stages))
                plgpu.barrier_wait(scratch["full"].at[slot])
                window = pl.ds(slot * self.cut.loaded_rows + warpgroup * t.rows, t.rows)
                left, right = scratch["x_ring"].at[window], scratch["w_ring"].at[slot]
                plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
                plgpu.wgmma_wait(1)  # the product before this one has been made
                pl.when(at > 0)(lambda: free_before(turn))
                return turn + i32(1)

            turns = lax.fori_loop(i32(0), self.tile_steps, step, turn)
            return accumulator[...], turns

        accumulator = plgpu.WGMMAAccumulatorRef((t.rows, t.tile_n), jnp.float32)
        sums, turn = pl.run_scoped(accumulate, accumulator)
        free_before(turn)
        return sums, turn

    def _result(self, sums: jax.Array, at: int, size: int) -> jax.Array:
        """Columns at .. at + size of the result of a tile, from all its sums."""
        if not self.cut.gated:
            return sums[:, at : at + size]
        half = self.cut.tile_width
        gate, up = sums[:, at : at + size], sums[:, half + at : half + at + size]
        return gate * lax.logistic(gate) * up

    def _send(self, sums: jax.Array, warpgroup: jax.Array) -> None:
        """Give every block of the cluster its piece of this block's sums."""
        scratch, piece = self.scratch, self.cut.piece
        for target in range(self.tiling.splits):
            part = sums[:, target * piece : (target + 1) * piece]
            if self.interpret:
                lane = (self.cluster, self.share, self.row, target, self.split, warpgroup)
                self.exchange.at[lane][...] = part
            else:
                plgpu.async_store_smem(
                    part,
                    scratch["received"].at[self.split, warpgroup],
                    scratch["sent"].at[warpgroup],
                    cluster_idx=i32(target),
                    cluster_dim="split",
                )
        if self.interpret:
            plgpu.barrier_arrive(scratch["sent"])
            plgpu.barrier_wait(scratch["sent"])
        else:
            plgpu.barrier_wait(scratch["sent"].at[warpgroup])

    def _added(self, warpgroup: jax.Array, at: int, size: int) -> jax.Array:
        """Columns at .. at + size of this block's piece, added up in the order of K."""

        def partial(source: int) -> jax.Array:
            columns = pl.ds(at, size)
            part: jax.Array
            if self.interpret:
                lane = (self.cluster, self.share, self.row, self.split, source, warpgroup)
                part = self.exchange[(*lane, slice(None), columns)]
            else:
                part = self.scratch["received"][source, warpgroup, :, columns]
            return part

        total = partial(0)
        for source in range(1, self.tiling.splits):
            total = total + partial(source)
        return total

    def _store(
        self,
        value: Callable[[int, int], jax.Array],
        out_ref: Any,
        warpgroup: jax.Array,
        start: jax.Array,
    ) -> None:
        """Store a piece: value(at, size) are its columns at .. at + size; start is in units."""
        cut, t = self.cut, self.tiling
        width, staging = t.stored, self.scratch["staging"].at[warpgroup]
        for index in range(cut.piece // width):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[...] = value(index * width, width).astype(out_ref.dtype)
            plgpu.commit_smem()
            columns = pl.ds((start + i32(index * width // cut.unit)) * cut.unit, width)
            for part in range(t.row_blocks * t.warpgroups):
                valid = min(t.rows, cut.m - part * t.rows)

                def store(part: int = part, valid: int = valid, columns: Any = columns) -> None:
                    rows = pl.ds(part * t.rows, valid)
                    plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, valid)], out_ref.at[rows, columns])

                if t.row_blocks * t.warpgroups == 1:
                    store()
                elif valid > 0:
                    pl.when(self.row * t.warpgroups + warpgroup == part)(store)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
