"""What is measured: the shapes of an 8B model on one device, and tiny ones to try the tool."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Model:
    """The attention heads of a model, as one device sees them."""

    query_heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @property
    def slots_per_block(self) -> int:
        """Arena slots of one block: all layers and KV heads."""
        return self.layers * self.kv_heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's K and V in one layer, bfloat16."""
        return 2 * self.kv_heads * self.head_dim * 2

    @property
    def scale(self) -> float:
        """What attention scores are multiplied with."""
        return 1.0 / math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True)
class Prompts:
    """A prefill call: `rows` sequences of `new` tokens, each behind a prefix."""

    name: str
    rows: int
    new: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Product:
    """A weight matrix [columns, depth], and the numbers of rows that it is multiplied with.

    gated: it is [gate | up], and silu of the one half times the other is made of the product.
    """

    name: str
    columns: int
    depth: int
    rows: tuple[int, ...]
    gated: bool = False


@dataclass(frozen=True, slots=True)
class Chain:
    """A decoder layer without its attention, and the numbers of rows it is run with.

    normed: numbers of rows that the residual sum and norm is measured with alone.
    """

    hidden: int
    q_width: int
    inner: int
    qkv: int
    rows: tuple[int, ...]
    normed: tuple[int, ...]

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """[columns, depth] of o, gate_up, down and the next layer's qkv."""
        return (
            (self.hidden, self.q_width), (2 * self.inner, self.hidden),
            (self.hidden, self.inner), (self.qkv, self.hidden),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """Everything measured.

    decode: batches, each with every one of `contexts`. scheduled: those whose schedule is measured
    apart. written: batches measured with the KV write too, on the first context. ragged: name and
    lengths [rows]. longest: tokens a block table has columns for. blocks: per gather, scatter and
    copy. writes: tokens per KV write. rotations: tokens per rotation and KV write. merges: (parts,
    tokens). ceiling_bytes, ceiling_n: of the copy and of the square matmul that stand for what the
    device can do.
    """

    model: Model
    decode: tuple[int, ...]
    contexts: tuple[int, ...]
    scheduled: tuple[int, ...]
    written: tuple[int, ...]
    ragged: tuple[tuple[str, tuple[int, ...]], ...]
    longest: int
    prefill: tuple[Prompts, ...]
    blocks: tuple[int, ...]
    writes: tuple[int, ...]
    rotations: tuple[int, ...]
    matmuls: tuple[Product, ...]
    chain: Chain
    merges: tuple[tuple[int, int], ...]
    ceiling_bytes: int
    ceiling_n: int


def _exponential(rows: int, low: int, mean: float, cap: int) -> tuple[int, ...]:
    drawn = low + np.random.default_rng(0).exponential(mean, rows)
    return tuple(int(length) for length in np.minimum(drawn, cap))


_ROWS = (1, 8, 32, 64, 128, 256)
_MANY_ROWS = (512, 1024, 2048, 4096)

FULL = Sizes(
    model=Model(query_heads=32, kv_heads=8, head_dim=128, layers=32),
    decode=(1, 8, 32, 128, 256),
    contexts=(1024, 4096),
    scheduled=(1, 128),
    written=(),
    ragged=(
        ("128 x (64 + exponential(960))", _exponential(128, 64, 960.0, 8192)),
        ("one of 8192 among 127 of 128", (*(128,) * 63, 8192, *(128,) * 64)),
    ),
    longest=8192,
    prefill=(
        Prompts("16384 whole", 1, 16384),
        Prompts("2048 over 14336", 1, 2048, 14336),
        Prompts("32 x 2048", 32, 2048),
    ),
    blocks=(64, 256),
    writes=(1, 32, 256, 8192),
    rotations=(1, 32, 128, 256, 4096, 8192),
    matmuls=(
        Product("qkv", 6144, 4096, _ROWS),
        Product("o", 4096, 4096, _ROWS),
        Product("gate_up", 28672, 4096, _ROWS),
        Product("gate_up, gated", 28672, 4096, _ROWS + _MANY_ROWS, gated=True),
        Product("down", 4096, 14336, _ROWS),
        Product("lm_head", 128256, 4096, (1, 32, 128)),
    ),
    chain=Chain(
        4096, 4096, 14336, 6144, (1, 8, 16, 32, 64, 128, 256, 512, 4096), (64, 128, 256, 512, 4096)
    ),
    merges=((2, 128), (2, 4096), (8, 1024)),
    ceiling_bytes=2 << 30,
    ceiling_n=8192,
)
"""Llama-3.1-8B on one device: the shapes that bars and peers are known for."""

FURTHER = dataclasses.replace(
    FULL,
    decode=(32, 128),
    scheduled=(),
    written=(32, 128),
    prefill=FULL.prefill[1:2],
    blocks=(64,),
    writes=(256, 8192),
    rotations=(32, 8192),
)
"""For block sizes after the first. Every Mosaic kernel of every program is compiled anew, seconds
each and one at a time (a lock in jaxlib 0.11.2): all shapes again would double the run."""

SMOKE = Sizes(
    model=Model(query_heads=4, kv_heads=2, head_dim=128, layers=2),
    decode=(2,),
    contexts=(48,),
    scheduled=(2,),
    written=(2,),
    ragged=(("ragged", (1, 70)),),
    longest=128,
    prefill=(Prompts("24 over 16", 2, 24, 16),),
    blocks=(3,),
    writes=(2, 32),
    rotations=(2, 32),
    matmuls=(Product("square", 256, 256, (2,)), Product("gated", 256, 256, (2,), gated=True)),
    chain=Chain(128, 64, 192, 96, (2, 34), (2, 34)),
    merges=((3, 5),),
    ceiling_bytes=1 << 20,
    ceiling_n=128,
)
"""Seconds on a CPU: shows that the tool works, measures nothing of interest."""
