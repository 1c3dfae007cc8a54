"""The reference of `matmul`, and what runs wherever no kernel of ours is faster."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.target import Target

_FEW_TOKENS = 64
"""Up to here a CPU multiplies faster with the matrix on the left: XLA's CPU backend copies its
right operand into another layout at every call. SmolLM2's layers on 2 cores: 33 against 67 ms for
2 tokens, 60 against 105 for 16, 115 against 146 for 32, no gain for 128 or for 1."""


_PADDED = 8
"""Rows that one row becomes on a GPU where sums stay wide. XLA pads two to seven to eight itself,
but takes one row for a vector, for which cuBLAS has nothing that reads bfloat16 and writes float32:
it then widens the whole matrix first (Llama 3.1 8B's lm head on one H200: 1,304 us instead of 262).
"""


def matmul(x: jax.Array, w: jax.Array, target: Target, out_dtype: Any) -> jax.Array:
    """x [M, K] times w [N, K] transposed: [M, N] of `out_dtype`.

    Accumulates in float32. float32 operands are multiplied as float32, which GPUs and TPUs do
    not do unless asked.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype,
    )
    if target.platform == "cpu" and 1 < x.shape[0] <= _FEW_TOKENS:
        # The barrier keeps XLA from turning the product round again.
        turned: jax.Array = lax.optimization_barrier(product(w, x))
        return turned.T
    rows = x.shape[0]
    if target.platform == "gpu" and rows == 1 and x.dtype != out_dtype:
        x = jnp.pad(x, ((0, _PADDED - rows), (0, 0)))
    result: jax.Array = product(x, w)
    return result[:rows]
