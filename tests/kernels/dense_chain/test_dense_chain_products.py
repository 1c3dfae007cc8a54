"""Many rows: product by product, with sums and norms of one launch between them."""

import re

import jax
import jax.numpy as jnp
import pytest
from lumen_kernels.target import HOPPER, interpreted

from tests.kernels.dense_chain.chain import Shape, exact, operands, run, worst_row

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
