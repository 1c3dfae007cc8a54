"""Everything between two attentions as one launch on NVIDIA Hopper (Pallas Mosaic GPU).

Few rows of x: what counts is that the weights never stop streaming. A launch per product stops
them twice, at its ramp and at its tail; here one persistent grid runs phase after phase. Blocks
meet between phases, but only x waits for that: weights have a ring and a loading warpgroup of their
own, which run on into the next phase while sums are stored, blocks meet and x arrives.

A third warpgroup multiplies: x is WGMMA's left operand, 64 rows, w.T the right one. x has as many
rows in shared memory as there are, rounded up to 8; the left operand's window of 64 then reaches
into what follows, and those rows are never stored. With many rows two blocks, a cluster, load half
of x each and send it to both. Between phases x is kept as [columns / 64, rows, 64], so that a slot
of its ring is one copy.

The norm is taken apart. Where hidden states are made, each is multiplied with its column's weight,
and the tile's sum of squares is stored for every row; the product that follows multiplies its sums
with the row's factor. All sums have one order: a row has the same bits whatever the others are.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from lumen_kernels.dense_chain.cut import ROWS, SUBTILE, Cut, Phase, Role
from lumen_kernels.hopper import i32, swizzled

_LOADER_REGISTERS = 40
_REGISTERS = 232
_SQUARES = 8  # tiles whose sums of squares are added at a time


def run(
    cut: Cut,
    given: Mapping[str, jax.Array],
    meetings: jax.Array,
    eps: float,
    *,
    interpret: bool = False,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Run the phases of `cut` on the buffers `given`; returns every buffer they make.

    Besides the phases' buffers there are norms float32 [rows, hidden], the weights of all norms,
    and place int32 [2]: the row of the first norm, and what meetings holds.

    meetings: int32 [1], in which every block counts that it arrives at a meeting; returned as the
    run leaves it. The interpreter has no barrier over a grid: there each phase is a launch of its
    own.
    """
    if not interpret:
        return _launch(cut, cut.phases, given, meetings, eps, interpret=False)
    buffers = dict(given)
    for phase in cut.phases:
        made, meetings = _launch(cut, (phase,), buffers, meetings, eps, interpret=True)
        buffers |= made
    return {name: buffers[name] for phase in cut.phases for name in cut.made_by(phase)}, meetings


def _launch(
    cut: Cut,
    phases: tuple[Phase, ...],
    given: Mapping[str, jax.Array],
    meetings: jax.Array,
    eps: float,
    *,
    interpret: bool,
) -> tuple[dict[str, jax.Array], jax.Array]:
    made = {name: shape for phase in phases for name, shape in cut.made_by(phase).items()}
    read = [name for phase in phases for name in phase.reads if name not in made]
    read = list(dict.fromkeys([*read, "place"]))

    def body(*refs: Any, **scratch: Any) -> None:
        names = dict(zip([*read, "meetings", *made], refs, strict=True))
        block = _Block(cut, phases, names, scratch, eps, interpret)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(block.multiply)
        pl.when(warpgroup == 1)(block.load_w)
        pl.when(warpgroup == 2)(block.load_x)

    kernel = plgpu.kernel(
        body,
        out_type=list(made.values()),
        scratch_types=_scratch(cut, interpret),
        grid=(cut.clusters,),
        grid_names=("cluster",),
        cluster=(cut.sharing,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
        kernel_name="dense_chain",
    )
    meetings_ref = jax.new_ref(meetings)
    results = kernel(*(given[name] for name in read), meetings_ref)
    return dict(zip(made, results, strict=True)), jax.freeze(meetings_ref)


def _scratch(cut: Cut, interpret: bool) -> dict[str, Any]:
    """Rings, staging buffers and barriers."""
    operand, bf16 = swizzled(SUBTILE, 2), jnp.bfloat16
    x_free: Any = plgpu.Barrier(num_arrivals=1, num_barriers=cut.x_stages)
    if cut.sharing > 1 and not interpret:
        x_free = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=1, num_barriers=cut.x_stages
        )
    window = ROWS - cut.rows
    scratch = {
        "x_ring": plgpu.SMEM(
            (cut.x_stages * cut.x_rows + window, SUBTILE), bf16, transforms=operand
        ),
        # One ring of weights, seen by each phase in its own shape.
        "w_ring": plgpu.RefUnion(
            *(
                plgpu.SMEM(
                    (cut.w_stages, cut.w_slot // subtiles, SUBTILE * subtiles),
                    bf16,
                    transforms=operand,
                )
                for subtiles in _shapes(cut)
            )
        ),
        "squares": plgpu.SMEM((ROWS,), jnp.float32),
        "partial_squares": plgpu.SMEM((_SQUARES * ROWS,), jnp.float32),
        "factors": plgpu.SMEM((ROWS,), jnp.float32),
        "meeting": plgpu.SMEM((1,), jnp.int32),
        "w_free": plgpu.Barrier(num_arrivals=1, num_barriers=cut.w_stages),
        "x_free": x_free,
        "residual_here": plgpu.Barrier(num_arrivals=1),
    }
    for index, phase in enumerate(cut.phases):
        for name, arrivals, stages in (
            ("w_full", phase.halves, cut.w_stages),
            ("x_full", cut.x_copies(phase), cut.x_stages),
        ):
            scratch[f"{name}_{index}"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)
    # Results on their way out: of one phase at a time.
    scratch["staging"] = plgpu.RefUnion(
        *([plgpu.SMEM(shape, bf16) for shape in shapes] for shapes in _staging(cut).values())
    )
    return scratch


def _staging(cut: Cut) -> dict[Role, list[tuple[int, int]]]:
    """Buffers for a tile's results and, under RESIDUAL, last for what is added to them."""
    found: dict[Role, list[tuple[int, int]]] = {}
    for phase, tile in zip(cut.phases, cut.tiles, strict=True):
        match phase.role:
            case Role.RESIDUAL:
                found[phase.role] = [(ROWS, tile)] * 3
            case Role.GATED:
                piece = math.gcd(tile, SUBTILE)
                found[phase.role] = [(ROWS, piece)] * (tile // piece)
            case Role.PLAIN:
                found[phase.role] = [(ROWS, tile)]
    return found


def _shapes(cut: Cut) -> list[int]:
    return sorted({cut.w_subtiles(phase) for phase in cut.phases})


class _Block:
    """What the three warpgroups of one block do."""

    def __init__(
        self,
        cut: Cut,
        phases: tuple[Phase, ...],
        refs: Mapping[str, Any],
        scratch: Mapping[str, Any],
        eps: float,
        interpret: bool,
    ) -> None:
        self.cut, self.phases, self.refs, self.scratch = cut, phases, refs, scratch
        self.eps, self.interpret = eps, interpret
        self.cluster, self.member = lax.axis_index("cluster"), lax.axis_index("member")
        self.w_rings = dict(zip(_shapes(cut), scratch["w_ring"], strict=True))
        self.staging = dict(zip(_staging(cut), scratch["staging"], strict=True))

    def _tile_count(self, phase: Phase) -> jax.Array:
        """Tiles of this block."""
        every = self.cut.clusters
        last = i32(self.cut.groups(phase) + every - 1) - self.cluster
        return lax.div(last, i32(every))

    def _number(self, phase: Phase, index: jax.Array) -> jax.Array:
        """Number of this block's tile `index`; the last ones of a phase may be the same."""
        group = self.cluster + index * i32(self.cut.clusters)
        tile = group * i32(self.cut.sharing) + self.member
        return lax.min(tile, i32(phase.columns // self.cut.tile(phase) - 1))

    def _of_phase(self, name: str, phase: Phase) -> Any:
        return self.scratch[f"{name}_{self.cut.phases.index(phase)}"]

    def load_w(self) -> None:
        """Bring this block's rows of w into their ring, phase after phase."""
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        stages, free = self.cut.w_stages, self.scratch["w_free"]
        turn = i32(0)
        for phase in self.phases:
            steps, full = i32(self.cut.w_steps(phase)), self._of_phase("w_full", phase)
            size, subtiles = self.cut.tile(phase), self.cut.w_subtiles(phase)
            width, ring = SUBTILE * subtiles, self.w_rings[subtiles]

            def step(
                at: jax.Array,
                turn: jax.Array,
                *,
                phase: Phase = phase,
                steps: jax.Array = steps,
                full: Any = full,
                size: int = size,
                width: int = width,
                ring: Any = ring,
            ) -> jax.Array:
                slot = lax.rem(turn, i32(stages))
                pl.when(turn >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                first = self._number(phase, lax.div(at, steps)) * size
                columns = pl.ds(lax.rem(at, steps) * width, width)
                for half in range(phase.halves):
                    rows = pl.ds(first + half * phase.columns, size)
                    plgpu.copy_gmem_to_smem(
                        self.refs[phase.w].at[rows, columns],
                        ring.at[slot, pl.ds(half * size, size)],
                        full.at[slot],
                    )
                return turn + i32(1)

            turn = lax.fori_loop(i32(0), self._tile_count(phase) * steps, step, turn)
        if self.interpret:
            self._drain(turn, stages, free)

    def load_x(self) -> None:
        """Bring x into its ring, phase after phase, each when all blocks have made it."""
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
        cut, stages, free = self.cut, self.cut.x_stages, self.scratch["x_free"]
        shared = "member" if cut.sharing > 1 and not self.interpret else None
        # Others may have arrived at the first meeting already: the counter would not say.
        before = self.refs["place"][1]
        turn = i32(0)
        for index, phase in enumerate(self.phases):
            if index > 0:
                self.scratch["meeting"][0] = before + i32(index * cut.blocks)
                plgpu.commit_smem()
                _await_meeting(self.refs["meetings"], self.scratch["meeting"])
            full, subtiles = self._of_phase("x_full", phase), cut.x_subtiles_of(phase)
            steps = i32(phase.depth // (SUBTILE * subtiles))

            def step(
                at: jax.Array,
                turn: jax.Array,
                *,
                phase: Phase = phase,
                steps: jax.Array = steps,
                full: Any = full,
                subtiles: int = subtiles,
            ) -> jax.Array:
                slot = lax.rem(turn, i32(stages))
                pl.when(turn >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                for source, begin, rows in self._x_parts(phase, lax.rem(at, steps), subtiles):
                    room = self.scratch["x_ring"].at[pl.ds(slot * cut.x_rows + begin, rows)]
                    plgpu.copy_gmem_to_smem(source, room, full.at[slot], collective_axes=shared)
                return turn + i32(1)

            turn = lax.fori_loop(i32(0), self._tile_count(phase) * steps, step, turn)
        if self.interpret or shared:
            # The interpreter wants every arrival awaited. The chip does not mind, but no block
            # may end while another of its cluster still signals it.
            self._drain(turn, stages, free)

    def _x_parts(self, phase: Phase, step: jax.Array, subtiles: int) -> list[tuple[Any, int, int]]:
        """Parts of x for a step: where from, and at which row of a slot how many rows."""
        rows, x_ref = self.cut.rows, self.refs[phase.x]
        if self.cut.blocked(phase.x):
            every = subtiles * rows
            return [(x_ref.at[pl.ds(step * every, every)], 0, every)]
        # Rows past the end of x read as zeros; only a traced start may reach there.
        first_row = self.member * 0 if rows > x_ref.shape[0] else 0
        some = pl.ds(first_row, rows)
        return [
            (x_ref.at[some, pl.ds((step * subtiles + sub) * SUBTILE, SUBTILE)], sub * rows, rows)
            for sub in range(subtiles)
        ]

    def _drain(self, turn: jax.Array, stages: int, free: Any) -> None:
        def wait(turn: jax.Array, carry: jax.Array) -> jax.Array:
            plgpu.barrier_wait(free.at[lax.rem(turn, i32(stages))])
            return carry

        lax.fori_loop(lax.max(turn - i32(stages), i32(0)), turn, wait, i32(0))

    def multiply(self) -> None:
        """Multiply tile after tile, phase after phase, and store what becomes of the sums."""
        plgpu.set_max_registers(_REGISTERS, action="increase")
        turns = (i32(0), i32(0))
        for index, phase in enumerate(self.phases):

            def tile(at: jax.Array, turns: Any, phase: Phase = phase) -> Any:
                number = self._number(phase, at)
                weight = None
                if phase.role is Role.RESIDUAL:
                    self._ask_residual(phase, number)
                    weight = self._norm_weight(phase, number)
                sums, turns = self._sums(phase, turns)
                if phase.role is not Role.RESIDUAL:
                    pl.when(at == 0)(lambda: self._find_factors(phase))
                match phase.role:
                    case Role.RESIDUAL:
                        self._finish_residual(phase, number, sums, weight)
                    case Role.GATED:
                        self._finish_gated(phase, number, sums)
                    case Role.PLAIN:
                        self._finish_plain(phase, number, sums)
                return turns

            turns = lax.fori_loop(i32(0), self._tile_count(phase), tile, turns)
            if index + 1 < len(self.phases):
                plgpu.wait_smem_to_gmem(0)
                _arrive_at_meeting(self.refs["meetings"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sums(self, phase: Phase, turns: Any) -> tuple[jax.Array, Any]:
        """One tile's sums [64, halves * tile] float32; turns: of the ring of x, of that of w."""
        cut, scratch, width = self.cut, self.scratch, self.cut.tile(phase) * phase.halves
        x_full, w_full = self._of_phase("x_full", phase), self._of_phase("w_full", phase)
        x_stages, w_stages = i32(cut.x_stages), i32(cut.w_stages)
        subtiles, together = cut.w_subtiles(phase), cut.x_subtiles_of(phase)
        ring = self.w_rings[subtiles]

        def accumulate(accumulator: Any) -> tuple[jax.Array, Any]:
            def step(_: jax.Array, turns: Any) -> Any:
                x_turn, w_turn = turns
                w_slot = lax.rem(w_turn, w_stages)
                plgpu.barrier_wait(w_full.at[w_slot])
                for begin in range(0, subtiles, together):
                    x_slot = lax.rem(x_turn, x_stages)
                    plgpu.barrier_wait(x_full.at[x_slot])
                    for sub in range(together):
                        window = pl.ds(x_slot * cut.x_rows + sub * cut.rows, ROWS)
                        columns = pl.ds((begin + sub) * SUBTILE, SUBTILE)
                        right = ring.at[w_slot, pl.ds(0, width), columns]
                        left = scratch["x_ring"].at[window]
                        plgpu.wgmma(accumulator, left, right.transpose((1, 0)))
                    # Waiting here, not a step later, keeps one more slot of each ring loading.
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(scratch["x_free"].at[x_slot])
                    x_turn = x_turn + i32(1)
                plgpu.barrier_arrive(scratch["w_free"].at[w_slot])
                return x_turn, w_turn + i32(1)

            after = lax.fori_loop(i32(0), i32(cut.w_steps(phase)), step, turns)
            return accumulator[...], after

        accumulator = plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)
        found: tuple[jax.Array, Any] = pl.run_scoped(accumulate, accumulator)
        return found

    def _ask_residual(self, phase: Phase, number: jax.Array) -> None:
        """Start to load what a tile's sums are added to."""
        size, rows, ref = self.cut.tile(phase), self.cut.rows, self.refs[phase.beside]
        first_row = self.member * 0 if rows > ref.shape[0] else 0
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(
            ref.at[pl.ds(first_row, rows), pl.ds(number * size, size)],
            self.staging[Role.RESIDUAL][2].at[pl.ds(0, rows)],
            self.scratch["residual_here"],
        )

    def _norm_weight(self, phase: Phase, number: jax.Array) -> jax.Array | None:
        """Of a tile's columns, float32."""
        if phase.norm is None:
            return None
        size = self.cut.tile(phase)
        row = self.refs["place"][0] + i32(phase.norm)
        columns = self.refs["norms"].at[row, pl.ds(number * size, size)]
        return plgpu.load(columns, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def _finish_residual(
        self, phase: Phase, number: jax.Array, sums: jax.Array, weight: jax.Array | None
    ) -> None:
        """Store hidden states and, for the norm that follows, what its product reads."""
        size, scratch = self.cut.tile(phase), self.scratch
        staging, normed, residual = self.staging[Role.RESIDUAL]
        plgpu.barrier_wait(scratch["residual_here"])
        before = plgpu.load(residual, layout=plgpu.Layout.WGMMA, optimized=False)
        hidden = (sums + before.astype(jnp.float32)).astype(jnp.bfloat16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = hidden
        columns = pl.ds(number * size, size)
        if weight is not None:
            wide = hidden.astype(jnp.float32)
            scratch["squares"][...] = jnp.sum(wide * wide, axis=1)
            by_column = lax.broadcast_in_dim(weight, wide.shape, (1,))
            normed[...] = (wide * by_column).astype(jnp.bfloat16)
        plgpu.commit_smem()
        self._store(staging, self.refs[phase.out], columns)
        if phase.norm is not None:
            self._store_blocked(normed, self.refs[phase.normed], number, size)
            plgpu.copy_smem_to_gmem(
                scratch["squares"], self.refs[phase.squares].at[pl.ds(number * ROWS, ROWS)]
            )

    def _finish_gated(self, phase: Phase, number: jax.Array, sums: jax.Array) -> None:
        """Store silu(gate) * up."""
        size, staging = self.cut.tile(phase), self.staging[Role.GATED]
        factor = self._factors((ROWS, size))
        piece = math.gcd(size, SUBTILE)
        gate, up = sums[:, :size] * factor, sums[:, size:] * factor
        inner = (gate * up / (1.0 + jnp.exp(-gate))).astype(jnp.bfloat16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for at, buffer in enumerate(staging):
            buffer[...] = inner[:, at * piece : (at + 1) * piece]
        plgpu.commit_smem()
        for at, buffer in enumerate(staging):
            place = number * i32(len(staging)) + i32(at)
            self._store_blocked(buffer, self.refs[phase.out], place, piece)

    def _finish_plain(self, phase: Phase, number: jax.Array, sums: jax.Array) -> None:
        size, (staging,) = self.cut.tile(phase), self.staging[Role.PLAIN]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = (sums * self._factors(sums.shape)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        self._store(staging, self.refs[phase.out], pl.ds(number * size, size))

    def _store(self, buffer: Any, ref: Any, columns: Any) -> None:
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, ref.shape[0])], ref.at[:, columns])

    def _store_blocked(self, buffer: Any, ref: Any, number: jax.Array, size: int) -> None:
        """Store columns number * size .. + size, a divisor of 64, as x is read."""
        rows, parts = self.cut.rows, SUBTILE // size
        block, part = lax.div(number, i32(parts)), lax.rem(number, i32(parts))
        place = ref.at[pl.ds(block * rows, rows), pl.ds(part * size, size)]
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows)], place)

    def _find_factors(self, phase: Phase) -> None:
        """Make what the norm multiplies each row with."""
        squares, partial = self.refs[phase.beside], self.scratch["partial_squares"]
        chunk = _SQUARES * ROWS
        layout = plgpu.Layout.WG_STRIDED((chunk,), vec_size=4)
        parts = [
            plgpu.load(squares.at[pl.ds(at, chunk)], layout=layout)
            for at in range(0, squares.shape[0], chunk)
        ]
        partial[...] = sum(parts[1:], parts[0])
        plgpu.commit_smem()
        sums = [self._by_row(partial.at[pl.ds(at, ROWS)]) for at in range(0, chunk, ROWS)]
        mean = sum(sums[1:], sums[0]) / phase.depth
        self.scratch["factors"][...] = lax.rsqrt(mean + self.eps)
        plgpu.commit_smem()

    def _factors(self, shape: tuple[int, ...]) -> jax.Array:
        return lax.broadcast_in_dim(self._by_row(self.scratch["factors"]), shape, (0,))

    def _by_row(self, ref: Any) -> jax.Array:
        rows: jax.Array = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return rows


def _arrive_at_meeting(meetings: Any) -> None:
    """Tell the other blocks that this warpgroup's stores are done."""

    def arrive(_: Any, counter: Any) -> None:
        mgpu.warpgroup_barrier()
        mgpu.SemaphoreRef(mgpu.memref_ptr(counter)).signal(1, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(arrive)(meetings)


def _await_meeting(meetings: Any, goal: Any) -> None:
    """Wait until `goal` arrivals have been counted; then what the blocks stored can be loaded."""

    def wait(_: Any, counter: Any, goal: Any) -> None:
        value = memref.load(goal, [mgpu.c(0, ir.IndexType.get())])
        mgpu.SemaphoreRef(mgpu.memref_ptr(counter)).wait(value, decrement=False, memory_scope="gpu")
        # Stored and loaded by the asynchronous proxy, awaited by this thread.
        mgpu.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(wait)(meetings, goal)
