"""Block copies: every backend's production path against numpy, in interpreters, bit by bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from lumen_kernels.block_copy import copy, gather, scatter
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import CPU, HOPPER, Backend, Target, interpreted

GPU = interpreted(HOPPER)
TPU = interpreted(Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite"))
TPU_PAIR = dataclasses.replace(TPU, cores=2)
TARGETS = [CPU, GPU, TPU, TPU_PAIR]

BF16 = ml_dtypes.bfloat16
SPLIT = (2, 16, 128)
PACKED = (1, 32, 128)


def name(target: Target) -> str:
    return f"{target.backend.value} on {target.cores}"


class Blocks:
    """An arena of noise and NaN, distinct blocks of it in two lists, and a buffer to store."""

    def __init__(self, page, slots_per_block, count, segments=1, dtype=BF16, seed=0) -> None:
        rng = np.random.default_rng(seed)
        self.slots_per_block = slots_per_block
        each = -(-(2 * count + 1) // segments)
        sizes = [(each + index) * slots_per_block for index in range(segments)]
        self.cuts = np.cumsum(sizes)[:-1]
        before = rng.normal(size=(sum(sizes), *page)).astype(dtype)
        before[rng.random(len(before)) < 0.3] = np.nan
        self.before = before
        picked = rng.permutation(sum(sizes) // slots_per_block)[: 2 * count] * slots_per_block
        self.ones, self.others = np.split(picked.astype(np.int32), 2)
        self.buffer = rng.normal(size=(count, slots_per_block, *page)).astype(dtype)
        self.ones[1::4] = -1 - np.arange(len(self.ones[1::4]))
        self.others[2::4] = -7

    @property
    def arena(self):
        return tuple(map(jnp.asarray, np.split(self.before, self.cuts)))

    def block(self, base: int) -> slice:
        return slice(base, base + self.slots_per_block)


def same_bits(got, expected) -> None:
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    np.testing.assert_array_equal(np.asarray(got).view(bits), expected.view(bits))


def same_arena(got, expected) -> None:
    same_bits(np.concatenate([np.asarray(segment) for segment in got]), expected)


def check_gather(case: Blocks, target: Target) -> None:
    call = jax.jit(functools.partial(gather, slots_per_block=case.slots_per_block, target=target))
    buffer = np.asarray(call(case.arena, case.ones))
    for row, base in zip(buffer, case.ones, strict=True):
        if base >= 0:
            same_bits(row, case.before[case.block(base)])


def check_scatter(case: Blocks, target: Target) -> None:
    call = jax.jit(functools.partial(scatter, target=target))
    expected = case.before.copy()
    for row, base in zip(case.buffer, case.ones, strict=True):
        if base >= 0:
            expected[case.block(base)] = row
    same_arena(call(case.arena, case.ones, case.buffer), expected)


def check_copy(case: Blocks, target: Target) -> None:
    call = jax.jit(functools.partial(copy, slots_per_block=case.slots_per_block, target=target))
    expected = case.before.copy()
    for source, destination in zip(case.ones, case.others, strict=True):
        if min(source, destination) >= 0:
            expected[case.block(destination)] = case.before[case.block(source)]
    same_arena(call(case.arena, case.ones, case.others), expected)


CHECKS = (check_gather, check_scatter, check_copy)


def check_all(case: Blocks, target: Target) -> None:
    for check in CHECKS:
        check(case, target)


@pytest.mark.parametrize("target", TARGETS, ids=name)
@pytest.mark.parametrize(
    "case",
    [
        {"page": SPLIT, "slots_per_block": 12, "count": 5},
        {"page": PACKED, "slots_per_block": 7, "count": 6, "segments": 3},
        {"page": (2, 16, 256), "slots_per_block": 1, "count": 9, "segments": 2},
        {"page": (2, 128, 128), "slots_per_block": 2, "count": 3},
        {"page": (2, 16, 64), "slots_per_block": 4, "count": 3},
        {"page": (2, 16, 128), "slots_per_block": 4, "count": 3, "dtype": np.float32},
    ],
    ids=str,
)
def test_blocks_and_nothing_else(target, case):
    check_all(Blocks(**case), target)


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_nothing_but_padding(target):
    case = Blocks(SPLIT, 4, 3)
    case.ones[:] = -1
    check_all(case, target)


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_no_block_at_all(target):
    case = Blocks(SPLIT, 4, 2)
    none = case.ones[:0]
    arena = case.arena
    buffer = gather(arena, none, slots_per_block=4, target=target)
    assert buffer.shape == (0, 4, *SPLIT)
    assert scatter(arena, none, buffer, target=target) == arena
    assert copy(arena, none, none, slots_per_block=4, target=target) == arena


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
@pytest.mark.parametrize("target", [TPU, TPU_PAIR], ids=name)
@pytest.mark.parametrize("check", CHECKS)
def test_tpu_kernels_have_no_races(monkeypatch, check, target, mode):
    parameters = functools.partial(
        pltpu.InterpretParams, detect_races=True, dma_execution_mode=mode, num_cores_or_threads=2
    )
    monkeypatch.setattr(pltpu, "InterpretParams", parameters)
    # More blocks than copies in flight.
    check(Blocks(SPLIT, 2, 21, segments=2), target)
    assert tpu_interpreter.races is not None
    assert not tpu_interpreter.races.races_found


@pytest.mark.parametrize("check", CHECKS)
def test_gpu_kernels_have_no_races(monkeypatch, check):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    check(Blocks(SPLIT, 20, 5, segments=2), GPU)
    assert not gpu_interpreter.get_races().races_found


def arguments(operation):
    case = Blocks(SPLIT, 4, 2)
    given = {"arena": case.arena, "target": CPU}
    if operation is scatter:
        return given | {"bases": case.ones, "buffer": case.buffer}
    if operation is gather:
        return given | {"bases": case.ones, "slots_per_block": 4}
    return given | {"sources": case.ones, "destinations": case.others, "slots_per_block": 4}


IDS = np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("operation", "argument", "value"),
    [
        (gather, "arena", ()),
        (gather, "arena", (jnp.zeros((8, 3, 16, 128)),)),
        (gather, "bases", IDS[None]),
        (gather, "bases", IDS.astype(np.int64)),
        (gather, "bases", np.zeros(70_000, np.int32)),
        (gather, "slots_per_block", 0),
        (gather, "slots_per_block", 1000),
        (scatter, "bases", IDS.astype(np.float32)),
        (scatter, "buffer", np.zeros((3, 4, *SPLIT), BF16)),
        (scatter, "buffer", np.zeros((2, 4, 2, 16, 64), BF16)),
        (scatter, "buffer", np.zeros((2, 4, *SPLIT), np.float32)),
        (scatter, "buffer", np.zeros((2, 1000, *SPLIT), BF16)),
        (copy, "sources", IDS.astype(np.uint32)),
        (copy, "destinations", np.zeros(3, np.int32)),
        (copy, "slots_per_block", -4),
    ],
)
def test_bad_arguments_are_named(operation, argument, value):
    with pytest.raises(KernelArgumentError, match=f": {argument} ") as error:
        operation(**(arguments(operation) | {argument: value}))
    assert error.value.argument == argument


@pytest.mark.slow
@pytest.mark.parametrize("target", [GPU, TPU, TPU_PAIR], ids=name)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("page", [SPLIT, PACKED, (2, 64, 256)], ids=str)
def test_random_blocks(target, page, segments, seed):
    rng = np.random.default_rng(seed)
    size, count = int(rng.integers(1, 20)), int(rng.integers(1, 24))
    check_all(Blocks(page, size, count, segments, seed=seed), target)
