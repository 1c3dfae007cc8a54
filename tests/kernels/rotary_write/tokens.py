"""Projections of a token stream, an arena full of NaN and noise, and what must come of them."""

from dataclasses import dataclass

import numpy as np
from lumen_kernels.rotary_write import Projections

from tests.kernels.kv_write.streams import PREFILL, Layout, Stream

EPS = 1e-5


@dataclass(frozen=True)
class Family:
    """Query heads, the arena, and what is done before the rotation."""

    q_heads: int
    layout: Layout
    bias: bool = False
    norms: bool = False


# An 8B, one of eight devices of a 70B, Qwen 2.5 7B and 0.5B, Qwen 3, Gemma's width, SmolLM2.
FAMILIES = (
    Family(32, Layout(8, 128, 64)),
    Family(8, Layout(1, 128, segments=2)),
    Family(28, Layout(4, 128, segments=3), bias=True),
    Family(14, Layout(2, 64, packed=True), bias=True),
    Family(16, Layout(8, 128, 32), norms=True),
    Family(6, Layout(2, 128), bias=True, norms=True),
    Family(8, Layout(4, 256, segments=4)),
    Family(9, Layout(3, 64, packed=True, segments=2), norms=True),
)


class Tokens:
    """Tokens of a `Stream`, as a layer projects them, and where they go."""

    def __init__(self, family: Family, parts=PREFILL, seed: int = 0) -> None:
        self.family = family
        self.stream = Stream(family.layout, parts, seed)
        layout, rng = family.layout, np.random.default_rng(seed + 100)
        tokens, heads = len(self.stream.slots), family.q_heads + 2 * layout.heads
        columns = heads * layout.head_dim
        fused = rng.normal(size=(tokens, columns)).astype(layout.dtype)
        self.projections = Projections(
            fused,
            rng.normal(size=columns).astype(np.float32) if family.bias else None,
            rng.uniform(0.5, 1.5, (2, layout.head_dim)).astype(np.float32)
            if family.norms
            else None,
        )
        angles = rng.uniform(-10, 10, (tokens, layout.head_dim // 2))
        self.rotation = np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        self.places = np.stack([self.stream.slots, self.stream.offsets])

    @property
    def arguments(self):
        return (
            self.projections, self.rotation, self.stream.arena, self.places,
            self.stream.layer_offset,
        )  # fmt: skip

    @property
    def options(self):
        return {"kv_heads": self.family.layout.heads, "eps": EPS}

    def exact(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v in float64; what is rounded on the way is rounded here."""
        layout, (fused, bias, norms) = self.family.layout, self.projections
        x = fused.astype(np.float64)
        if bias is not None:
            x = (x + bias).astype(layout.dtype).astype(np.float64)
        x = x.reshape(len(x), -1, layout.head_dim)
        ends = self.family.q_heads, self.family.q_heads + layout.heads
        q, k, v = np.split(x, ends, axis=1)
        if norms is not None:
            q, k = normed(q, norms[0], layout.dtype), normed(k, norms[1], layout.dtype)
        return turned(q, self.rotation), turned(k, self.rotation), v

    def check(self, q, arena) -> None:
        """q and the stored k are close to float64; v and all else of the arena bit by bit."""
        layout, stream = self.family.layout, self.stream
        exact_q, exact_k, v = self.exact()
        assert q.dtype == layout.dtype
        check_close(q, exact_q)
        stored = np.flatnonzero(stream.slots >= 0)
        got = np.concatenate([np.asarray(segment) for segment in arena])
        slots = stream.slots[stored, None] + stream.layer_offset + np.arange(layout.heads)
        k = got[slots, 0, stream.offsets[stored, None]][..., : layout.head_dim]
        check_close(k, exact_k[stored])
        stream.k, stream.v = exact_k.astype(layout.dtype), v.astype(layout.dtype)
        stream.k[stored] = k
        stream.check(arena)


def normed(x, weight, dtype):
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
    return (x * scale * weight).astype(dtype).astype(np.float64)


def turned(x, rotation):
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.split(rotation.astype(np.float64)[:, None], 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def check_close(found, exact) -> None:
    """bfloat16 has steps of 2 ** -8, and what is rotated was rounded too."""
    found = np.asarray(found).astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=2.0**-7, atol=2.0**-7)
