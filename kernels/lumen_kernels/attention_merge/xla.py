"""Merging partial attention results in plain XLA, for every platform."""

import functools
import operator

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `lumen_kernels.attention_merge.merge`.

    The parts are few, and added one by one: a reduction over the leading dimension would not be
    one elementwise pass, nor would its order be ours.
    """
    parts = range(outs.shape[0])
    best = functools.reduce(jnp.maximum, (lses[part] for part in parts))
    # Anything finite will do where nothing was seen: the weights are zero.
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(best), 0.0, best))
    mass = functools.reduce(operator.add, (weights[part] for part in parts))
    seen = mass > 0
    some = jnp.where(seen, mass, 1.0)
    shares = weights / some
    total = functools.reduce(
        operator.add,
        (
            # Not left to a zero weight: what a part that saw nothing returned may be NaN.
            jnp.where(shares[part][..., None] > 0, outs[part].astype(jnp.float32), 0.0)
            * shares[part][..., None]
            for part in parts
        ),
    )
    return total.astype(outs.dtype), jnp.where(seen, best + jnp.log(some), -jnp.inf)
