"""Top-k, top-p and min-p without sorting the vocabulary.

Each filter keeps the tokens from some threshold on. A threshold is an integer and the question
whether enough lies above it has one answer however it is summed, so digits are tried from the
highest down, a pass over the logits each. What a row keeps therefore depends on that row alone,
and its bits do not depend on the batch, the device or the number of digits tried at a time.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from lumen_kernels.target import Target

_KEY_BITS = 30
_FARTHEST = 0x5FFFFFFF  # just below 2^65, as float32 bits: e^-2^64 is 0
_NEAREST = 0x20000000  # 2^-63: e^-2^-63 is 1

_WEIGHT_BITS = 24
_HALF = _WEIGHT_BITS // 2

_DIGIT_BITS = 3
"""Seven thresholds in a pass: about as many as a GPU compares while the logits come from memory."""

_Thresholds = Sequence[jax.Array]
"""Several thresholds of each row, every one uint32 [rows]."""


def truncate(
    scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, target: Target
) -> jax.Array:
    """Logits with -inf for the tokens that top-k, top-p and min-p drop, in this order.

    Top-k keeps all tokens at least as probable as the k-th best. Top-p keeps, of what top-k left
    and renormalised, the fewest best tokens that hold a mass of at least top_p, and those as
    probable as the last of them. Min-p keeps tokens at least min_p times as probable as the best.
    Top-p counts in probabilities relative to the best token's, as multiples of 1 / (2^24 - 1),
    and takes those for equally probable that round to the same multiple: what float32 could add
    to a mass is no finer.

    scaled float32 [rows, vocab], vocab below 2^19: logits divided by the temperature, 0 for the
    best token of each row, -inf for what may not be drawn. top_k int32 [rows] (0: all), top_p
    float32 [rows] (1: all), min_p float32 [rows] (0: all).
    """
    return _where_any(
        (top_k > 0) | (top_p < 1) | (min_p > 0),
        lambda: jnp.where(_kept(scaled, top_k, top_p, min_p, target), scaled, -jnp.inf),
        scaled,
        target,
    )


def _where_any(
    rows: jax.Array, compute: Callable[[], jax.Array], otherwise: jax.Array, target: Target
) -> jax.Array:
    """compute(), which gives `otherwise` unless it concerns one of the rows, bool [rows].

    Only a CPU looks before it computes: with an accelerator the host would have to wait for the
    answer, and with it all steps that it could dispatch ahead.
    """
    if target.platform != "cpu":
        return compute()
    result: jax.Array = lax.cond(jnp.any(rows), compute, lambda: otherwise)
    return result


def _kept(
    scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, target: Target
) -> jax.Array:
    """Which tokens stay, bool [rows, vocab]."""
    ratio = jnp.exp(scaled)
    # Barriers keep XLA from computing these again in each pass.
    keys = lax.optimization_barrier(_keys(scaled))
    none = jnp.zeros(scaled.shape[0], jnp.uint32)
    lowest = _where_any(top_k > 0, lambda: _top_k_threshold(keys, top_k), none, target)
    of_top_k = keys >= lowest[:, None]
    weights = lax.optimization_barrier(jnp.where(of_top_k, _weights(ratio), 0))
    lightest = _where_any(top_p < 1, lambda: _top_p_threshold(weights, top_p), none, target)
    kept: jax.Array = of_top_k & (weights >= lightest[:, None]) & (ratio >= min_p[:, None])
    return kept


def _top_k_threshold(keys: jax.Array, top_k: jax.Array) -> jax.Array:
    """The k-th largest key of each row, uint32 [rows]; 0 for top_k 0 and beyond the vocabulary."""
    wanted = jnp.where(top_k > 0, top_k, keys.shape[1] + 1)

    def enough(thresholds: _Thresholds) -> list[jax.Array]:
        counts = _sums([(keys >= t[:, None]).astype(jnp.int32) for t in thresholds])
        return [count >= wanted for count in counts]

    return _largest(enough, keys.shape[0], _KEY_BITS)


def _top_p_threshold(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The least weight that top-p keeps of each row, uint32 [rows]; 0 for top_p 1."""

    def masses(of: Sequence[jax.Array]) -> list[jax.Array]:
        halves = [half for w in of for half in (w >> _HALF, w & ((1 << _HALF) - 1))]
        sums = [one.astype(jnp.float32) for one in _sums(halves)]
        # Both halves fall as a threshold rises, so this does too, however it is rounded.
        return [high * 2.0**_HALF + low for high, low in zip(sums[::2], sums[1::2], strict=True)]

    wanted = jnp.where(top_p < 1, top_p * masses([weights])[0], jnp.inf)

    def enough(thresholds: _Thresholds) -> list[jax.Array]:
        above = masses([jnp.where(weights >= t[:, None], weights, 0) for t in thresholds])
        return [mass >= wanted for mass in above]

    return _largest(enough, weights.shape[0], _WEIGHT_BITS)


def _keys(scaled: jax.Array) -> jax.Array:
    """uint32 below 2^30 that sort as `scaled` does; equal only for equally probable tokens."""
    distance = lax.bitcast_convert_type(scaled, jnp.uint32) & 0x7FFFFFFF
    return _FARTHEST - jnp.clip(distance, _NEAREST, _FARTHEST)


def _weights(ratio: jax.Array) -> jax.Array:
    """Weights in [0, 1] as uint32 below 2^24: their sum is the same in any order."""
    return jnp.round(ratio * (2.0**_WEIGHT_BITS - 1)).astype(jnp.uint32)


def _largest(enough: Callable[[_Thresholds], list[jax.Array]], rows: int, bits: int) -> jax.Array:
    """The largest uint32 below 2^bits of each row for which enough holds, 0 if for none.

    bits: a multiple of _DIGIT_BITS.
    """

    def next_digit(i: jax.Array, found: jax.Array) -> jax.Array:
        shift = (bits - _DIGIT_BITS * (i + 1)).astype(jnp.uint32)
        above = [found | (jnp.uint32(digit) << shift) for digit in range(1, 1 << _DIGIT_BITS)]
        # What is enough above a threshold is so above all lower ones: to count is to find.
        holding = jnp.stack(enough(above)).sum(axis=0, dtype=jnp.uint32)
        return found | (holding << shift)

    passes = bits // _DIGIT_BITS
    found: jax.Array = lax.fori_loop(0, passes, next_digit, jnp.zeros(rows, jnp.uint32))
    return found


def _sums(values: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """Integers summed over the vocabulary, [rows, vocab] to [rows] each, all in one pass."""
    if len(values) == 1:
        return [jnp.sum(values[0], axis=1, dtype=values[0].dtype)]
    sums: Sequence[jax.Array] = lax.reduce(
        tuple(values),
        tuple(jnp.zeros((), one.dtype) for one in values),
        lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True)),
        (1,),
    )
    return sums
