"""A unit of a model, its layers' chains as launches of the interpreted kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lumen_kernels.dense_chain import cut, xla
from lumen_kernels.target import CPU

from lumen.decoder import DecoderUnit
from lumen.presets import preset
from lumen.sharding import HeadLayout
from tests.kernels.dense_chain.chain import on, worst_row
from tests.lumen.rotating import rotating


def attend(layer, q, k, v, arena):
    """Each token to itself alone."""
    return jnp.repeat(v, q.shape[1] // v.shape[1], axis=1) + q * (layer + 1), arena


def unit_of_two_layers():
    config = dataclasses.replace(
        preset("tiny-llama"), hidden_size=128, intermediate_size=192, unit_layers=2
    )
    unit = DecoderUnit(config, HeadLayout(config.num_heads, config.num_kv_heads, 1), jnp.bfloat16)
    random = np.random.default_rng(0)
    for layer in unit.layers:
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            shape = matrix[...].shape
            matrix[...] = jnp.asarray(random.normal(size=shape) / np.sqrt(shape[1]), jnp.bfloat16)
    norms = random.uniform(0.5, 1.5, size=unit.norms[...].shape)
    unit.norms[...] = jnp.asarray(norms, jnp.float32)
    return config, nnx.split(unit)


def test_a_unit_gives_the_same_hidden_states_with_the_kernel_as_without(monkeypatch):
    config, (definition, weights) = unit_of_two_layers()
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(3, 128)), jnp.bfloat16)

    def run(target, weights=weights):
        unit = nnx.merge(definition, weights)
        positions = jnp.array([4, 0, 9], jnp.int32)
        return unit(hidden, None, rotating(attend, config, positions, config.num_kv_heads), target)[
            0
        ]

    expected = run(CPU)
    monkeypatch.setattr(cut, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(xla, "run", None)
    found = run(on(2))
    assert worst_row(found, expected) < 1e-2

    # The comparison sees it if a layer gets another one's norms.
    turned = jax.tree.map(lambda x: x[::-1] if x.ndim == 3 else x, weights)
    monkeypatch.undo()
    assert worst_row(run(CPU, turned), expected) > 0.1
