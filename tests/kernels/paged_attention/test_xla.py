"""The XLA backend, which is the oracle of the others, against dense attention in float64."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention import decode, prefill
from lumen_kernels.target import CPU, Backend, Target

from tests.kernels.paged_attention.oracle import LAYERS, Case, assert_same_arena

# The form of the fallback on a TPU: plain XLA, so it runs here.
TPU_FORM = Target(Backend.XLA, "tpu")


def run_decode(case: Case, q, k, v, lengths: list[int], target=CPU, **options):
    call = jax.jit(
        lambda *a: decode(
            *a, target=target, scale=case.head_dim**-0.5, with_lse=True, kv_heads=case.kv_heads,
            **options,
        )
    )  # fmt: skip
    out, lse, arena = call(
        q, k, v, case.arena, case.tables, np.array(lengths, np.int32), case.layer_offset
    )
    return np.asarray(out), np.asarray(lse), arena


def check_decode(case: Case, group: int, target=CPU, n: int | None = None, **options) -> None:
    """Write n new tokens per row (None: one, without that dimension) and compare everything."""
    rows, tokens = len(case.lengths), n or 1
    q = np.stack([case.draw(tokens, case.kv_heads * group) for _ in range(rows)])
    k, v = (np.stack([case.draw(tokens) for _ in range(rows)]) for _ in range(2))
    lengths = [length + tokens for length in case.lengths]
    cut = (lambda x: x[:, 0]) if n is None else (lambda x: x)
    out, lse, arena = run_decode(case, cut(q), cut(k), cut(v), lengths, target, **options)
    out, lse = (x.reshape(rows, tokens, *x.shape[2 if n else 1 :]) for x in (out, lse))
    for row, length in enumerate(case.lengths):
        case.grow(row, k[row], v[row])
        for i in range(tokens):
            expected, expected_lse = case.dense(
                q[row, i], row, length + i, case.head_dim**-0.5, options.get("sliding_window"),
                options.get("soft_cap"),
            )  # fmt: skip
            np.testing.assert_allclose(out[row, i], expected, atol=2e-6)
            np.testing.assert_allclose(lse[row, i], expected_lse, atol=2e-5)
    assert_same_arena(case, arena)


@pytest.mark.parametrize(
    ("group", "block_size", "target"),
    [
        *itertools.product([1, 2, 3, 4, 8, 16], [16, 64], [CPU]),
        *itertools.product([1, 3], [32, 128], [CPU]),
        *itertools.product([1, 3, 16], [16, 128], [TPU_FORM]),
    ],
)
def test_decode_equals_dense_attention(group: int, block_size: int, target: Target) -> None:
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 200]
    case = Case(np.random.default_rng(group), lengths, kv_heads=2, block_size=block_size)
    check_decode(case, group, target)


@pytest.mark.parametrize(
    ("window", "target"),
    [(1, CPU), (5, CPU), (64, CPU), (70, CPU), (1000, CPU), (70, TPU_FORM)],
)
def test_sliding_window(window: int, target: Target) -> None:
    case = Case(np.random.default_rng(window), [3, 64, 150], kv_heads=1)
    check_decode(case, 2, target, sliding_window=window)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("n", [None, 3])
def test_decode_over_segments(packed: bool, segments: int, n: int | None) -> None:
    case = Case(
        np.random.default_rng(segments), [0, 40, 130], kv_heads=2, packed=packed, segments=segments
    )
    check_decode(case, 3, n=n, soft_cap=2.0)


def test_the_first_of_several_tokens_may_be_padding() -> None:
    case = Case(np.random.default_rng(8), [0], kv_heads=1)
    q, k, v = (case.draw(3, heads)[None] for heads in (2, 1, 1))
    out, lse, arena = run_decode(case, q, k, v, [1])
    assert not out[0, :2].any()
    assert np.isneginf(lse[0, :2]).all()
    case.grow(0, k[0, 2:], v[0, 2:])
    expected, _ = case.dense(q[0, 2], 0, 0, 0.25)
    np.testing.assert_allclose(out[0, 2], expected, atol=2e-6)
    assert_same_arena(case, arena)


def test_reading_without_writing() -> None:
    case = Case(np.random.default_rng(2), [9, 70], kv_heads=2)
    q = case.draw(2, 4)
    out, _, arena = run_decode(case, q, None, None, case.lengths)
    for row, length in enumerate(case.lengths):
        expected, _ = case.dense(q[row], row, length - 1, 0.25)
        np.testing.assert_allclose(out[row], expected, atol=2e-6)
    assert_same_arena(case, arena)


@pytest.mark.parametrize("target", [CPU, TPU_FORM])
def test_padding_rows_write_nothing_and_give_zeros(target: Target) -> None:
    case = Case(np.random.default_rng(1), [4, 9], kv_heads=2)
    q, k, v = case.draw(2, 4), case.draw(2), case.draw(2)
    out, lse, arena = run_decode(case, q, k, v, [0, 0], target)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert_same_arena(case, arena)


def check_prefill(case: Case, group: int, counts: list[int], padding: int, **options) -> None:
    """Write counts[r] new tokens per row, with `padding` more in the stream; compare everything."""
    tokens = sum(counts) + padding
    q = case.draw(tokens, case.kv_heads * group)
    k, v = case.draw(tokens), case.draw(tokens)
    call = jax.jit(lambda *a: prefill(*a, target=CPU, scale=0.25, with_lse=True, **options))
    starts = np.array(case.lengths, np.int32)
    out, lse, arena = call(
        q, k, v, case.arena, case.tables, starts, np.array(counts, np.int32), case.layer_offset
    )
    out, lse = np.asarray(out), np.asarray(lse)
    at = 0
    for row, (prefix, count) in enumerate(zip(case.lengths, counts, strict=True)):
        case.grow(row, k[at : at + count], v[at : at + count])
        for i in range(count):
            expected, expected_lse = case.dense(
                q[at + i], row, prefix + i, 0.25, options.get("sliding_window"),
                options.get("soft_cap"),
            )  # fmt: skip
            np.testing.assert_allclose(out[at + i], expected, atol=5e-6)
            np.testing.assert_allclose(lse[at + i], expected_lse, atol=2e-5)
        at += count
    assert not out[at:].any()
    assert np.isneginf(lse[at:]).all()
    assert_same_arena(case, arena)


@pytest.mark.parametrize("window", [None, 7, 90])
def test_prefill_of_ragged_chunks_equals_dense_attention(window: int | None) -> None:
    case = Case(np.random.default_rng(7), [0, 0, 48, 100, 5], kv_heads=2, room=90)
    check_prefill(case, 3, [40, 1, 80, 17, 0], 13, sliding_window=window)


@pytest.mark.parametrize("packed", [False, True])
def test_prefill_over_segments_with_a_soft_cap(packed: bool) -> None:
    case = Case(np.random.default_rng(3), [30, 64], kv_heads=2, packed=packed, segments=3)
    check_prefill(case, 2, [20, 33], 0, soft_cap=3.0)


def test_one_row_of_prefill() -> None:
    case = Case(np.random.default_rng(4), [70], kv_heads=2)
    check_prefill(case, 2, [33], 7)


def test_an_empty_stream_writes_nothing() -> None:
    case = Case(np.random.default_rng(4), [7, 0], kv_heads=1)
    check_prefill(case, 2, [0, 0], 8)


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
    tokens = rows if phase == "decode" else rows * 8
    q = jax.ShapeDtypeStruct((tokens, heads * 2, dim), jnp.float32)
    kv = jax.ShapeDtypeStruct((tokens, heads, dim), jnp.float32)

    def program(q, k, v, arena, tables, ints):
        arenas = (arena,)
        for layer in range(layers):
            args = (q, k, v, arenas, tables, ints)
            offset = jnp.int32(layer * heads)
            if phase == "decode":
                q, _, arenas = decode(*args, offset, target=CPU, scale=0.1)
            else:
                q, _, arenas = prefill(*args, ints, offset, target=CPU, scale=0.1)
        return q, arenas[0]

    compiled = jax.jit(program, donate_argnums=3).lower(q, kv, kv, arena, tables, ints).compile()
    memory = compiled.memory_analysis()
    arena_bytes = int(np.prod(arena.shape)) * 4
    assert memory.alias_size_in_bytes >= arena_bytes
    assert memory.temp_size_in_bytes < arena_bytes // 8


def test_bfloat16() -> None:
    lengths = [0, 70, 33]
    case = Case(
        np.random.default_rng(5), lengths, kv_heads=2, head_dim=64, dtype=ml_dtypes.bfloat16
    )
    q, k, v = case.draw(3, 8), case.draw(3), case.draw(3)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out, _, _ = run_decode(case, *low, [1, 71, 34])
    for row, length in enumerate(lengths):
        case.grow(row, k[row : row + 1], v[row : row + 1])
        expected, _ = case.dense(q[row], row, length, 0.125)
        np.testing.assert_allclose(out[row].astype(np.float32), expected, atol=3e-2)


def wrong_argument(argument: str):
    return pytest.raises(KernelArgumentError, match=rf"^decode: {argument} ")


def test_bad_arguments_are_named() -> None:
    case = Case(np.random.default_rng(6), [5], kv_heads=2)
    q, k, v, lengths = case.draw(1, 4), case.draw(1), case.draw(1), np.array([6], np.int32)

    whole = tuple(jnp.asarray(segment) for segment in case.arena)

    def call(q=q, k=k, v=v, arena=whole, tables=case.tables, lengths=lengths, **options):
        decode(
            q, k, v, arena, tables, lengths, case.layer_offset,
            **{"target": CPU, "scale": 0.25, **options},
        )  # fmt: skip

    call()
    slots = LAYERS * 2
    pages = np.zeros((slots, 2, 16, 16), np.float32)
    for argument, changes in [
        ("q", {"q": case.draw(1, 3)}),
        ("q", {"q": q.astype(np.int32)}),
        ("k", {"k": case.draw(2)}),
        ("v", {"v": None}),
        ("v", {"v": v.astype(np.float16)}),
        ("kv_heads", {"k": None, "v": None}),
        ("arena", {"arena": case.arena[0]}),
        ("arena", {"arena": ()}),
        ("arena", {"arena": (pages,) * 5}),
        ("arena", {"arena": (pages, pages[:, :, :8])}),
        ("arena", {"arena": (pages.astype(np.float16),)}),
        ("arena", {"arena": (pages[..., :8],)}),
        ("arena", {"arena": (pages[:3],)}),
        ("tables", {"tables": case.tables[0]}),
        ("tables", {"tables": case.tables.astype(np.int16)}),
        ("lengths", {"lengths": np.array([6, 7], np.int32)}),
        ("scale", {"scale": 0.0}),
        ("sliding_window", {"sliding_window": 0}),
        ("soft_cap", {"soft_cap": -1.0}),
    ]:
        with wrong_argument(argument):
            call(**changes)
