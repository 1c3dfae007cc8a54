import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.matmul import matmul, silu_gated
from lumen_kernels.target import CPU, HOPPER, Backend, Target

TPU = Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite")


def operands(m, n, k, dtype=jnp.bfloat16, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in ((m, k), (n, k)))


def exact(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64).T


def relative_error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("m", [1, 2, 64, 65])
@pytest.mark.parametrize("target", [CPU, TPU], ids=["cpu", "tpu"])
def test_xla_multiplies_where_there_is_no_kernel(m, target):
    x, w = operands(m, 96, 80)
    out = matmul(x, w, target=target)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, exact(x, w)) < 3e-3
    wide = matmul(x, w, target=target, out_dtype=jnp.float32)
    assert wide.dtype == jnp.float32
    assert relative_error(wide, exact(x, w)) < 1e-5


@pytest.mark.parametrize("target", [CPU, HOPPER, TPU], ids=["cpu", "hopper", "tpu"])
def test_float32_is_multiplied_as_float32(target):
    x, w = operands(8, 4096, 256, jnp.float32)
    assert relative_error(matmul(x, w, target=target), exact(x, w)) < 1e-6
    text = jax.jit(lambda x, w: matmul(x, w, target=target)).lower(x, w).as_text()
    assert "HIGHEST" in text


@pytest.mark.parametrize(
    ("m", "out_dtype", "target", "rows"),
    [
        (1, jnp.float32, HOPPER, 8),
        (2, jnp.float32, HOPPER, 2),
        (1, jnp.bfloat16, HOPPER, 1),
        (1, jnp.float32, TPU, 1),
    ],
)
def test_a_gpu_multiplies_one_row_as_eight_where_sums_stay_wide(m, out_dtype, target, rows):
    x, w = operands(m, 1 << 17, 16)  # as long as an lm head: XLA's on every target

    def product(x, w):
        return matmul(x, w, target=target, out_dtype=out_dtype)

    out = jax.jit(product)(x, w)
    assert out.shape == (m, 1 << 17)
    assert relative_error(out, exact(x, w)) < (1e-5 if out_dtype == jnp.float32 else 3e-3)
    assert re.search(rf"dot_general.*\(tensor<{rows}x16x", jax.jit(product).lower(x, w).as_text())


@pytest.mark.parametrize(("m", "turned"), [(1, False), (2, True), (64, True), (65, False)])
def test_a_cpu_multiplies_few_tokens_with_the_matrix_on_the_left(m, turned):
    x, w = operands(m, 96, 80)

    def text(target):
        return jax.jit(lambda x, w: matmul(x, w, target=target)).lower(x, w).as_text()

    assert ("optimization_barrier" in text(CPU)) == turned
    assert "optimization_barrier" not in text(TPU)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("x", {"x": jnp.zeros((4,), jnp.bfloat16)}),
        ("x", {"x": jnp.zeros((4, 64), jnp.int8), "w": jnp.zeros((8, 64), jnp.int8)}),
        ("w", {"w": jnp.zeros((8, 32), jnp.bfloat16)}),
        ("w", {"w": jnp.zeros((64,), jnp.bfloat16)}),
        ("w", {"w": jnp.zeros((8, 64), jnp.float32)}),
        ("out_dtype", {"out_dtype": jnp.float16}),
        ("out_dtype", {"out_dtype": jnp.int32}),
    ],
)
def test_a_wrong_argument_is_named(argument, change):
    right = {"x": jnp.zeros((4, 64), jnp.bfloat16), "w": jnp.zeros((8, 64), jnp.bfloat16)}
    with pytest.raises(KernelArgumentError, match=f"matmul: {argument} ") as failure:
        matmul(**{**right, **change}, target=CPU)
    assert failure.value.argument == argument


def gated(x, w):
    gate, up = np.split(exact(x, w), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("m", [1, 2, 65])
@pytest.mark.parametrize("target", [CPU, TPU], ids=["cpu", "tpu"])
def test_xla_gates_where_there_is_no_kernel(m, target):
    x, w = operands(m, 96, 80)
    out = silu_gated(x, w * jnp.bfloat16(0.1), target=target)
    assert (out.shape, out.dtype) == ((m, 48), jnp.bfloat16)
    assert relative_error(out, gated(x, w * jnp.bfloat16(0.1))) < 1e-2


def test_float32_is_gated_in_float32():
    x, w = operands(8, 512, 256, jnp.float32)
    assert relative_error(silu_gated(x, w, target=HOPPER), gated(x, w)) < 1e-6


@pytest.mark.parametrize("w", [jnp.zeros((7, 64)), jnp.zeros((8, 32)), jnp.zeros((64,))])
def test_weights_of_a_gate_and_its_like_are_checked(w):
    with pytest.raises(KernelArgumentError, match="silu_gated: w ") as failure:
        silu_gated(jnp.zeros((4, 64)), w, target=CPU)
    assert failure.value.argument == "w"
