"""Decode in Mosaic TPU, interpreted on a CPU: against the oracle, and for races."""

import itertools

import numpy as np
import pytest
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.paged_attention.decode.mosaic_tpu import schedule
from lumen_kernels.paged_attention.mosaic_tpu_blocks import MOST_COLUMNS
from lumen_kernels.target import Backend, Target

from tests.kernels.paged_attention.mosaic_tpu_checks import (
    DMA_MODES,
    Setting,
    check_decode,
    compare,
    no_race,
    run_decode,
    watched,
)
from tests.kernels.paged_attention.oracle import Case, assert_same_arena, bfloat16_case

LENGTHS = [0, 1, 15, 16, 17, 127, 128, 129, 300]
"""Around a block's, a chunk's and two chunks' ends, once the step's token is there."""


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "block_size", "segments", "setting"),
    [
        (2, 4, 128, 16, 1, Setting()),
        (2, 1, 128, 64, 1, Setting(table_in_smem=False)),
        (1, 16, 128, 128, 2, Setting(cores=2)),
        (2, 3, 64, 16, 3, Setting(cores=2, soft_cap=4.0)),
        (1, 2, 64, 32, 1, Setting(window=20)),
        (1, 8, 256, 16, 4, Setting(window=130, table_in_smem=False)),
        (3, 2, 128, 32, 1, Setting(cores=2, table_in_smem=False, soft_cap=3.0)),
        (2, 2, 128, 16, 1, Setting(chunk=None, window=1)),
    ],
)
def test_decode_equals_dense_attention(
    kv_heads, group, head_dim, block_size, segments, setting
) -> None:
    case = bfloat16_case(
        np.random.default_rng(group), LENGTHS, kv_heads, head_dim=head_dim,
        block_size=block_size, segments=segments,
    )  # fmt: skip
    check_decode(case, group, setting, absent=(2, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "head_dim"), list(itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 16], [64, 128, 256]))
)
def test_decode_of_every_shape(group: int, head_dim: int) -> None:
    rng = np.random.default_rng(group * head_dim)
    block_size = (16, 32, 64, 128)[(group + head_dim // 64) % 4]
    lengths = rng.integers(0, 700, 6).tolist()
    for setting in (
        Setting(cores=2, chunk=None),
        Setting(window=int(rng.integers(1, 400)), soft_cap=5.0, table_in_smem=False),
    ):
        case = bfloat16_case(
            rng, lengths, 2, head_dim=head_dim, block_size=block_size,
            segments=int(rng.integers(1, 5)),
        )  # fmt: skip
        check_decode(case, group, setting, absent=(1,))


@pytest.mark.parametrize("setting", [Setting(), Setting(cores=2, window=9)])
def test_float32_is_exact(setting: Setting) -> None:
    case = Case(np.random.default_rng(3), [0, 5, 130, 300], 2, head_dim=128)
    check_decode(case, 3, setting)


@pytest.mark.parametrize(
    ("n", "kv_heads", "setting"),
    [(2, 2, Setting(window=12)), (3, 1, Setting()), (5, 1, Setting(tile=5))],
)
def test_several_tokens_per_row(n: int, kv_heads: int, setting: Setting) -> None:
    case = bfloat16_case(np.random.default_rng(n), [0, 14, 126, 200], kv_heads)
    check_decode(case, 3, setting, n=n, absent=(1,))


def test_the_first_of_several_tokens_may_be_padding() -> None:
    case = bfloat16_case(np.random.default_rng(8), [1], 1)
    q = case.draw(3, 2)[None]
    out, lse, _ = run_decode(case, q, None, None, [1], Setting())
    for i in range(3):
        compare(case, out[0, i], lse[0, i], q[0, i], 0, i - 2, Setting())


def test_reading_without_writing() -> None:
    case = bfloat16_case(np.random.default_rng(2), [9, 0, 150], 2)
    q = case.draw(3, 4)[:, None]
    out, lse, arena = run_decode(case, q, None, None, case.lengths, Setting())
    for row, length in enumerate(case.lengths):
        compare(case, out[row, 0], lse[row, 0], q[row, 0], row, length - 1, Setting())
    assert_same_arena(case, arena)


@pytest.mark.parametrize("setting", [Setting(), Setting(cores=2, table_in_smem=False)])
def test_only_padding(setting: Setting) -> None:
    case = bfloat16_case(np.random.default_rng(1), [4, 9, 30], 1)
    check_decode(case, 2, setting, absent=(0, 1, 2))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    lengths = [5, 130, 300, 77, 0]
    case = bfloat16_case(np.random.default_rng(3), lengths, 2)
    q = case.draw(5, 6)[:, None]
    together, together_lse, _ = run_decode(case, q, None, None, lengths, Setting())
    for setting in (Setting(), Setting(cores=2), Setting(table_in_smem=False)):
        for row, length in enumerate(lengths):
            only = [0] * row + [length] + [0] * (4 - row)
            alone, lse, _ = run_decode(case, q, None, None, only, setting)
            np.testing.assert_array_equal(alone[row], together[row])
            np.testing.assert_array_equal(lse[row], together_lse[row])


def test_a_table_may_be_too_wide() -> None:
    case = bfloat16_case(np.random.default_rng(1), [4], 1)
    case.tables = np.zeros((1, MOST_COLUMNS + 1), np.int32)
    q = case.draw(1, 2)[None]
    with pytest.raises(KernelArgumentError, match=r"^decode: tables "):
        run_decode(case, q, None, None, case.lengths, Setting(table_in_smem=False))


def test_cores_get_equal_work() -> None:
    two = Target(Backend.MOSAIC_TPU, "tpu", "TPU v4", cores=2)
    lengths = np.random.default_rng(0).exponential(900, 64).astype(np.int32) + 1
    assert schedule(lengths, 8, two) is None, "cores share the heads"
    order = np.asarray(schedule(lengths, 1, two))
    assert sorted(order) == list(range(64))
    first, second = lengths[order[::2]].sum(), lengths[order[1::2]].sum()
    assert abs(int(first) - int(second)) < lengths.max() // 2


@pytest.mark.parametrize("mode", DMA_MODES)
@pytest.mark.parametrize(
    ("lengths", "kv_heads", "head_dim", "segments", "absent", "setting"),
    [
        ([0, 128, 3, 0, 140], 2, 128, 1, (2,), Setting()),
        ([130, 0, 20, 1], 1, 128, 2, (1, 3), Setting(cores=2)),
        ([15, 127, 40], 2, 64, 1, (), Setting(cores=2, table_in_smem=False)),
        ([5, 200, 7, 33, 128], 1, 128, 1, (0, 4), Setting(window=30, table_in_smem=False)),
    ],
)
def test_no_races(lengths, kv_heads, head_dim, segments, absent, setting, mode: str) -> None:
    case = bfloat16_case(
        np.random.default_rng(7), lengths, kv_heads, head_dim=head_dim, segments=segments, room=16
    )
    with no_race():
        check_decode(case, 2, watched(setting, mode), absent=absent)


@pytest.mark.parametrize("mode", DMA_MODES)
def test_no_races_with_several_tokens(mode: str) -> None:
    case = bfloat16_case(np.random.default_rng(7), [130, 0, 20], 1, room=16)
    q = case.draw(6, 2).reshape(3, 2, 2, 128)
    with no_race():
        out, lse, _ = run_decode(case, q, None, None, case.lengths, watched(Setting(), mode))
    for row, length in enumerate(case.lengths):
        for i in range(2):
            position = length - 2 + i if length else -1
            compare(case, out[row, i], lse[row, i], q[row, i], row, position, Setting())
