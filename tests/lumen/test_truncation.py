"""What top-k, top-p and min-p keep, exactly: against sorting, on every target, with equals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.target import CPU, HOPPER

from lumen.truncation import truncate

ROWS = 48
UNIT = 2.0**24 - 1
jitted_truncate = jax.jit(truncate, static_argnames="target")


@functools.cache
def scaled_logits(vocab, equals):
    """Logits with their best at 0; with `equals` many have the same value."""
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 1, (ROWS, vocab)) * rng.choice([0.01, 0.5, 2, 8], (ROWS, 1))
    logits = logits.astype(np.float32)
    if equals:
        logits = logits.astype(jnp.bfloat16).astype(np.float32)
    return logits - logits.max(axis=1, keepdims=True)


def settings(seed):
    rng = np.random.default_rng(seed)
    return {
        "top_k": rng.choice([0, 1, 2, 7, 50, 300, 10_000], ROWS).astype(np.int32),
        "top_p": rng.choice([1, 1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999], ROWS).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.01, 0.2, 1], ROWS).astype(np.float32),
    }


def kept_by_sorting(scaled, top_k, top_p, min_p):
    """Which tokens of one row stay, bool [vocab]."""
    ratio = np.asarray(jnp.exp(scaled))
    kept = np.ones(scaled.size, bool)
    if 0 < top_k <= scaled.size:
        kept &= scaled >= np.sort(scaled)[-top_k]
    if top_p < 1:
        weights = np.where(kept, np.round(ratio * np.float32(UNIT)), 0).astype(np.int64)
        best_first = np.sort(weights)[::-1]
        masses = np.cumsum(best_first).astype(np.float32)
        kept &= weights >= best_first[np.argmax(masses >= top_p * masses[-1])]
    return kept & (ratio >= min_p)


@pytest.mark.parametrize("target", [CPU, HOPPER], ids=lambda target: target.platform)
@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("vocab", [100, 3001])
def test_what_stays_is_what_sorting_would_keep(vocab, equals, target):
    scaled = scaled_logits(vocab, equals)
    for seed in range(6):
        filters = settings(seed)
        truncated = np.asarray(jitted_truncate(scaled, **filters, target=target))
        for row in range(ROWS):
            expected = kept_by_sorting(scaled[row], *(f[row] for f in filters.values()))
            np.testing.assert_array_equal(np.isfinite(truncated[row]), expected)
        np.testing.assert_array_equal(truncated, np.where(np.isfinite(truncated), scaled, -np.inf))


def test_forbidden_tokens_stay_forbidden_and_hold_no_mass():
    scaled = np.log(np.array([[1.0, 0.5, 0.25, 0.2, 0.1]], np.float32))
    scaled[0, 1] = -np.inf

    def kept(top_k=0, top_p=1.0):
        filters = np.array([top_k], np.int32), np.array([top_p], np.float32), np.zeros(1, "f4")
        return np.isfinite(np.asarray(jitted_truncate(scaled, *filters, target=HOPPER))).tolist()

    assert kept() == kept(top_k=100) == [[True, False, True, True, True]]
    assert kept(top_k=2) == [[True, False, True, False, False]]
    assert kept(top_p=0.7) == [[True, False, True, False, False]]  # 1.25 of 1.55
    assert kept(top_k=2, top_p=0.7) == [[True, False, False, False, False]]  # 1 of 1.25


def test_top_p_takes_as_equals_what_rounds_to_the_same_weight():
    scaled = np.log(np.array([[1.0, 100.4 / UNIT, 99.6 / UNIT, 98.0 / UNIT]])).astype(np.float32)
    top_p = np.array([1 - 150 / UNIT], np.float32)
    kept = jitted_truncate(scaled, np.zeros(1, "i4"), top_p, np.zeros(1, "f4"), target=CPU)
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, True, False]])


@pytest.mark.parametrize(("step", "stay"), [(1e-30, 64), (1e-3, 9), (1e4, 9), (1e30, 64)])
def test_top_k_tells_all_apart_but_what_floats_hold_for_certain_or_impossible(step, stay):
    scaled = -step * np.arange(64, dtype=np.float32)[None]
    one = np.ones(1, np.float32)
    kept = jitted_truncate(scaled, np.array([9], "i4"), one, 0 * one, target=HOPPER)
    np.testing.assert_array_equal(np.isfinite(kept)[0], np.arange(64) < stay)
