"""Loading: what ends up on which device, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lumen.errors import CheckpointError, ModelConfigError
from lumen.model import load_model
from lumen.placement import Placement
from lumen.random_weights import random_weights
from lumen.sharding import HeadLayout


class WithoutTensor:
    """A source that lacks one tensor."""

    def __init__(self, source, missing):
        self._source, self._missing = source, missing
        self.config, self.revision, self.read = source.config, source.revision, source.read

    def shapes(self):
        return {k: v for k, v in self._source.shapes().items() if k != self._missing}


def test_tied_embedding_and_head_share_one_array(tensor_mesh):
    model = load_model(random_weights("tiny-smollm"), tensor_mesh(2), jnp.float32)
    table = model.head[model.defs.head.paths.index(("table",))]
    assert table is model.embedding[0]
    assert table.shape == (510, 72)  # 509 does not divide by 2
    untied = load_model(random_weights("tiny-llama"), tensor_mesh(1), jnp.float32)
    assert untied.head[untied.defs.head.paths.index(("table",))] is not untied.embedding[0]


def test_arrays_have_the_announced_shapes_types_and_shardings(tensor_mesh):
    model = load_model(random_weights("tiny-qwen2"), tensor_mesh(2), jnp.bfloat16)
    unit = model.defs.unit
    for weights in model.units:
        for array, path, shape, dtype, spec in zip(
            weights, unit.paths, unit.global_shapes, unit.dtypes, unit.specs, strict=True
        ):
            assert (array.shape, array.dtype, array.sharding.spec) == (shape, dtype, spec), path
            wide = path[-1] in ("norms", "qkv_bias")
            assert array.dtype == (jnp.float32 if wide else jnp.bfloat16)
    assert len(unit.paths) == 4 * model.config.unit_layers + 2


@pytest.mark.parametrize("preset", ["tiny-smollm", "tiny-qwen2", "tiny-qwen3"])
def test_generated_on_the_device_or_read_on_the_host_is_the_same(preset, tensor_mesh):
    source = random_weights(preset)
    mesh = tensor_mesh(2)
    model = load_model(source, mesh, jnp.float32)
    heads = HeadLayout(source.config.num_heads, source.config.num_kv_heads, 2)
    placement = Placement(source, mesh, heads, jnp.dtype(jnp.float32), generate=True)
    last = len(model.units) - 1
    generated = placement.unit(model.defs.unit.paths, last)
    for ours, theirs in zip(generated, model.units[last], strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("tensor", [3, 4])
@pytest.mark.parametrize("preset", ["tiny-smollm", "tiny-qwen2"])
def test_the_logical_model_does_not_depend_on_tensor_parallelism(
    preset, tensor, forward, tensor_mesh
):
    tokens = np.arange(24) * 13 % 500
    alone, spread = (
        forward(load_model(random_weights(preset), tensor_mesh(n), jnp.float32), tokens)
        for n in (1, tensor)
    )
    np.testing.assert_allclose(spread, alone, atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(forward, tensor_mesh):
    tokens = np.arange(24) * 13 % 500
    exact, rounded = (
        forward(load_model(random_weights("tiny-llama"), tensor_mesh(1), dtype), tokens)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(exact - rounded).max() < 0.25  # logits have a spread of 1


def test_progress_counts_every_module(tensor_mesh):
    calls = []
    load_model(
        random_weights("tiny-llama"), tensor_mesh(1), jnp.float32, lambda *c: calls.append(c)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_revision_tells_weights_and_dtype_apart(tensor_mesh):
    source, other = random_weights("tiny-qwen2"), random_weights("tiny-qwen2", seed=1)
    revisions = {
        load_model(s, tensor_mesh(1), dtype).revision
        for s in (source, other)
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    assert len(revisions) == 4


def test_missing_tensor_is_named(tensor_mesh):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=name):
        load_model(WithoutTensor(random_weights("tiny-qwen2"), name), tensor_mesh(1), jnp.float32)


def test_wrong_mesh_and_dtype_are_refused(tensor_mesh):
    source = random_weights("tiny-qwen2")
    with pytest.raises(ModelConfigError, match="exactly"):
        load_model(source, Mesh(np.array(jax.devices()[:1]), ("data",)), jnp.float32)
    with pytest.raises(ModelConfigError, match="int8"):
        load_model(source, tensor_mesh(1), jnp.int8)
