"""What a chain of products consists of, and how it is cut over a chip: by shapes alone.

Llama-3.1-8B's layer on one H200, bfloat16, November 2026, docs/results/kernels.md: the chain beats
its products one by one up to 32 rows. At 64 it loses: there every block reads more of x, which has
to pass through the L2 cache, than of w.
"""

import enum
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

ROWS = 64
"""Rows of x in WGMMA's window."""

SUBTILE = 64
"""Columns of x and w in one swizzled row of 128 bytes."""

_MOST_ROWS = 32
_LEAST_WEIGHTS = 1 << 25  # elements in all phases; chains of small layers were not measured
_ROW_BYTES = SUBTILE * 2
_SHARED_MEMORY = 232448  # bytes a block may use on Hopper
_RESERVED = 6144  # of them for barriers, alignment and reductions
_SLOT_ROWS = 256  # at most, of 128 bytes, in a slot of w
_LONGEST_STEP = 8  # subtiles
_X_STAGES = 4
_LEAST_W_STAGES = 3
_LEAST_BUSY = 0.75  # of the cores; fewer may not keep the memory busy
_SQUARES = 8  # tiles whose sums of squares are added at a time


class Role(enum.Enum):
    """What becomes of a phase's sums."""

    RESIDUAL = "residual"  # added to hidden states; made ready for the norm that follows
    GATED = "gated"  # scaled by the norm; silu(gate) * up
    PLAIN = "plain"  # scaled by the norm


@dataclass(frozen=True, slots=True)
class Phase:
    """One product of the chain: x [m, depth] times w [columns, depth] transposed.

    GATED: w is [2 * columns, depth], gates first. The fields after depth name buffers: x, w, what
    stands beside (the residual, or the rows' sums of squares), and what is made: out and, where
    `norm` says with which of the two norms' weights, normed and squares.
    """

    role: Role
    columns: int
    depth: int
    x: str
    w: str
    beside: str
    out: str
    normed: str = ""
    squares: str = ""
    norm: int | None = None

    @property
    def halves(self) -> int:
        """Rows of w for a column of the result."""
        return 2 if self.role is Role.GATED else 1

    @property
    def weights(self) -> int:
        """Elements of w."""
        return self.halves * self.columns * self.depth

    @property
    def reads(self) -> tuple[str, ...]:
        """Buffers it needs."""
        norms = () if self.norm is None else ("norms",)
        return (self.x, self.w, self.beside, *norms)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a chain for m rows is cut.

    tiles: columns of a tile, phase by phase. clusters: of `sharing` blocks, which load x for one
    another; a block has one tile at a time, and at least one in every phase. x_subtiles: in a slot
    of x. w_slot: rows of 128 bytes in a slot of w. x_stages, w_stages: slots.
    """

    m: int
    phases: tuple[Phase, ...]
    tiles: tuple[int, ...]
    sharing: int
    clusters: int
    x_subtiles: int
    x_stages: int
    w_slot: int
    w_stages: int

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return self.clusters * self.sharing

    @property
    def arrivals(self) -> int:
        """Of blocks at the meetings between phases."""
        return self.blocks * (len(self.phases) - 1)

    @property
    def rows(self) -> int:
        """Rows of x in shared memory."""
        return rows_of(self.m)

    @property
    def x_rows(self) -> int:
        """Rows of 128 bytes in a slot of x."""
        return self.x_subtiles * self.rows

    def tile(self, phase: Phase) -> int:
        """Columns of a tile."""
        return self.tiles[self.phases.index(phase)]

    def w_subtiles(self, phase: Phase) -> int:
        """Subtiles of w in a slot, for all of a tile's rows."""
        return _subtiles(phase, self.tile(phase), self.w_slot)

    def x_subtiles_of(self, phase: Phase) -> int:
        """Subtiles of x that are loaded at a time."""
        return min(self.x_subtiles, self.w_subtiles(phase))

    def groups(self, phase: Phase) -> int:
        """Sets of neighbouring tiles, one for a cluster at a time."""
        return -(-phase.columns // (self.tile(phase) * self.sharing))

    def w_steps(self, phase: Phase) -> int:
        """Slots of w along a tile's depth."""
        return phase.depth // (SUBTILE * self.w_subtiles(phase))

    def x_copies(self, phase: Phase) -> int:
        """Copies that fill a slot of x."""
        return 1 if self.blocked(phase.x) else self.x_subtiles_of(phase)

    def blocked(self, name: str) -> bool:
        """Whether a buffer is kept as [columns / 64 * rows, 64], the way it is read as x."""
        made = {name for phase in self.phases for name in (phase.normed, phase.out)}
        return name in made and any(name == phase.x for phase in self.phases)

    def made_by(self, phase: Phase) -> dict[str, jax.ShapeDtypeStruct]:
        """Buffers a phase makes."""

        def states(name: str) -> jax.ShapeDtypeStruct:
            shape = (self.m, phase.columns)
            if self.blocked(name):
                shape = (phase.columns // SUBTILE * self.rows, SUBTILE)
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

        shapes = {phase.out: states(phase.out)}
        if phase.norm is not None:
            shapes[phase.normed] = states(phase.normed)
            tiles = phase.columns // self.tile(phase)
            shapes[phase.squares] = jax.ShapeDtypeStruct((tiles * ROWS,), jnp.float32)
        return shapes


def rows_of(m: int) -> int:
    """m rounded up to whole tiles of shared memory."""
    return -(-m // 8) * 8


def layer_phases(hidden: int, heads: int, inner: int, qkv: int | None) -> tuple[Phase, ...]:
    """From attention's result [m, heads] to the layer's hidden states and the next layer's qkv.

    qkv: the next layer's columns; None where no layer follows.
    """
    first = Phase(
        Role.RESIDUAL, hidden, heads, "attended", "o", "hidden",
        "mid", "mid_normed", "mid_squares", 0,
    )  # fmt: skip
    second = Phase(Role.GATED, inner, hidden, "mid_normed", "gate_up", "mid_squares", "inner")
    third = (Role.RESIDUAL, hidden, inner, "inner", "down", "mid", "out")
    if qkv is None:
        return first, second, Phase(*third)
    return (
        first,
        second,
        Phase(*third, "out_normed", "out_squares", 1),
        Phase(Role.PLAIN, qkv, hidden, "out_normed", "qkv", "out_squares", "projected"),
    )


def cut(m: int, phases: tuple[Phase, ...], cores: int) -> Cut | None:
    """The cut for m rows; None where the products are better made one by one."""
    if not 0 < m <= _MOST_ROWS or sum(phase.weights for phase in phases) < _LEAST_WEIGHTS:
        return None
    return fitted(m, phases, cores)


def fitted(m: int, phases: tuple[Phase, ...], cores: int) -> Cut | None:
    """A cut for m <= 64 rows; None where none fits."""
    if any(phase.depth % SUBTILE for phase in phases):
        return None
    rows = rows_of(m)
    sharing = 1 if rows <= 16 or cores < 2 else 2
    blocks = cores // sharing * sharing
    tiles = tuple(_tile(phase, blocks) for phase in phases)
    if not all(tiles):
        return None
    pairs = list(zip(phases, tiles, strict=True))
    # A block without a tile would not wait for a phase, and meet the others at the wrong place.
    groups = min(-(-phase.columns // (tile * sharing)) for phase, tile in pairs)
    clusters = min(cores // sharing, groups)
    if clusters * sharing < _LEAST_BUSY * cores:
        return None
    w_slot = max(tile * phase.halves * _subtiles(phase, tile, _SLOT_ROWS) for phase, tile in pairs)
    x_subtiles = _LONGEST_STEP
    while x_subtiles * rows > 128:
        x_subtiles //= 2
    used = _RESERVED + (_X_STAGES * x_subtiles * rows + ROWS - rows) * _ROW_BYTES
    used += max(
        ROWS * tile * 2 * (3 if phase.role is Role.RESIDUAL else 1) for phase, tile in pairs
    )
    w_stages = (_SHARED_MEMORY - used) // (w_slot * _ROW_BYTES)
    if w_stages < _LEAST_W_STAGES:
        return None
    return Cut(
        m=m,
        phases=phases,
        tiles=tiles,
        sharing=sharing,
        clusters=clusters,
        x_subtiles=x_subtiles,
        x_stages=_X_STAGES,
        w_slot=w_slot,
        w_stages=w_stages,
    )


def _tile(phase: Phase, blocks: int) -> int:
    """The largest tile that keeps as many blocks busy as any, within 2 %; 0 where none divides.

    A slot of w then holds at least 256 bytes of each row: shorter pieces read the memory worse.
    """
    match phase.role:
        case Role.RESIDUAL:
            # Stored as x is read, a divisor of its 64 columns at a time.
            sizes = [16, 32, 64]
        case Role.GATED:
            sizes = list(range(16, 72, 8))
        case Role.PLAIN:
            sizes = list(range(16, 136, 8))
    sizes = [size for size in sizes if phase.columns % size == 0]
    if phase.role is Role.RESIDUAL:
        # Also of a last layer, without a norm after it: both its residuals share one buffer.
        sizes = [size for size in sizes if phase.columns // size % _SQUARES == 0]

    def busy(size: int) -> float:
        tiles = phase.columns // size
        return tiles / (math.ceil(tiles / blocks) * blocks)

    best = max(map(busy, sizes), default=0.0)
    return max((size for size in sizes if busy(size) >= best - 0.02), default=0)


def _subtiles(phase: Phase, tile: int, slot: int) -> int:
    """Subtiles of w for a slot: a power of two that divides the depth."""
    size = 1
    while size * 2 <= min(_LONGEST_STEP, slot // (tile * phase.halves)) and not (
        phase.depth % (SUBTILE * size * 2)
    ):
        size *= 2
    return size
