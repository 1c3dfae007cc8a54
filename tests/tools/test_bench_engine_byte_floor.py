"""The byte floor of a decode step, against a sum by hand."""

import pytest

from lumen.presets import preset
from tools.bench.engine import byte_floor


def test_the_floor_of_an_8b_model():
    config = preset("llama-3.1-8b")
    # qkv and o: 4096 * 10240; gate, up and down: 3 * 4096 * 14336; the lm head: 128256 * 4096.
    weights = 2 * (32 * 4096 * (10240 + 3 * 14336) + 128256 * 4096)
    kv = 2 * 32 * 2 * 8 * 128 * 1024
    for batch, devices in ((1, 1), (128, 1), (32, 4)):
        expected = 1e3 * (weights + batch * kv) / devices / 4.25e12
        assert byte_floor.decode_ms(config, 2, batch, 1024, devices) == pytest.approx(expected)
