"""Where the chain is not one launch, and what is wrong everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels import dense_chain as package
from lumen_kernels.dense_chain import Meetings, dense_chain, first_norm, no_meetings, rms_norm
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import CPU, HOPPER, Backend, Target

from tests.kernels.dense_chain.chain import EPS, Shape, exact, operands, run, worst_row

TPU = Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite")
AMPERE = Target(Backend.XLA, "gpu", "NVIDIA A100")
SHAPE = Shape(96, 80, 112, 64)
LAST = Shape(96, 80, 112, None)
LARGE = Shape(2048, 2048, 4096, 3072)  # enough weights for the kernel


@pytest.mark.parametrize("shape", [SHAPE, LAST], ids=["with a next layer", "last"])
@pytest.mark.parametrize("m", [1, 12, 65])
@pytest.mark.parametrize("target", [CPU, TPU, HOPPER], ids=["cpu", "tpu", "hopper"])
def test_xla_runs_the_chain_where_there_is_no_kernel(target, m, shape):
    given = operands(shape, m)
    found, wanted = run(given, 3, target), exact(given, 3)
    assert (found[1] is None) == (wanted[1] is None)
    for one, expected in zip(found, wanted, strict=True):
        if one is not None:
            assert one.dtype == jnp.bfloat16
            assert worst_row(one, expected) < 1e-2


@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
def test_float32_is_computed_as_float32(target):
    given = operands(SHAPE, 8, jnp.float32)
    for one, expected in zip(run(given, 1, target), exact(given, 1), strict=True):
        assert one.dtype == jnp.float32
        assert worst_row(one, expected) < 3e-6


def test_the_row_of_norms_matters():
    given = operands(SHAPE, 4)
    hidden, projected = exact(given, 3)
    for row in (2, 4):
        found = run(given, row, CPU)
        assert worst_row(found[0], hidden) > 0.05
        assert worst_row(found[1], projected) > 0.05


def test_reduce_sums_after_o_and_after_down():
    """Halves of heads and of the feed-forward block, as two devices have them, added up."""
    attended, hidden, weights, norms = given = operands(SHAPE, 3, jnp.float32)
    q, inner = SHAPE.q // 2, SHAPE.inner // 2
    gate, up = jnp.split(weights.gate_up, 2)

    def half(index):
        heads, part = slice(index * q, (index + 1) * q), slice(index * inner, (index + 1) * inner)
        of_device = weights._replace(
            o=weights.o[:, heads],
            gate_up=jnp.concatenate([gate[part], up[part]]),
            down=weights.down[:, part],
        )
        return attended[:, heads], of_device

    some, others = half(0), half(1)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), some, others)
    calls = []

    def reduce(x):
        calls.append(x.shape)
        return jax.lax.psum(x, "devices")

    def device(part):
        attended, weights = part
        return run((attended, hidden, weights, norms), 2, CPU, reduce=reduce)

    found = jax.vmap(device, axis_name="devices")(stacked)
    assert calls == [(3, SHAPE.hidden)] * 2
    for both, expected in zip(found, exact(given, 2), strict=True):
        for one in both:
            assert worst_row(one, expected) < 1e-5


def is_one_launch(given, target, **options):
    """Whether a program for the target holds the kernel."""
    program = jax.jit(lambda *given: run(given, 0, target, **options))
    module = jax.export.export(program, platforms=["cuda"])(*given).mlir_module()
    alone = "dot_general" not in module
    assert not alone or module.count("custom_call @mosaic_gpu") == 1
    return alone


def test_only_bfloat16_on_hopper_without_a_sum_over_devices_is_one_launch():
    attended, hidden, weights, norms = given = operands(LARGE, 8)

    def as_type(dtype):
        cast = jax.tree.map(lambda x: x.astype(dtype), (attended, hidden, weights))
        return (*cast, norms)

    assert is_one_launch(given, HOPPER)
    assert not is_one_launch(given, HOPPER, reduce=lambda x: x)
    assert not is_one_launch(given, AMPERE)
    assert not is_one_launch(as_type(jnp.float32), HOPPER)
    assert not is_one_launch(as_type(jnp.float16), HOPPER)


def test_without_the_kernel_meetings_are_handed_on():
    meetings = Meetings(jnp.full((1,), 7, jnp.int32), 7)
    result = dense_chain(*operands(SHAPE, 2), meetings, eps=EPS, target=CPU)
    assert result.meetings is meetings
    assert package.Result._fields == ("hidden", "projected", "meetings")


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


RIGHT = {"o": (96, 80), "gate_up": (224, 96), "down": (96, 112), "qkv": (64, 96)}


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden", {"hidden": zeros(96)}),
        ("attended", {"attended": zeros(80)}),
        ("attended", {"attended": zeros(3, 80)}),
        ("attended", {"attended": zeros(2, 80, dtype=jnp.float32)}),
        ("weights.o", {"o": zeros(96, 64)}),
        ("weights.o", {"o": zeros(80, 96)}),
        ("weights.o", {"o": zeros(96, 80, dtype=jnp.float32)}),
        ("weights.gate_up", {"gate_up": zeros(112, 96)}),
        ("weights.gate_up", {"gate_up": zeros(224, 96, dtype=jnp.float16)}),
        ("weights.down", {"down": zeros(80, 112)}),
        ("weights.down", {"down": zeros(112)}),
        ("weights.down", {"down": zeros(96, 112, dtype=jnp.int8)}),
        ("weights.qkv", {"qkv": zeros(64, 80)}),
        ("weights.qkv", {"qkv": zeros(96)}),
        ("weights.qkv", {"qkv": zeros(64, 96, dtype=jnp.float32)}),
        ("norms", {"norms": zeros(96, dtype=jnp.float32)}),
        ("norms", {"norms": zeros(4, 80, dtype=jnp.float32)}),
        ("norms", {"norms": zeros(4, 96)}),
        ("norm", {"norm": -1}),
        ("norm", {"norm": 3}),
        ("norm", {"norm": 4, "qkv": None}),
    ],
)
@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
def test_a_wrong_argument_is_named(target, argument, change):
    weights = {name: zeros(*shape) for name, shape in RIGHT.items()}
    given = {
        "attended": zeros(2, 80), "hidden": zeros(2, 96), "norm": 0,
        "norms": zeros(4, 96, dtype=jnp.float32), **weights, **change,
    }  # fmt: skip
    weights = package.Weights(*(given.pop(name) for name in RIGHT))
    with pytest.raises(KernelArgumentError, match=f"dense_chain: {argument} ") as failure:
        dense_chain(**given, weights=weights, meetings=no_meetings(), eps=EPS, target=target)
    assert failure.value.argument == argument


@pytest.mark.parametrize("target", [CPU, HOPPER], ids=["cpu", "hopper"])
def test_the_first_norm_is_the_first_row(target):
    _, hidden, _, norms = operands(SHAPE, 3)
    normed, meetings = first_norm(hidden, norms, eps=EPS, target=target)
    np.testing.assert_array_equal(normed, rms_norm(hidden, norms[0], EPS))
    for found in (meetings, no_meetings()):
        np.testing.assert_array_equal(found.counter, np.zeros(1, np.int32))
        assert found.counter.dtype == jnp.int32
        assert found.arrivals == 0


def test_the_last_row_of_norms_can_be_asked_for():
    run(operands(LAST, 2), 5, CPU)
    run(operands(SHAPE, 2), 4, CPU)
