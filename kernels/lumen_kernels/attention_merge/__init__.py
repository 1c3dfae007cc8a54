"""Merging partial attention results by their log-sum-exp.

Attention over disjoint sets of keys (segments of an arena, local and remote KV) gives one result
per set; together with the log-sum-exp of each set's scores they determine the result over all.
"""

import jax
import jax.numpy as jnp

from lumen_kernels.attention_merge import xla
from lumen_kernels.errors import KernelArgumentError

__all__ = ["merge"]


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention result over all parts.

    outs [parts, tokens, heads, head_dim]; lses float32 [parts, tokens, heads]: natural
    log-sum-exp of each part's scores, -inf for a part that saw nothing, whose result is then
    ignored and may be NaN.

    Returns the result [tokens, heads, head_dim], in the dtype of outs, and its log-sum-exp,
    float32 [tokens, heads]; zeros and -inf where no part saw anything. Parts are added in their
    order, in float32. Raises KernelArgumentError.

    There is one implementation, for every platform: each input is read once and each output
    written once by one elementwise pass, which XLA runs at the speed of the memory.
    """
    if outs.ndim != 4 or outs.shape[0] == 0 or not jnp.issubdtype(outs.dtype, jnp.floating):
        raise KernelArgumentError(
            "attention_merge.merge",
            "outs",
            "must be floating point [parts, tokens, heads, head_dim] with one part or more; it is "
            f"{outs.dtype}{outs.shape}.",
        )
    if lses.shape != outs.shape[:3] or lses.dtype != jnp.float32:
        raise KernelArgumentError(
            "attention_merge.merge",
            "lses",
            f"must be float32{outs.shape[:3]} for these outs; it is {lses.dtype}{lses.shape}.",
        )
    return xla.merge(outs, lses)
