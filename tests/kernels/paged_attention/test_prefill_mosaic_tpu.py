"""Prefill in Mosaic TPU, interpreted on a CPU: against the oracle, and for races."""

import itertools

import numpy as np
import pytest

from tests.kernels.paged_attention.mosaic_tpu_checks import (
    DMA_MODES,
    Setting,
    check_prefill,
    no_race,
    run_prefill,
    watched,
)
from tests.kernels.paged_attention.oracle import Case, bfloat16_case

PREFIXES = [0, 0, 48, 200, 5]
COUNTS = [40, 1, 160, 17, 0]


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_size", "segments", "setting"),
    [
        (2, 4, 128, 16, 1, Setting(tile=32)),
        (1, 3, 128, 64, 1, Setting(cores=2, tile=16, soft_cap=4.0)),
        (2, 1, 64, 16, 3, Setting(cores=2, window=70)),
        (1, 2, 256, 128, 2, Setting(tile=16, window=5, table_in_smem=False)),
        (1, 2, 128, 32, 1, Setting(cores=2, table_in_smem=False, window=130)),
    ],
)
def test_prefill_equals_dense_attention(
    kv_heads, group, head_dim, block_size, segments, setting
) -> None:
    case = bfloat16_case(
        np.random.default_rng(group), PREFIXES, kv_heads, head_dim=head_dim,
        block_size=block_size, segments=segments, room=170,
    )  # fmt: skip
    check_prefill(case, group, COUNTS, 13, setting)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "head_dim"), list(itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 16], [64, 128, 256]))
)
def test_prefill_of_every_shape(group: int, head_dim: int) -> None:
    rng = np.random.default_rng(group * head_dim)
    block_size = (16, 32, 64, 128)[(group + head_dim // 64) % 4]
    for rows, setting in (
        (3, Setting(cores=2, chunk=256)),
        (1, Setting(window=int(rng.integers(1, 400)), soft_cap=5.0, table_in_smem=False)),
    ):
        counts = rng.integers(0, 200, rows).tolist()
        case = bfloat16_case(
            rng, rng.integers(0, 400, rows).tolist(), 2, head_dim=head_dim,
            block_size=block_size, segments=int(rng.integers(1, 5)), room=200,
        )  # fmt: skip
        check_prefill(case, group, counts, int(rng.integers(0, 30)), setting)


@pytest.mark.parametrize("padding", [0, 9])
def test_one_row(padding: int) -> None:
    case = bfloat16_case(np.random.default_rng(4), [250], 2, room=60)
    check_prefill(case, 2, [55], padding, Setting(tile=16))


def test_float32_is_exact() -> None:
    case = Case(np.random.default_rng(3), [0, 130, 9], 1, head_dim=128)
    check_prefill(case, 3, [50, 3, 30], 5, Setting(cores=2, tile=16))


@pytest.mark.parametrize("setting", [Setting(tile=16), Setting(cores=2, table_in_smem=False)])
def test_an_empty_stream(setting: Setting) -> None:
    case = bfloat16_case(np.random.default_rng(4), [7, 0], 1)
    check_prefill(case, 2, [0, 0], 20, setting)


def test_a_token_has_the_same_bits_in_any_chunk() -> None:
    case = bfloat16_case(np.random.default_rng(6), [300, 0], 1)
    q = case.draw(300, 3)
    setting = Setting(tile=16, window=200)
    whole, whole_lse = run_prefill(case, q, [0, 0], [300, 0], setting)
    for start, count in ((0, 129), (129, 3), (132, 168)):
        part = np.concatenate([q[start : start + count], q[: 300 - count]])
        out, lse = run_prefill(case, part, [start, 0], [count, 0], setting)
        np.testing.assert_array_equal(out[:count], whole[start : start + count])
        # With and without a mask a CPU may contract products and sums differently.
        np.testing.assert_allclose(lse[:count], whole_lse[start : start + count], rtol=3e-7)


@pytest.mark.parametrize("mode", DMA_MODES)
@pytest.mark.parametrize(
    ("prefixes", "counts", "kv_heads", "head_dim", "segments", "setting"),
    [
        ([120, 0, 5], [20, 0, 3], 2, 128, 1, Setting(tile=16)),
        ([0, 128, 40], [1, 17, 33], 1, 128, 2, Setting(cores=2, tile=16, table_in_smem=False)),
        ([200, 60], [5, 20], 2, 64, 1, Setting(cores=2, tile=16, window=50)),
        ([140], [40], 1, 128, 1, Setting(tile=16, window=20, table_in_smem=False)),
    ],
)
def test_no_races(prefixes, counts, kv_heads, head_dim, segments, setting, mode: str) -> None:
    case = bfloat16_case(
        np.random.default_rng(7), prefixes, kv_heads, head_dim=head_dim, segments=segments, room=40
    )
    with no_race():
        check_prefill(case, 2, counts, 6, watched(setting, mode))
