"""Dense attention in float64, and sequences in a permuted arena that is NaN wherever nothing is."""

import math
from dataclasses import dataclass, field

import jax.numpy as jnp
import ml_dtypes
import numpy as np

LAYERS = 3
LAYER = 1
GARBAGE = 2**30
"""What table columns past a row's last block hold: no slot."""


@dataclass
class Case:
    """Sequences of `lengths` tokens in an arena; `grow` adds what a step will write.

    Blocks are permuted over `segments` arrays, unused ones and the rest of each last block are
    NaN. Values are rounded to `dtype` before they are stored, so the oracle sees what kernels see.
    tables int32 [rows, columns] has room for `room` more tokens in every row.
    """

    rng: np.random.Generator
    lengths: list[int]
    kv_heads: int
    head_dim: int = 16
    block_size: int = 16
    packed: bool = False
    segments: int = 1
    dtype: type = np.float32
    room: int = 64
    spare_blocks: int = 3
    keys: list[np.ndarray] = field(default_factory=list)  # per row [tokens, kv heads, head_dim]
    values: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = len(self.lengths)
        columns = -(-(max([*self.lengths, 1]) + self.room) // self.block_size)
        used = [-(-(n + self.room) // self.block_size) for n in self.lengths]
        count = sum(used) + self.spare_blocks
        ids = iter(self.rng.permutation(count))
        self.tables = np.full((rows, columns), GARBAGE, np.int32)
        for row in range(rows):
            for column in range(used[row]):
                self.tables[row, column] = next(ids) * LAYERS * self.kv_heads
        lanes = (1, self.block_size, 2 * self.head_dim)
        page = lanes if self.packed else (2, self.block_size, self.head_dim)
        self.flat = np.full((count * LAYERS * self.kv_heads, *page), np.nan, np.float32)
        for row, length in enumerate(self.lengths):
            self.keys.append(np.zeros((0, self.kv_heads, self.head_dim), np.float32))
            self.values.append(self.keys[-1])
            self.grow(row, self.draw(length), self.draw(length))

    @property
    def layer_offset(self) -> np.int32:
        return np.int32(LAYER * self.kv_heads)

    @property
    def arena(self) -> tuple[np.ndarray, ...]:
        """The segments as they are now."""
        return self.split(self.flat)

    def split(self, flat: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cut slots into segments: whole blocks, of different sizes."""
        block = LAYERS * self.kv_heads
        blocks = flat.shape[0] // block
        cuts = [blocks * (i + 1) // (self.segments + 1) * block for i in range(self.segments - 1)]
        return tuple(part.astype(self.dtype) for part in np.split(flat, cuts))

    def draw(self, tokens: int, heads: int | None = None) -> np.ndarray:
        """Normal numbers [tokens, heads, head_dim], float32, rounded to the case's dtype."""
        drawn = self.rng.standard_normal((tokens, heads or self.kv_heads, self.head_dim))
        return drawn.astype(self.dtype).astype(np.float32)

    def place(self, row: int, position: int) -> tuple[int, int]:
        """(slot of head 0, offset) of a position."""
        base = int(self.tables[row, position // self.block_size])
        return base + int(self.layer_offset), position % self.block_size

    def grow(self, row: int, k: np.ndarray, v: np.ndarray) -> None:
        """Append tokens k, v [tokens, kv heads, head_dim] to a row, in the arena too."""
        for token in range(k.shape[0]):
            slot, offset = self.place(row, self.keys[row].shape[0] + token)
            for head in range(self.kv_heads):
                page = self.flat[slot + head]
                if self.packed:
                    page[0, offset] = np.concatenate([k[token, head], v[token, head]])
                else:
                    page[0, offset], page[1, offset] = k[token, head], v[token, head]
        self.keys[row] = np.concatenate([self.keys[row], k])
        self.values[row] = np.concatenate([self.values[row], v])

    def dense(
        self,
        q: np.ndarray,
        row: int,
        position: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One query [heads, head_dim] of a row: output [heads, head_dim] and log-sum-exp [heads].

        A negative position sees nothing: zeros and -inf.
        """
        first = 0 if window is None else max(0, position - window + 1)
        keys = self.keys[row][first : position + 1].astype(np.float64)
        values = self.values[row][first : position + 1].astype(np.float64)
        if position < 0:
            return np.zeros(q.shape), np.full(q.shape[0], -np.inf)
        group = q.shape[0] // self.kv_heads
        out, lse = [], []
        for head in range(q.shape[0]):
            scores = keys[:, head // group] @ q[head].astype(np.float64) * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            top = scores.max()
            weights = np.exp(scores - top)
            out.append(weights @ values[:, head // group] / weights.sum())
            lse.append(top + math.log(weights.sum()))
        return np.array(out), np.array(lse)


def bfloat16_case(rng: np.random.Generator, lengths: list[int], kv_heads: int, **rest) -> Case:
    """A case as accelerators have it: bfloat16, packed if the head is 64 wide."""
    head_dim = rest.setdefault("head_dim", 128)
    rest.setdefault("packed", head_dim == 64)
    return Case(rng, lengths, kv_heads, dtype=ml_dtypes.bfloat16, **rest)


def assert_same_arena(case: Case, arena: tuple) -> None:
    """Bit-equal to the case's arena, NaN where nothing was stored included."""
    for found, expected in zip(arena, case.arena, strict=True):
        np.testing.assert_array_equal(
            np.asarray(jnp.asarray(found).astype(jnp.float32)), expected.astype(np.float32)
        )
