"""KV write: every backend's production path against numpy, in interpreters, bit by bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.kv_write import mosaic_tpu, write
from lumen_kernels.target import CPU, HOPPER, Backend, Target, interpreted

from tests.kernels.kv_write.streams import DECODE, LAYOUTS, PREFILL, Layout, Stream

GPU = interpreted(HOPPER)
GPU_BUSY = dataclasses.replace(GPU, cores=1)  # tokens are written several at a time
TPU = interpreted(Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite"))
TPU_PAIR = dataclasses.replace(TPU, cores=2)


def run(stream: Stream, target: Target) -> None:
    stream.check(jax.jit(functools.partial(write, target=target))(*stream.arguments))


@pytest.fixture(params=["on_wait", "eager"])
def races(request, monkeypatch):
    """Detects races with copies made as late, or as early, as may be."""
    settings = {
        "detect_races": True,
        "dma_execution_mode": request.param,
        "num_cores_or_threads": 2,
    }
    parameters = functools.partial(pltpu.InterpretParams, **settings)
    monkeypatch.setattr(pltpu, "InterpretParams", parameters)
    yield
    found = tpu_interpreter.races
    assert found is not None
    assert not found.races_found


@pytest.mark.parametrize("parts", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(2, 64), Layout(2, 128, dtype=np.float32)])
def test_xla(layout, parts):
    run(Stream(layout, parts), CPU)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", [GPU, GPU_BUSY], ids=["one by one", "together"])
def test_gpu_kernel(layout, target):
    run(Stream(layout, seed=1), target)


@pytest.mark.parametrize(
    "layout", [Layout(2, 128, dtype=np.float32), Layout(2, 64, packed=True, dtype=np.float32)]
)
def test_32_bit_arenas(layout):
    for target in (GPU, TPU):
        run(Stream(layout, DECODE), target)


@pytest.mark.parametrize("target", [GPU, GPU_BUSY], ids=["one by one", "together"])
def test_gpu_kernel_has_no_races(monkeypatch, target):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    run(Stream(Layout(2, 128, segments=2), seed=2), target)
    assert not gpu_interpreter.get_races().races_found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tpu_kernel(layout):
    run(Stream(layout, seed=3), TPU)


@pytest.mark.parametrize("layout", [Layout(2, 128, segments=2), Layout(1, 64, packed=True)])
@pytest.mark.parametrize("target", [TPU, TPU_PAIR], ids=["one core", "two cores"])
def test_tpu_kernel_has_no_races(races, layout, target):
    run(Stream(layout, seed=4), target)


@pytest.mark.parametrize(
    "target", [CPU, GPU, GPU_BUSY, TPU, TPU_PAIR], ids=lambda t: f"{t.platform}{t.cores}"
)
@pytest.mark.parametrize(
    "parts", [((1, 3),), ((-1, 0),), ((-5, 0), (2, 0), (-4, 0)), ((16, 0),)], ids=str
)
def test_short_streams(target, parts):
    run(Stream(Layout(1, 128), parts, seed=5), target)


def test_no_token_at_all():
    stream = Stream(Layout(1, 128), ((1, 0),))
    k, v, arena, slots, offsets, layer = stream.arguments
    for target in (CPU, GPU, TPU):
        same = write(k[:0], v[:0], arena, slots[:0], offsets[:0], layer, target=target)
        assert same == arena


def test_more_tokens_than_scalar_memory_holds(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_TOKENS", 20)
    run(Stream(Layout(2, 128), seed=6), TPU)


def test_runs_end_with_slab_block_and_sequence():
    slots = np.array([8, 8, 8, 8, 24, 24, -1, -2, 40, 8], np.int32)
    offsets = np.array([14, 15, 16, 17, 0, 1, 9, 3, 2, 3], np.int32)
    goes_on, ends = mosaic_tpu.runs(jnp.asarray(slots), jnp.asarray(offsets))
    assert np.flatnonzero(~np.asarray(goes_on)).tolist() == [0, 2, 4, 6, 8, 9]
    assert np.asarray(ends).tolist() == [2, 2, 4, 4, 6, 6, 8, 8, 9, 10]


def test_rows_are_converted_to_the_arena():
    stream = Stream(Layout(2, 128))
    k, v, *rest = stream.arguments
    wide = (k.astype(np.float32), v.astype(np.float32), *rest)
    stream.check(write(*wide, target=CPU))


def with_changed(name, value):
    stream = Stream(Layout(2, 128), ((2, 0),))
    names = ("k", "v", "arena", "slots", "offsets", "layer_offset")
    return dict(zip(names, stream.arguments, strict=True)) | {name: value}


@pytest.mark.parametrize("target", [CPU, GPU, TPU], ids=lambda t: t.platform)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("k", np.zeros((2, 256), np.float32)),
        ("v", np.zeros((2, 2, 64), np.float32)),
        ("arena", jnp.zeros((8, 2, 16, 64))),
        ("arena", (jnp.zeros((8, 2, 16, 64)),)),
        ("arena", (jnp.zeros((8, 2, 16, 128)), jnp.zeros((8, 2, 32, 128)))),
        ("slots", np.zeros(3, np.int32)),
        ("offsets", np.zeros(2, np.int64)),
        ("layer_offset", np.zeros(1, np.int32)),
        ("layer_offset", 0.5),
    ],
)
def test_bad_arguments_are_named(argument, value, target):
    with pytest.raises(KernelArgumentError, match=f"kv_write.write: {argument} ") as error:
        write(**with_changed(argument, value), target=target)
    assert error.value.argument == argument


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "target", [GPU, GPU_BUSY, TPU, TPU_PAIR], ids=lambda t: f"{t.platform}{t.cores}"
)
def test_random_streams(target, layout, seed):
    rng = np.random.default_rng(seed)
    parts = [
        (int(rng.integers(1, 70)) * (-1 if rng.random() < 0.2 else 1), int(rng.integers(0, 64)))
        for _ in range(8)
    ]
    run(Stream(layout, parts, seed=seed), target)
