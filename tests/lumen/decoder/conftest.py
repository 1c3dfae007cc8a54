"""A plain whole-sequence forward pass, the oracle's way of running a loaded model."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lumen_kernels.target import CPU

from lumen.sharding import TENSOR_AXIS
from tests.lumen.rotating import rotating


def dense_attend(window):
    """Causal attention over the tokens at hand, without an arena."""

    def attend(layer, q, k, v, arena):
        count, group = q.shape[0], q.shape[1] // k.shape[1]
        grouped = q.reshape(count, k.shape[1], group, -1)
        scores = jnp.einsum("tkgd,skd->kgts", grouped, k, precision="highest")
        distance = jnp.arange(count)[:, None] - jnp.arange(count)[None, :]
        seen = (distance >= 0) & (distance < (window or count))
        scores = jnp.where(seen, scores / math.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(v.dtype)
        out = jnp.einsum("kgts,skd->tkgd", weights, v, precision="highest")
        return out.reshape(q.shape), arena

    return attend


@functools.cache
def _programs(config, heads, defs, mesh):
    """Embedding, unit and head, compiled as the executor does: one program for all units."""
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False)

    def unit(weights, hidden):
        positions = jnp.arange(hidden.shape[0], dtype=jnp.int32)
        attend = dense_attend(config.sliding_window)
        attend = rotating(attend, config, positions, heads.kv_per_device)
        return defs.unit.merge(weights)(hidden, None, attend, CPU, TENSOR_AXIS)[0]

    def embed(weights, tokens):
        return defs.embedding.merge(weights)(tokens, TENSOR_AXIS)

    def head(weights, hidden):
        return defs.head.merge(weights)(hidden, CPU, TENSOR_AXIS)

    return (
        jax.jit(shard(embed, in_specs=(defs.embedding.specs, P()))),
        jax.jit(shard(unit, in_specs=(defs.unit.specs, P()))),
        jax.jit(shard(head, in_specs=(defs.head.specs, P()))),
    )


@pytest.fixture(scope="session")
def forward():
    """(model, token ids) to logits float32 [tokens, vocab]."""

    def run(model, tokens):
        embed, unit, head = _programs(model.config, model.heads, model.defs, model.mesh)
        hidden = embed(model.embedding, np.asarray(tokens, np.int32))
        for weights in model.units:
            hidden = unit(weights, hidden)
        return np.asarray(head(model.head, hidden))

    return run


@pytest.fixture(scope="session")
def tensor_mesh():
    """A mesh over the first n virtual devices."""
    return lambda n: Mesh(np.array(jax.devices()[:n]), (TENSOR_AXIS,))
