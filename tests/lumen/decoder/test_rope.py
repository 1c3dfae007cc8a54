"""Rotary embeddings: what the goldens cannot show."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.rotary_write import Projections, rotate

from lumen.config import RopeScaling
from lumen.errors import ModelConfigError
from lumen.presets import preset
from lumen.rope import inverse_frequencies, rotation


def test_scores_depend_on_distance_only():
    frequencies = inverse_frequencies(preset("tiny-llama"))
    q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)

    def score(q_position, k_position):
        table = rotation(jnp.array([q_position, k_position]), frequencies)
        fused = jnp.tile(jnp.stack([q, k]), 3)  # q, k and v of each of two tokens
        turned, keys, _ = rotate(Projections(fused), table, kv_heads=1)
        return float(turned[0, 0] @ keys[1, 0])

    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-5)
    assert score(307, 300) == pytest.approx(score(7, 0), abs=1e-3)
    assert abs(score(7, 0) - score(0, 0)) > 0.1


def test_llama3_scaling_keeps_high_and_divides_low_frequencies():
    config = preset("llama-3.1-8b")
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    ratio = plain / inverse_frequencies(config)
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) >= -1e-5).all()


def test_unknown_scaling_is_refused():
    config = replace(preset("tiny-llama"), rope_scaling=RopeScaling("yarn", 4.0))
    with pytest.raises(ModelConfigError, match=r"'yarn'.*'linear' and 'llama3'"):
        inverse_frequencies(config)
