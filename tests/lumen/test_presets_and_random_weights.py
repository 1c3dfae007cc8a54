"""Presets, and the rule that makes random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumen.errors import CheckpointError, ModelConfigError
from lumen.presets import PRESETS, preset
from lumen.random_weights import random_weights
from lumen.weight_rule import salt, weight_values

# Parameters of the public checkpoints, as their model cards and safetensors indices state them.
PUBLIC_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", PUBLIC_PARAMETERS)
def test_public_presets_have_the_public_number_of_parameters(name):
    shapes = random_weights(f"random:{name}").shapes()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PUBLIC_PARAMETERS[name]


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ModelConfigError, match=r"'llama-9'.*llama-3\.1-8b.*tiny-qwen3"):
        random_weights("random:llama-9")
    assert preset("tiny-llama") is PRESETS["tiny-llama"]


def test_unknown_tensor_is_refused():
    with pytest.raises(CheckpointError, match=r"no tensor named 'lm_head\.weight'"):
        random_weights("random:tiny-smollm").read("lm_head.weight")


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]
)
def test_device_and_host_make_the_same_bits(name):
    source = random_weights("random:tiny-llama", seed=3)
    on_device = jax.jit(lambda salt: source.generate(name, salt))(jnp.uint32(source.salt(name)))
    np.testing.assert_array_equal(np.asarray(on_device), source.read(name))


def test_weights_depend_on_seed_and_name_only():
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    first, again = random_weights("tiny-llama").read(name), random_weights("tiny-llama").read(name)
    np.testing.assert_array_equal(first, again)
    assert (first != random_weights("tiny-llama").read(other)).mean() > 0.99
    assert (first != random_weights("tiny-llama", seed=1).read(name)).mean() > 0.99


def test_matrices_are_uniform_with_variance_one_over_inputs():
    values = weight_values("w", (1000, 300), np.uint32(salt(0, "w")), np)
    assert values.dtype == np.float32
    assert values.var() == pytest.approx(1 / 300, rel=0.01)
    counts, _ = np.histogram(values, bins=64, range=(-0.1, 0.1))
    expected = values.size / 64
    # Chi-square with 63 degrees of freedom exceeds 103 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 103
    lag = np.corrcoef(values.ravel()[1:], values.ravel()[:-1])[0, 1]
    assert abs(lag) < 0.01
