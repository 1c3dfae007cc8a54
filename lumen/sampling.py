"""Drawing tokens on the device, counter-based.

The draw of the token at position p of a request uses the key fold_in(key(seed), p) and the
request's own logits, nothing else: not the other rows, not the batch size, not the replica.
Everything that decides is therefore either elementwise, a maximum, or a sum of integers, none of
which depends on an order of summation.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from lumen_kernels.target import CPU, Target

from lumen.truncation import truncate

GREEDY_BELOW = 1e-5
"""Temperatures below this are 0: dividing by them says nothing float32 can hold."""

_GROUP = 128  # neighbours among which the largest logit is found first, for log-probabilities


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "seed"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """Sampling parameters of a batch, one entry per row.

    temperature float32 (0: greedy), top_k int32 (0: all), top_p float32 (1: all), min_p float32
    (0: all), seed uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array


def sample_greedy(logits: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The best allowed token of each row, the lowest id among equals.

    logits float32 [rows, vocab]; mask uint32 [rows, ceil(vocab / 32)], bit i % 32 of word i // 32
    set if token i may be drawn, at least one per row. Returns int32 [rows].
    """
    return jnp.argmax(_allowed(logits, mask), axis=-1).astype(jnp.int32)


def sample(
    logits: jax.Array,
    positions: jax.Array,
    params: SamplingArrays,
    mask: jax.Array | None = None,
    *,
    truncates: bool = True,
    target: Target = CPU,
) -> jax.Array:
    """Draw one token per row.

    Order and meaning are Hugging Face's: the mask; logits divided by the temperature; top-k (all
    tokens at least as probable as the k-th best); top-p over what top-k left, renormalised (the
    fewest best tokens that hold a mass of at least top_p, and those as probable as the last of
    them); min-p (tokens at least min_p times as probable as the best one); a draw from the rest.
    Temperature 0 (below GREEDY_BELOW) takes the best allowed token.

    logits float32 [rows, vocab], finite; positions int32 [rows], of the tokens being drawn; mask
    as in `sample_greedy`. truncates: False leaves top-k, top-p and min-p out, for batches in which
    no row that draws asks for any: it draws the same tokens there. target: what it is traced for;
    the draws are the same for all. Returns int32 [rows].
    """
    greedy = params.temperature < GREEDY_BELOW
    logits = _allowed(logits, mask)
    scaled = logits - jnp.max(logits, axis=1, keepdims=True)
    scaled = scaled / jnp.where(greedy, 1.0, params.temperature)[:, None]
    if truncates:
        scaled = truncate(
            scaled,
            jnp.where(greedy, 0, params.top_k),
            jnp.where(greedy, 1.0, params.top_p),
            jnp.where(greedy, 0.0, params.min_p),
            target,
        )
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(params.seed, positions, scaled.shape[1])
    scores = scaled + jnp.where(greedy[:, None], 0.0, noise)
    # Without the barrier XLA's CPU backend computes the noise inside the argmax, not vectorised.
    return jnp.argmax(lax.optimization_barrier(scores), axis=-1).astype(jnp.int32)


def token_logprobs(
    logits: jax.Array, tokens: jax.Array, count: int, target: Target = CPU
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities under the model's own distribution: no mask, temperature 1.

    logits float32 [rows, vocab], finite; tokens int32 [rows]. Returns those of `tokens`, float32
    [rows], and of the `count` best tokens, best first: ids int32 [rows, count], float32
    [rows, count].
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - normaliser
    best, ids = _best(logits, count, target)
    return chosen, ids, best - normaliser[:, None]


def _best(logits: jax.Array, count: int, target: Target) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of each row and their ids int32, of equals the lowest ids first.

    They lie in the `count` groups of neighbours with the largest maxima, so only those have to be
    put in order: a GPU sorts all that lax.top_k is given. On a TPU cutting rows up is a copy.
    """
    rows, vocab = logits.shape
    groups = -(-vocab // _GROUP)
    if groups <= count or target.platform == "tpu":
        best, ids = lax.top_k(logits, count)
        return best, ids.astype(jnp.int32)
    missing = groups * _GROUP - vocab
    padded = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    grouped = padded.reshape(rows, groups, _GROUP)
    _, chosen = lax.top_k(jnp.max(grouped, axis=2), count)
    chosen = jnp.sort(chosen, axis=1)  # candidates in the order of their ids
    candidates = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1)
    best, places = lax.top_k(candidates.reshape(rows, count * _GROUP), count)
    ids = jnp.take_along_axis(chosen, places // _GROUP, axis=1) * _GROUP + places % _GROUP
    return best, ids.astype(jnp.int32)


def _allowed(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Logits with -inf where the mask forbids."""
    if mask is None:
        return logits
    ids = jnp.arange(logits.shape[1], dtype=jnp.uint32)
    bits = (mask[:, ids // 32] >> (ids % 32)) & 1
    return jnp.where(bits == 1, logits, -jnp.inf)


def _noise(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise of one row, float32 [vocab]; entry i does not depend on vocab."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
