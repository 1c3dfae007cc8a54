"""The Hopper kernel for many rows in its interpreter, and lowered for the chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.matmul import many_rows, rule, silu_gated
from lumen_kernels.matmul.rule import Blocking
from lumen_kernels.target import CPU, HOPPER, Backend, Target

GATE_UP = (28672, 4096)
ONE = Blocking(tile_n=64, clusters=2, stages=2, stored=32)
BLOCKINGS = {
    # name: (m, n, k, blocking)
    "one tile": (128, 64, 128, ONE),
    "several tiles per block, bands of different heights": (
        640,
        128,
        128,
        dataclasses.replace(ONE, band=2),
    ),
    "the last tiles overlap": (200, 160, 128, ONE),
    "one slot, more stages than steps": (
        128,
        128,
        64,
        dataclasses.replace(ONE, stages=3, slots=1, clusters=1),
    ),
    "w shared": (384, 128, 192, dataclasses.replace(ONE, row_blocks=2)),
    "rows of 128": (256, 64, 128, dataclasses.replace(ONE, rows=128)),
    "deeper stages": (128, 64, 256, dataclasses.replace(ONE, tile_k=128)),
}


def operands(m, n, k, seed=0):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(m, k)), jnp.bfloat16)
    return x, jnp.asarray(random.normal(size=(n, k)) * k**-0.5, jnp.bfloat16)


def exact(x, w, gated=False):
    product = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    if not gated:
        return product
    gate, up = np.split(product, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", BLOCKINGS)
def test_the_kernel_multiplies(name, gated):
    m, n, k, blocking = BLOCKINGS[name]
    x, w = operands(m, n, k)
    out = many_rows.matmul(x, w, blocking, jnp.float32, gated=gated, interpret=True)
    assert out.dtype == jnp.float32
    assert out.shape == (m, n // 2 if gated else n)
    assert relative_error(out, exact(x, w, gated)) < 1e-6


def test_a_result_is_rounded_once():
    m, n, k, blocking = BLOCKINGS["the last tiles overlap"]
    x, w = operands(m, n, k)
    out = many_rows.matmul(x, w, blocking, jnp.float32, gated=True, interpret=True)
    rounded = many_rows.matmul(x, w, blocking, jnp.bfloat16, gated=True, interpret=True)
    np.testing.assert_array_equal(rounded, out.astype(jnp.bfloat16))


def test_a_row_has_the_same_bits_whatever_the_others_are():
    x, w = operands(384, 128, 128)
    whole = many_rows.matmul(x, w, ONE, jnp.float32, interpret=True)
    part = many_rows.matmul(x[128:], w, ONE, jnp.float32, interpret=True)
    np.testing.assert_array_equal(whole[128:], part)


@pytest.mark.parametrize("m", [384, 512, 768, 1024, 2048, 4096, 8192])
def test_the_gated_product_lowers_for_hopper(m):
    n, k = GATE_UP
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (n, k)))
    program = jax.jit(lambda x, w: silu_gated(x, w, target=HOPPER))
    exported = jax.export.export(program, platforms=["cuda"])(x, w)
    assert exported.out_avals[0].shape == (m, n // 2)
    assert "many_rows_gated" in exported.mlir_module()


def test_many_rows_are_cut_so_that_the_chip_is_busy():
    def cut(m, shape=GATE_UP, dtype=jnp.bfloat16, target=HOPPER):
        return rule.gated_blocking(m, shape, jnp.dtype(dtype), target)

    cuts = {m: cut(m) for m in (384, 512, 768, 1024, 2048, 4096, 8192)}
    assert {m: (one.tile_n, one.stored, one.slots, one.clusters) for m, one in cuts.items()} == {
        384: (224, 16, 4, 132),
        512: (224, 16, 4, 66),
        768: (224, 16, 4, 66),
        1024: (256, 64, 2, 66),
        2048: (256, 64, 2, 66),
        4096: (256, 64, 2, 66),
        8192: (256, 64, 2, 66),
    }
    assert [m for m, one in cuts.items() if one.row_blocks == 1] == [384]
    for m in (256, 320, 448, 511, 520, 640, 896):  # few, or not measured, or the chip would idle
        assert cut(m) is None
    assert cut(1024, (14336, 4096)) is None
    assert cut(1024, (28656, 4096)) is None
    assert cut(1024, dtype=jnp.float32) is None
    for target in (CPU, Target(Backend.XLA, "gpu"), Target(Backend.MOSAIC_TPU, "tpu")):
        assert cut(1024, target=target) is None


@pytest.mark.parametrize(("m", "tile_n"), [(256, 256), (512, 224)])
def test_the_operation_runs_the_kernel_as_the_rule_cuts_it(m, tile_n, monkeypatch):
    monkeypatch.setattr(rule, "_SMALL", 0)
    monkeypatch.setattr(rule, "_MANY", 256)
    monkeypatch.setattr(rule, "gated_tiling", lambda *_: None)
    few_cores = Target(Backend.MOSAIC_GPU, "gpu", cores=2, interpret=True)
    x, w = operands(m, 2 * tile_n, 256)
    blocking = rule.gated_blocking(m, w.shape, x.dtype, few_cores)
    assert blocking is not None
    assert blocking.tile_n == tile_n
    assert relative_error(silu_gated(x, w, target=few_cores), exact(x, w, gated=True)) < 4e-3


@pytest.mark.parametrize(
    "w", [jnp.zeros((7, 4096), jnp.bfloat16), jnp.zeros((64, 4096)), jnp.zeros((28672, 2048))]
)
def test_wrong_weights_are_named_before_anything_is_cut(w):
    x = jnp.zeros((512, 4096), jnp.bfloat16)
    with pytest.raises(KernelArgumentError, match="silu_gated: w ") as failure:
        silu_gated(x, w, target=HOPPER)
    assert failure.value.argument == "w"
