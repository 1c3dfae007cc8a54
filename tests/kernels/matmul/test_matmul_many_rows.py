"""The Hopper kernel for many rows in its interpreter, and lowered for the chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.matmul import many_rows, matmul, rule, silu_gated
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
    "bands of columns": (384, 256, 128, dataclasses.replace(ONE, band=3, sideways=True)),
    "tiles of 88 results": (128, 352, 128, dataclasses.replace(ONE, tile_n=176, stored=88)),
    "tiles of their own": (640, 128, 192, dataclasses.replace(ONE, apart=True, rows=128)),
    "tiles of their own, three for two": (
        384,
        128,
        128,
        dataclasses.replace(ONE, apart=True, rows=128, sharing=2, stages=3, clusters=1),
    ),
    "w shared": (384, 128, 192, dataclasses.replace(ONE, row_blocks=2)),
    "x shared": (136, 192, 192, dataclasses.replace(ONE, sharing=2)),
    "both shared, a warpgroup ahead": (
        256,
        256,
        192,
        dataclasses.replace(ONE, sharing=2, row_blocks=2, clusters=1, lead=2),
    ),
    "ahead by more than there are steps": (128, 64, 64, dataclasses.replace(ONE, lead=2)),
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
