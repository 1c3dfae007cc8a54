"""Paged attention against a dense oracle in float64."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.paged_attention import decode, prefill

LAYERS = 3
LAYER = 1


@dataclass
class Case:
    """Sequences in a permuted arena, NaN wherever nothing was stored."""

    rng: np.random.Generator
    lengths: list[int]  # tokens already in the arena
    kv_heads: int
    head_dim: int = 16
    block_size: int = 16
    spare_blocks: int = 3

    def __post_init__(self) -> None:
        most = max([*self.lengths, 1]) + 64
        columns = -(-most // self.block_size)
        count = len(self.lengths) * columns + self.spare_blocks
        ids = self.rng.permutation(count)[: len(self.lengths) * columns]
        self.tables = (ids.reshape(len(self.lengths), columns) * LAYERS * self.kv_heads).astype(
            np.int32
        )
        slots = count * LAYERS * self.kv_heads
        self.arena = np.full((slots, 2, self.block_size, self.head_dim), np.nan, np.float32)
        self.keys, self.values = [], []
        for row, length in enumerate(self.lengths):
            k, v = self.draw(length), self.draw(length)
            for position in range(length):
                self.store(row, position, k[position], v[position])
            self.keys.append(k)
            self.values.append(v)

    def draw(self, tokens: int, heads: int | None = None) -> np.ndarray:
        shape = (tokens, heads or self.kv_heads, self.head_dim)
        return self.rng.standard_normal(shape).astype(np.float32)

    def slot(self, row: int, position: int, head: int) -> int:
        base = self.tables[row, position // self.block_size]
        return int(base) + LAYER * self.kv_heads + head

    def store(self, row: int, position: int, k: np.ndarray, v: np.ndarray) -> None:
        for head in range(self.kv_heads):
            page = self.arena[self.slot(row, position, head)]
            page[0, position % self.block_size] = k[head]
            page[1, position % self.block_size] = v[head]


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, position: int, scale: float, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """One query [heads, dim] over keys [tokens, kv heads, dim]: output and log-sum-exp."""
    group = q.shape[0] // k.shape[1]
    first = 0 if window is None else max(0, position - window + 1)
    out, lse = [], []
    for head in range(q.shape[0]):
        keys = k[first : position + 1, head // group].astype(np.float64)
        values = v[first : position + 1, head // group].astype(np.float64)
        scores = keys @ q[head].astype(np.float64) * scale
        top = scores.max()
        weights = np.exp(scores - top)
        out.append(weights @ values / weights.sum())
        lse.append(top + math.log(weights.sum()))
    return np.array(out), np.array(lse)


def run_decode(
    case: Case,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    lengths: list[int],
    platform="cpu",
    **kw,
):
    """platform: the form of the operation; plain XLA, so each runs here."""
    out, lse, arena = jax.jit(
        lambda *a: decode(*a, platform=platform, scale=case.head_dim**-0.5, **kw)
    )(
        q, k, v, jnp.asarray(case.arena), case.tables, np.array(lengths, np.int32),
        np.int32(LAYER * case.kv_heads),
    )  # fmt: skip
    return np.asarray(out), np.asarray(lse), np.asarray(arena)


@pytest.mark.parametrize(
    ("group", "block_size", "platform"),
    [
        *itertools.product([1, 2, 3, 4, 8, 16], [16, 64], ["cpu"]),
        *itertools.product([1, 3], [32, 128], ["cpu"]),
        *itertools.product([1, 3, 16], [16, 128], ["tpu"]),
    ],
)
def test_decode_equals_dense_attention(group: int, block_size: int, platform: str) -> None:
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 200]
    case = Case(np.random.default_rng(group), lengths, kv_heads=2, block_size=block_size)
    rows = len(lengths)
    q, k, v = case.draw(rows, 2 * group), case.draw(rows), case.draw(rows)
    out, lse, arena = run_decode(case, q, k, v, [n + 1 for n in lengths], platform)
    for row, length in enumerate(lengths):
        keys = np.concatenate([case.keys[row], k[row : row + 1]])
        values = np.concatenate([case.values[row], v[row : row + 1]])
        expected, expected_lse = dense(q[row], keys, values, length, case.head_dim**-0.5, None)
        np.testing.assert_allclose(out[row], expected, atol=2e-6)
        np.testing.assert_allclose(lse[row], expected_lse, atol=2e-5)
        case.store(row, length, k[row], v[row])
    np.testing.assert_array_equal(arena, case.arena)


@pytest.mark.parametrize(
    ("window", "platform"),
    [(1, "cpu"), (5, "cpu"), (64, "cpu"), (70, "cpu"), (1000, "cpu"), (70, "tpu")],
)
def test_sliding_window(window: int, platform: str) -> None:
    lengths = [3, 64, 150]
    case = Case(np.random.default_rng(window), lengths, kv_heads=1)
    q, k, v = case.draw(3, 2), case.draw(3), case.draw(3)
    out, _, _ = run_decode(case, q, k, v, [n + 1 for n in lengths], platform, sliding_window=window)
    for row, length in enumerate(lengths):
        keys = np.concatenate([case.keys[row], k[row : row + 1]])
        values = np.concatenate([case.values[row], v[row : row + 1]])
        expected, _ = dense(q[row], keys, values, length, case.head_dim**-0.5, window)
        np.testing.assert_allclose(out[row], expected, atol=2e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_padding_rows_write_nothing_and_give_zeros(platform: str) -> None:
    case = Case(np.random.default_rng(1), [4, 9], kv_heads=2)
    q, k, v = case.draw(2, 4), case.draw(2), case.draw(2)
    out, lse, arena = run_decode(case, q, k, v, [0, 0], platform)
    assert not out.any()
    assert np.isneginf(lse).all()
    np.testing.assert_array_equal(arena, case.arena)


@pytest.mark.parametrize("window", [None, 7, 90])
def test_prefill_of_ragged_chunks_equals_dense_attention(window: int | None) -> None:
    prefixes, counts, width, group = [0, 0, 48, 100, 5], [40, 1, 40, 17, 0], 40, 3
    case = Case(np.random.default_rng(7), prefixes, kv_heads=2)
    rows = len(prefixes)
    q = np.stack([case.draw(width, 2 * group) for _ in range(rows)])
    k, v = (np.stack([case.draw(width) for _ in range(rows)]) for _ in range(2))
    out, lse, arena = jax.jit(
        lambda *a: prefill(*a, platform="cpu", scale=0.25, sliding_window=window)
    )(
        q, k, v, jnp.asarray(case.arena), case.tables, np.array(prefixes, np.int32),
        np.array(counts, np.int32), np.int32(LAYER * case.kv_heads),
    )  # fmt: skip
    for row, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        keys = np.concatenate([case.keys[row], k[row, :count]])
        values = np.concatenate([case.values[row], v[row, :count]])
        for i in range(count):
            expected, expected_lse = dense(q[row, i], keys, values, prefix + i, 0.25, window)
            np.testing.assert_allclose(out[row, i], expected, atol=5e-6)
            np.testing.assert_allclose(lse[row, i], expected_lse, atol=2e-5)
            case.store(row, prefix + i, k[row, i], v[row, i])
        assert not np.asarray(out[row, count:]).any()
        assert np.isneginf(np.asarray(lse[row, count:])).all()
    np.testing.assert_array_equal(arena, case.arena)


def test_decode_has_the_same_bits_in_any_batch() -> None:
    lengths = [5, 130, 64, 77]
    case = Case(np.random.default_rng(3), lengths, kv_heads=2)
    q, k, v = case.draw(4, 6), case.draw(4), case.draw(4)
    together, _, _ = run_decode(case, q, k, v, [n + 1 for n in lengths])
    for row, length in enumerate(lengths):
        only = [0] * len(lengths)
        only[row] = length + 1
        alone, _, _ = run_decode(case, q, k, v, only)
        np.testing.assert_array_equal(alone[row], together[row])


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_donated_arena_is_never_copied(phase: str) -> None:
    """Over several layers, the program needs no temporary of the arena's size."""
    rows, heads, dim, layers = 4, 2, 64, 4
    arena = jax.ShapeDtypeStruct((4096 * heads * layers, 2, 16, dim), jnp.float32)
    tables = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
    ints = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tokens = (rows,) if phase == "decode" else (rows, 8)
    q = jax.ShapeDtypeStruct((*tokens, heads * 2, dim), jnp.float32)
    kv = jax.ShapeDtypeStruct((*tokens, heads, dim), jnp.float32)

    def program(q, k, v, arena, tables, ints):
        for layer in range(layers):
            args = (q, k, v, arena, tables, ints)
            offset = jnp.int32(layer * heads)
            if phase == "decode":
                q, _, arena = decode(*args, offset, platform="cpu", scale=0.1)
            else:
                q, _, arena = prefill(*args, ints, offset, platform="cpu", scale=0.1)
        return q, arena

    compiled = jax.jit(program, donate_argnums=3).lower(q, kv, kv, arena, tables, ints).compile()
    memory = compiled.memory_analysis()
    arena_bytes = int(np.prod(arena.shape)) * 4
    assert memory.alias_size_in_bytes >= arena_bytes
    assert memory.temp_size_in_bytes < arena_bytes // 8


def test_bfloat16() -> None:
    lengths = [0, 70, 33]
    case = Case(np.random.default_rng(5), lengths, kv_heads=2, head_dim=64)
    q, k, v = (jnp.asarray(case.draw(3, heads), jnp.bfloat16) for heads in (8, 2, 2))
    out, _, _ = jax.jit(lambda *a: decode(*a, platform="cpu", scale=0.125))(
        q, k, v, jnp.asarray(case.arena, jnp.bfloat16), case.tables,
        np.array([1, 71, 34], np.int32), np.int32(LAYER * 2),
    )  # fmt: skip
    for row, length in enumerate(lengths):
        keys = np.concatenate([case.keys[row], np.asarray(k[row : row + 1], np.float32)])
        values = np.concatenate([case.values[row], np.asarray(v[row : row + 1], np.float32)])
        expected, _ = dense(np.asarray(q[row], np.float32), keys, values, length, 0.125, None)
        np.testing.assert_allclose(np.asarray(out[row], np.float32), expected, atol=3e-2)
