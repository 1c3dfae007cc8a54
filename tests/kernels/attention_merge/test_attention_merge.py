"""Merging by log-sum-exp against float64, and against attention over all keys at once."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.attention_merge import merge
from lumen_kernels.errors import KernelArgumentError

from tools.aot.hlo_checks import memory_of
from tools.aot.topologies import SMALLEST, devices_of

BF16 = ml_dtypes.bfloat16


def expected(outs, lses):
    """float64, part by part where something was seen."""
    with np.errstate(divide="ignore"):
        best = lses.max(0)
        finite = np.where(np.isneginf(best), 0, best)
        weights = np.exp(lses.astype(np.float64) - finite)
        mass = weights.sum(0)
        lse = finite + np.log(mass)
    outs = np.where(weights[..., None] > 0, outs.astype(np.float64), 0)
    return (outs * weights[..., None]).sum(0) / np.where(mass > 0, mass, 1)[..., None], lse


def parts(count, tokens=5, heads=3, head_dim=64, dtype=np.float32, spread=4.0, seed=0):
    """Results of parts; some saw nothing and returned NaN, and so did all parts of token 0."""
    rng = np.random.default_rng(seed)
    outs = rng.normal(size=(count, tokens, heads, head_dim)).astype(dtype)
    lses = (spread * rng.normal(size=(count, tokens, heads))).astype(np.float32)
    blind = rng.random(lses.shape) < 0.3
    blind[:, 0] = True
    lses[blind], outs[blind] = -math.inf, math.nan
    return outs, lses


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("spread", [1.0, 200.0])
def test_weighs_parts_by_their_mass(count, dtype, spread):
    outs, lses = parts(count, dtype=dtype, spread=spread, seed=count)
    out, lse = jax.jit(merge)(outs, lses)
    wanted, wanted_lse = expected(outs, lses)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    tolerance = 1e-5 if dtype == np.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, tolerance, tolerance)
    np.testing.assert_allclose(lse, wanted_lse, 1e-5, 1e-5)
    assert not np.asarray(out)[0].any()
    assert np.isneginf(np.asarray(lse)[0]).all()


def test_equals_attention_over_all_keys():
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(40,)) * 3, rng.normal(size=(40, 64))
    cuts = np.split(np.arange(40), [1, 17, 17])  # one part is empty
    outs, lses = [], []
    for cut in cuts:
        weights = np.exp(scores[cut])
        outs.append(weights @ values[cut] / max(weights.sum(), 1e-300))
        lses.append(math.log(weights.sum()) if len(cut) else -math.inf)
    shaped = np.float32(outs)[:, None, None], np.float32(lses)[:, None, None]
    out, lse = merge(*map(jnp.asarray, shaped))
    weights = np.exp(scores)
    np.testing.assert_allclose(out[0, 0], weights @ values / weights.sum(), 1e-5, 1e-6)
    np.testing.assert_allclose(lse[0, 0], math.log(weights.sum()), 1e-6)


def test_a_part_alone_keeps_its_bits():
    outs, lses = parts(3, dtype=BF16)
    lses[0], lses[1:], outs[1:] = 3.25, -math.inf, math.nan
    outs[0] = 1.7
    out, lse = jax.jit(merge)(outs, lses)
    np.testing.assert_array_equal(np.asarray(out), outs[0])
    np.testing.assert_array_equal(lse, lses[0])


@pytest.mark.parametrize("slice_", SMALLEST, ids=lambda one: one.generation)
def test_tpu_program_has_no_large_temporaries(slice_):
    sharding = NamedSharding(Mesh(np.array(devices_of(slice_)[:1]), ("x",)), PartitionSpec())
    outs = jax.ShapeDtypeStruct((2, 2048, 32, 128), BF16)
    lses = jax.ShapeDtypeStruct(outs.shape[:3], jnp.float32)
    program = jax.jit(merge, in_shardings=sharding, out_shardings=sharding)
    memory = memory_of(program.lower(outs, lses).compile())
    assert memory.temp_size_in_bytes < outs.size * 2 // outs.shape[0]


@pytest.mark.parametrize(
    ("argument", "outs", "lses"),
    [
        ("outs", jnp.zeros((2, 3, 64)), jnp.zeros((2, 3))),
        ("outs", jnp.zeros((0, 3, 4, 64)), jnp.zeros((0, 3, 4))),
        ("outs", jnp.zeros((2, 3, 4, 64), jnp.int32), jnp.zeros((2, 3, 4))),
        ("lses", jnp.zeros((2, 3, 4, 64)), jnp.zeros((2, 4, 3))),
        ("lses", jnp.zeros((2, 3, 4, 64)), jnp.zeros((2, 3, 4), jnp.bfloat16)),
    ],
)
def test_bad_arguments_are_named(argument, outs, lses):
    with pytest.raises(KernelArgumentError, match=f"attention_merge.merge: {argument} "):
        merge(outs, lses)
