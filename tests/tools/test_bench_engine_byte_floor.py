"""The byte floor of a decode step, against a sum by hand, and where it is a bar."""

import dataclasses

import pytest

from lumen.presets import preset
from tools.bench.engine import bars, byte_floor
from tools.bench.engine.engine import EngineSettings
from tools.bench.engine.runner import Options
from tools.bench.engine.works import FULL


def test_the_floor_of_an_8b_model():
    config = preset("llama-3.1-8b")
    # qkv and o: 4096 * 10240; gate, up and down: 3 * 4096 * 14336; the lm head: 128256 * 4096.
    weights = 2 * (32 * 4096 * (10240 + 3 * 14336) + 128256 * 4096)
    kv = 2 * 32 * 2 * 8 * 128 * 1024
    for batch, devices in ((1, 1), (128, 1), (32, 4)):
        expected = 1e3 * (weights + batch * kv) / devices / 4.25e12
        assert byte_floor.decode_ms(config, 2, batch, 1024, devices) == pytest.approx(expected)


def test_a_large_models_bars_are_shares_of_the_floors_speed():
    bar = bars.large_decode(32, 8.4)
    assert (bar.peer, bar.floor, bar.aim) == (None, 16.8, pytest.approx(12.0))
    assert bars.large_decode(1, 8.4) == bars.large_decode(32, None) == bars.NONE


@pytest.mark.parametrize(
    ("change", "applies"),
    [
        ({}, True), ({"tensor_parallel": 2}, True), ({"tensor_parallel": 1}, False),
        ({"dtype": "float16"}, False), ({"model": bars.MODEL}, False),
    ],
)  # fmt: skip
def test_bars_of_the_large_model_are_for_its_shards(change, applies):
    settings = EngineSettings(
        model=bars.LARGE_MODEL, dtype="bfloat16", max_model_len=1280, num_rows=128, block_size=64,
        prefill_buckets=(4096,), max_prefills=32, memory_fraction=0.9, num_blocks=None,
        step_tokens=None, decode_steps=1, pipeline_depth=2, compile_threads=8, tensor_parallel=4,
    )  # fmt: skip
    assert Options(settings=dataclasses.replace(settings, **change)).large == applies
    assert not Options(settings=settings, smoke=True).large


def test_batches_of_decode_and_profile_may_be_named():
    options = Options(settings=None, batches=(1, 32), smoke=True)
    assert (options.sizes.batches, options.sizes.profiled) == ((1, 32), (1, 32))
    sizes = Options(settings=None, profiled=(32,)).sizes
    assert (sizes.batches, sizes.profiled) == (FULL.batches, (32,))
