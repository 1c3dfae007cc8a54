"""Many rows: product by product, with sums and norms of one launch between them."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from lumen_kernels.dense_chain import Weights, dense_chain, no_meetings
from lumen_kernels.target import CPU, HOPPER, interpreted

from lumen.presets import preset
from tests.kernels.dense_chain.chain import EPS, Shape, exact, operands, run, worst_row

ROUNDING = 7e-3
SHAPE = Shape(1024, 512, 768, 256)
LAST = Shape(1024, 512, 768, None)


@pytest.mark.parametrize("shape", [SHAPE, LAST], ids=["with a next layer", "last"])
@pytest.mark.parametrize("reduce", [None, lambda x: x], ids=["alone", "of several devices"])
def test_many_rows_are_products_and_norms(shape, reduce):
    given = operands(shape, 70)
    found, wanted = run(given, 3, interpreted(HOPPER), reduce=reduce), exact(given, 3)
    for one, expected in zip(found, wanted, strict=True):
        if one is not None:
            assert one.dtype == jnp.bfloat16
            assert worst_row(one, expected) < ROUNDING


@pytest.mark.parametrize(("last", "norms"), [(False, 2), (True, 1)])
def test_each_sum_and_norm_between_products_is_one_launch(last, norms):
    qkv = None if last else 256
    given = jax.eval_shape(lambda: operands(Shape(1024, 512, 768, qkv), 70))
    program = jax.jit(lambda *given: run(given, 3, HOPPER))
    module = jax.export.export(program, platforms=["cuda"])(*given).mlir_module()
    assert len(re.findall(r"call @run\w*\(", module)) == norms
    assert "stablehlo.rsqrt" not in module


def lowered(m, target, last=False, **options):
    config = preset("llama-3.1-8b")
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads
    q = heads * config.head_dim

    def struct(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype)

    qkv = None if last else struct(q + 2 * config.num_kv_heads * config.head_dim, hidden)
    weights = Weights(
        struct(hidden, q), struct(2 * inner, hidden), struct(hidden, inner), qkv
    )  # fmt: skip

    def program(*given):
        made = dense_chain(*given, no_meetings(), eps=EPS, target=target, **options)
        return made.hidden, made.projected

    norms = struct(4, hidden, dtype=jnp.float32)
    exported = jax.export.export(jax.jit(program), platforms=["cuda"])
    return exported(struct(m, q), struct(m, hidden), weights, norms).mlir_module()


@pytest.mark.parametrize(
    ("m", "last", "parts"),
    [
        (64, False, 0),
        (128, False, 1),
        (128, True, 0),  # no norm follows down, and XLA adds up by itself
        (256, False, 1),
        (1024, False, 0),
    ],
)
def test_parts_of_down_are_left_to_the_norm(m, last, parts):
    assert lowered(m, HOPPER, last).count(f"-> tensor<2x{m}x4096xf32>") == parts


def test_only_the_kernel_adds_up_parts_and_only_on_one_device():
    whole = functools.partial(lowered, 256)
    assert "x256x4096xf32>" not in whole(HOPPER, reduce=lambda x: x)
    assert "-> tensor<2x256x4096xf32>" not in whole(CPU)
