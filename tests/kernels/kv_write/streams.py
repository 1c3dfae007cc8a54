"""Token streams into an arena full of NaN and noise, and what must come of them."""

from dataclasses import dataclass

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from lumen_kernels.arena import ArenaShape

BF16 = ml_dtypes.bfloat16


@dataclass(frozen=True)
class Layout:
    """What an arena looks like."""

    heads: int
    head_dim: int
    block_size: int = 16
    packed: bool = False
    segments: int = 1
    dtype: type = BF16

    @property
    def page(self) -> tuple[int, int, int]:
        if self.packed:
            return 1, self.block_size, 2 * self.head_dim
        return 2, self.block_size, self.head_dim

    def shape(self, slots: tuple[int, ...]) -> ArenaShape:
        return ArenaShape(slots, self.block_size, self.head_dim, self.packed)


# Every form once: heads of a 70B on eight devices, an 8B, an odd ratio, Gemma's width, packed.
LAYOUTS = (
    Layout(8, 128),
    Layout(1, 128, 64, segments=2),
    Layout(3, 128, 32),
    Layout(4, 256, segments=4),
    Layout(4, 64, packed=True),
    Layout(1, 64, 32, packed=True, segments=3),
)

# (tokens, position of the first) of one sequence after the other; a negative count: not stored.
PREFILL = ((1, 5), (3, 14), (20, 9), (-3, 0), (1, 0), (33, 16), (-2, 0), (16, 16), (7, 31))
DECODE = ((1, 0), (1, 15), (-1, 0), (1, 16), (1, 47), (1, 1), (-2, 0), (1, 8))


class Stream:
    """Tokens of a stream with their places, and an arena of two layers to write layer 1 of."""

    def __init__(self, layout: Layout, parts=PREFILL, seed: int = 0) -> None:
        self.layout = layout
        rng = np.random.default_rng(seed)
        stride = 2 * layout.heads
        blocks = sum(-(-(abs(count) + start) // layout.block_size) for count, start in parts)
        per_segment = -(-blocks // layout.segments)
        sizes = [(per_segment + index) * stride for index in range(layout.segments)]
        self.slots_of_segments = tuple(sizes)
        self.cuts = np.cumsum(sizes)[:-1]
        before = rng.normal(size=(sum(sizes), *layout.page)).astype(layout.dtype)
        before[rng.random(len(before)) < 0.5] = np.nan
        self.before = before
        free = iter(rng.permutation(sum(sizes) // stride) * stride)
        slots, offsets = [], []
        for count, start in parts:
            base = -1 - rng.integers(5)
            for position in range(start, start + abs(count)):
                if count > 0 and (position == start or position % layout.block_size == 0):
                    base = next(free)
                slots.append(base)
                offsets.append(position % layout.block_size)
        self.slots, self.offsets = np.array(slots, np.int32), np.array(offsets, np.int32)
        shape = (len(slots), layout.heads, layout.head_dim)
        self.k, self.v = (rng.normal(size=shape).astype(layout.dtype) for _ in range(2))
        self.layer_offset = np.int32(layout.heads)

    @property
    def arena(self):
        return tuple(map(jnp.asarray, np.split(self.before, self.cuts)))

    @property
    def arguments(self):
        return self.k, self.v, self.arena, self.slots, self.offsets, self.layer_offset

    def check(self, arena) -> None:
        """Written rows are there and nothing else has changed, bit by bit."""
        expected = self.before.copy()
        heads = np.arange(self.layout.heads)
        for token in np.flatnonzero(self.slots >= 0):
            rows = self.slots[token] + self.layer_offset + heads, self.offsets[token]
            if self.layout.packed:
                both = np.concatenate([self.k[token], self.v[token]], axis=1)
                expected[rows[0], 0, rows[1]] = both
            else:
                expected[rows[0], 0, rows[1]] = self.k[token]
                expected[rows[0], 1, rows[1]] = self.v[token]
        bits = np.dtype(f"u{self.before.dtype.itemsize}")
        got = np.concatenate([np.asarray(segment) for segment in arena])
        np.testing.assert_array_equal(got.view(bits), expected.view(bits))
