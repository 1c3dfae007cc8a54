"""Residual sums and norms: the reference, the Hopper kernel in its interpreter, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.add_norm import add_rms_norm, mosaic_gpu, rms_norm_and_zero, xla
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import CPU, HOPPER, Backend, Target, interpreted

from lumen.presets import PRESETS

EPS = 0.3  # large enough to be missed if it were left out
TPU = Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite")
INTERPRETED = interpreted(HOPPER)
ROUNDING = 2.5e-3  # of one result rounded to bfloat16, over a row


def operands(rows, width, dtype=jnp.bfloat16, seed=0):
    random = np.random.default_rng(seed)
    x, residual = (jnp.asarray(random.normal(size=(rows, width)), dtype) for _ in range(2))
    return x, residual, jnp.asarray(random.uniform(0.5, 1.5, size=width), jnp.float32)


def exact(hidden, weight):
    """The norm in float64."""
    hidden, weight = np.asarray(hidden, np.float64), np.asarray(weight, np.float64)
    return hidden / np.sqrt(np.mean(hidden * hidden, axis=1, keepdims=True) + EPS) * weight


def worst_row(found, expected):
    """The largest relative error of any row; infinite where it is not a number."""
    off = np.linalg.norm(np.asarray(found, np.float64) - expected, axis=1)
    return np.nan_to_num(off / np.linalg.norm(expected, axis=1), nan=np.inf).max(initial=0)


@pytest.fixture
def kernel_alone(monkeypatch):
    """Nothing may go to XLA."""
    monkeypatch.setattr(xla, "rms_norm", None)
    monkeypatch.setattr(xla, "add_rms_norm", None)


def check(rows, width, target, dtype=jnp.bfloat16, limit=ROUNDING):
    x, residual, weight = operands(rows, width, dtype)
    hidden, normed = add_rms_norm(x, residual, weight, EPS, target=target)
    for one in (hidden, normed):
        assert one.dtype == dtype
        assert one.shape == (rows, width)
    # Both are of one dtype: their sum is rounded once, everywhere.
    np.testing.assert_array_equal(hidden, residual + x)
    assert worst_row(normed, exact(hidden, weight)) < limit
    alone, _ = rms_norm_and_zero(hidden, weight, EPS, target=target)
    assert alone.dtype == dtype
    assert worst_row(alone, exact(hidden, weight)) < limit
    return normed, alone


@pytest.mark.parametrize("target", [CPU, TPU, HOPPER], ids=["cpu", "tpu", "hopper"])
@pytest.mark.parametrize(("rows", "width"), [(0, 96), (1, 96), (5, 96), (3, 640)])
def test_xla_adds_and_norms_where_there_is_no_kernel(rows, width, target):
    check(rows, width, target)


@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
@pytest.mark.parametrize("width", [96, 2048])
def test_float32_is_computed_as_float32(width, target):
    check(3, width, target, jnp.float32, 1e-6)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("width", [1024, 2560, 3584])
def test_the_kernel_adds_and_norms(rows, width, kernel_alone):
    with_sum, alone = check(rows, width, INTERPRETED)
    np.testing.assert_array_equal(with_sum, alone)


def check_parts(parts, rows, width, target):
    _, residual, weight = operands(rows, width)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(parts, rows, width)), jnp.float32)
    hidden, normed = add_rms_norm(x, residual, weight, EPS, target=target)
    assert hidden.dtype == normed.dtype == jnp.bfloat16
    # Added up first and rounded once.
    expected = np.asarray(residual, np.float64) + np.asarray(x, np.float64).sum(axis=0)
    assert worst_row(hidden, expected) < ROUNDING
    assert worst_row(normed, exact(hidden, weight)) < ROUNDING


@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
@pytest.mark.parametrize("parts", [1, 3])
def test_xla_adds_up_parts(parts, target):
    check_parts(parts, 5, 96, target)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_kernel_adds_up_parts(parts, kernel_alone):
    check_parts(parts, 3, 1024, INTERPRETED)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "width"), [(33, 2048), (3, 4096), (2, 8192), (130, 1024)])
def test_the_kernel_adds_and_norms_more(rows, width, kernel_alone):
    check(rows, width, INTERPRETED)


def test_a_row_has_the_same_bits_whatever_the_others_are(kernel_alone):
    x, residual, weight = operands(4, 1024)
    _, whole = add_rms_norm(x, residual, weight, EPS, target=INTERPRETED)
    others = x[:3].at[1].set(jnp.nan).at[2].multiply(100)
    _, some = add_rms_norm(others, residual[:3], weight, EPS, target=INTERPRETED)
    np.testing.assert_array_equal(some[0], whole[0])
    assert np.isnan(np.asarray(some[1], np.float32)).all()

    # The comparison sees a row in which one number is another.
    nudged = others.at[0, 700].add(1)
    _, changed = add_rms_norm(nudged, residual[:3], weight, EPS, target=INTERPRETED)
    assert (changed[0] != whole[0]).any()


@pytest.mark.parametrize(("width", "target"), [(96, CPU), (96, HOPPER), (1024, INTERPRETED)])
def test_a_zero_comes_along(width, target):
    x, _, weight = operands(3, width)
    normed, zero = rms_norm_and_zero(x, weight, EPS, target=target)
    assert worst_row(normed, exact(x, weight)) < ROUNDING
    np.testing.assert_array_equal(zero, np.zeros(1, np.int32))
    assert zero.dtype == jnp.int32


def test_the_widths_of_models_have_a_kernel():
    wide = {p.hidden_size for p in PRESETS.values() if p.hidden_size >= 2048}
    assert wide
    assert all(map(mosaic_gpu.supports, wide))
    assert [n for n in (512, 1024, 1152, 3584, 4100, 8192, 8704) if mosaic_gpu.supports(n)] == [
        1024, 3584, 8192,
    ]  # fmt: skip


def lowered(operation, rows, width):
    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    states, weight = struct(rows, width), struct(width, dtype=jnp.float32)
    given = (states, states, weight) if operation is add_rms_norm else (states, weight)
    program = jax.jit(lambda *arrays: operation(*arrays, 1e-5, target=HOPPER))
    return jax.export.export(program, platforms=["cuda"])(*given).mlir_module()


@pytest.mark.parametrize("operation", [add_rms_norm, rms_norm_and_zero])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (77, 3584), (4096, 8192)])
def test_it_lowers_for_hopper_as_one_launch(rows, width, operation):
    module = lowered(operation, rows, width)
    assert module.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.rsqrt" not in module


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("residual", {"residual": zeros(96)}),
        ("residual", {"residual": zeros(2, 96, dtype=jnp.int32)}),
        ("weight", {"weight": zeros(96)}),
        ("weight", {"weight": zeros(80, dtype=jnp.float32)}),
        ("weight", {"weight": zeros(2, 96, dtype=jnp.float32)}),
        ("x", {"x": zeros(3, 96)}),
        ("x", {"x": zeros(2, 80)}),
        ("x", {"x": zeros(2, 96, dtype=jnp.float32)}),
        ("x", {"x": zeros(1, 2, 96)}),
        ("x", {"x": zeros(4, 2, 96)}),
        ("x", {"x": zeros(0, 2, 96, dtype=jnp.float32)}),
        ("x", {"x": zeros(4, 3, 96, dtype=jnp.float32)}),
    ],
)
@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
def test_a_wrong_argument_is_named(target, argument, change):
    right = {"x": zeros(2, 96), "residual": zeros(2, 96), "weight": zeros(96, dtype=jnp.float32)}
    given = {**right, **change}
    with pytest.raises(KernelArgumentError, match=f"^add_rms_norm: {argument} ") as failure:
        add_rms_norm(**given, eps=EPS, target=target)
    assert failure.value.argument == argument
    if argument == "x":
        return
    expected = "x" if argument == "residual" else argument
    with pytest.raises(KernelArgumentError, match=f"^rms_norm_and_zero: {expected} "):
        rms_norm_and_zero(given["residual"], given["weight"], EPS, target=target)
