"""The whole operation on Hopper: KV write, schedule and kernel, through the public functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.paged_attention import decode, decode_schedule, prefill
from lumen_kernels.target import Backend, Target

from tests.kernels.paged_attention.oracle import Case, assert_same_arena, bfloat16_case

SMALL = Target(Backend.MOSAIC_GPU, "gpu", "NVIDIA H200", 2, interpret=True)


def assert_close(out: np.ndarray, expected: np.ndarray) -> None:
    # Weights and results are rounded to bfloat16: 8 bits.
    np.testing.assert_allclose(out, expected, atol=0.02, rtol=0.02)


def on_device(case: Case, *arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x.astype(case.dtype)) for x in arrays]


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decode_writes_and_reads(batch_invariant: bool) -> None:
    lengths = [70, 0, 15, 200]
    case = bfloat16_case(np.random.default_rng(1), lengths, 2, segments=2)
    q, k, v = case.draw(4, 8), case.draw(4), case.draw(4)
    now = jnp.asarray([71, 0, 16, 201], jnp.int32)  # the second row is padding

    @jax.jit
    def step(q, k, v, arena, tables, now):
        common = {"target": SMALL, "batch_invariant": batch_invariant}
        schedule = decode_schedule(now, q, arena, kv_heads=2, **common)
        return decode(
            q, k, v, arena, tables, now, case.layer_offset, scale=0.1, with_lse=True,
            schedule=schedule, **common,
        )  # fmt: skip

    out, lse, arena = step(
        *on_device(case, q, k, v), on_device(case, *case.arena), case.tables, now
    )
    out, lse = np.asarray(out, np.float32), np.asarray(lse)
    for row in (0, 2, 3):
        case.grow(row, k[row : row + 1], v[row : row + 1])
        expected, expected_lse = case.dense(q[row], row, lengths[row], 0.1)
        assert_close(out[row], expected)
        np.testing.assert_allclose(lse[row], expected_lse, atol=1e-3)
    assert not out[1].any()
    assert np.isneginf(lse[1]).all()
    assert_same_arena(case, arena)


def test_prefill_writes_and_reads() -> None:
    prefixes, counts = [40, 0, 130], [17, 30, 9]
    case = bfloat16_case(np.random.default_rng(2), prefixes, 2)
    tokens = sum(counts) + 8
    q, k, v = case.draw(tokens, 8), case.draw(tokens), case.draw(tokens)
    call = functools.partial(prefill, target=SMALL, scale=0.1)
    out, lse, arena = jax.jit(call)(
        *on_device(case, q, k, v), tuple(on_device(case, *case.arena)), case.tables,
        np.array(prefixes, np.int32), np.array(counts, np.int32), case.layer_offset,
    )  # fmt: skip
    assert lse is None
    out = np.asarray(out, np.float32)
    at = 0
    for row, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        case.grow(row, k[at : at + count], v[at : at + count])
        for i in range(count):
            assert_close(out[at + i], case.dense(q[at + i], row, prefix + i, 0.1)[0])
        at += count
    assert not out[at:].any()
    assert_same_arena(case, arena)
