"""Sampling: distributions against a numpy reference, and independence of everything else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lumen_kernels.target import CPU, HOPPER, Backend, Target

from lumen.sampling import SamplingArrays, _noise, sample, sample_greedy, token_logprobs

VOCAB = 100
DRAWS = 4096
jitted_sample = jax.jit(sample, static_argnames=("truncates", "target"))
TPU = Target(Backend.MOSAIC_TPU, "tpu")


def arrays(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    fill = functools.partial(np.broadcast_to, shape=(rows,))
    return SamplingArrays(
        temperature=jnp.asarray(fill(np.float32(temperature))),
        top_k=jnp.asarray(fill(np.int32(top_k))),
        top_p=jnp.asarray(fill(np.float32(top_p))),
        min_p=jnp.asarray(fill(np.float32(min_p))),
        seed=jnp.asarray(fill(np.asarray(seed, np.uint32))),
    )


def logits_of(rows, vocab=VOCAB, seed=0, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, vocab)).astype(np.float32)


def packed(allowed):
    """A mask uint32 [rows, words] from bool [rows, vocab]."""
    rows, vocab = allowed.shape
    padded = np.zeros((rows, -(-vocab // 32) * 32), bool)
    padded[:, :vocab] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, allowed=None):
    """Probabilities of one row by sorting, in float64."""
    scaled = logits.astype(np.float64) / temperature
    if allowed is not None:
        scaled[~allowed] = -np.inf
    order = np.argsort(-scaled)
    probabilities = np.exp(scaled - scaled.max())
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros(len(logits), bool)
    kept[order[before < top_p]] = True
    kept &= probabilities >= min_p * probabilities.max()
    probabilities = np.where(kept, probabilities, 0)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_k": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_draws_follow_the_reference_distribution(settings, masked):
    row = logits_of(1)[0]
    allowed = np.random.default_rng(1).random(VOCAB) < 0.5 if masked else None
    mask = None if allowed is None else packed(np.tile(allowed, (DRAWS, 1)))
    tokens = jitted_sample(
        np.tile(row, (DRAWS, 1)),
        jnp.arange(DRAWS, dtype=jnp.int32),
        arrays(DRAWS, seed=7, **settings),
        mask,
    )
    expected = reference(row, allowed=allowed, **settings) * DRAWS
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Rare tokens share one cell, as the chi-square approximation wants 5 expected in each.
    rare = expected < 5
    cells = np.append(expected[~rare], expected[rare].sum())
    seen = np.append(counts[~rare], counts[rare].sum())
    cells, seen = cells[cells > 0], seen[cells > 0]
    statistic = ((seen - cells) ** 2 / cells).sum()
    freedom = len(cells) - 1
    # Wilson-Hilferty: one in 10,000 draws of the statistic is beyond.
    limit = (
        freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.72 * (2 / (9 * max(freedom, 1))) ** 0.5) ** 3
    )
    assert statistic <= max(limit, 1e-9)


def test_rows_have_their_own_settings_and_temperature_zero_is_greedy():
    logits = logits_of(6)
    params = SamplingArrays(
        temperature=jnp.array([0, 1, 1, 0.5, 0, 2], jnp.float32),
        top_k=jnp.array([3, 1, 0, 2, 0, 0], jnp.int32),
        top_p=jnp.array([1, 1, 1e-6, 1, 0.5, 1], jnp.float32),
        min_p=jnp.array([0, 0, 0, 0, 0.3, 1], jnp.float32),
        seed=jnp.arange(6, dtype=jnp.uint32),
    )
    best = logits.argmax(axis=1)
    for position in range(20):
        tokens = np.asarray(jitted_sample(logits, jnp.full(6, position, jnp.int32), params))
        np.testing.assert_array_equal(np.delete(tokens, 3), np.delete(best, 3))
        assert tokens[3] in np.argsort(-logits[3])[:2]


@pytest.mark.parametrize("extreme", [1e-45, 1e-30, 1.1e-5, 1e-4])
def test_tiny_temperatures_are_greedy(extreme):
    logits = logits_of(4)
    tokens = jitted_sample(logits, jnp.arange(4, dtype=jnp.int32), arrays(4, temperature=extreme))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_a_draw_depends_on_seed_and_position():
    logits = np.tile(logits_of(1), (64, 1))
    same = jitted_sample(logits, jnp.full(64, 5, jnp.int32), arrays(64, seed=9))
    assert len(set(np.asarray(same).tolist())) == 1
    by_position = jitted_sample(logits, jnp.arange(64, dtype=jnp.int32), arrays(64, seed=9))
    by_seed = jitted_sample(logits, jnp.full(64, 5, jnp.int32), arrays(64, seed=np.arange(64)))
    assert len(set(np.asarray(by_position).tolist())) > 8
    assert len(set(np.asarray(by_seed).tolist())) > 8


MIXED = {
    "temperature": np.array([1.0, 0.8, 1.3, 0.0, 1.0], np.float32),
    "top_k": np.array([0, 40, 0, 0, 7], np.int32),
    "top_p": np.array([1.0, 1.0, 0.9, 1.0, 0.95], np.float32),
    "min_p": np.array([0.0, 0.0, 0.02, 0.0, 0.0], np.float32),
    "seed": np.array([1, 2, 3, 4, 2**32 - 1], np.uint32),
}


def drawn_alone(logits, position):
    return np.array(
        [
            jitted_sample(
                logits[i : i + 1],
                jnp.array([position], jnp.int32),
                SamplingArrays(**{k: jnp.asarray(v[i : i + 1]) for k, v in MIXED.items()}),
            )[0]
            for i in range(5)
        ]
    )


@pytest.mark.parametrize("copies", [1, 3, 8])
def test_a_draw_does_not_depend_on_the_batch(copies):
    vocab = 3001  # no multiple of any vector width
    logits = logits_of(5, vocab)
    for position in (0, 1, 4095):
        alone = drawn_alone(logits, position)
        rows = np.random.default_rng(copies).permutation(np.repeat(np.arange(5), copies))
        together = jitted_sample(
            logits[rows],
            jnp.full(len(rows), position, jnp.int32),
            SamplingArrays(**{k: jnp.asarray(v[rows]) for k, v in MIXED.items()}),
        )
        np.testing.assert_array_equal(together, alone[rows])


def test_a_draw_does_not_depend_on_tensor_parallelism():
    logits = logits_of(5, 3001)
    params = SamplingArrays(**{k: jnp.asarray(v) for k, v in MIXED.items()})
    positions = jnp.full(5, 17, jnp.int32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    spread = jax.jit(jax.shard_map(sample, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    np.testing.assert_array_equal(spread(logits, positions, params), drawn_alone(logits, 17))


@pytest.mark.parametrize("target", [HOPPER, TPU], ids=lambda target: target.platform)
def test_a_draw_does_not_depend_on_the_target(target):
    logits = logits_of(5, 3001)
    params = SamplingArrays(**{k: jnp.asarray(v) for k, v in MIXED.items()})
    positions = jnp.full(5, 17, jnp.int32)
    tokens = jitted_sample(logits, positions, params, target=target)
    np.testing.assert_array_equal(tokens, drawn_alone(logits, 17))


def test_rows_that_truncate_nothing_draw_the_same_without_the_filters():
    logits = logits_of(64, 3001)
    positions = jnp.arange(64, dtype=jnp.int32)
    params = arrays(64, temperature=np.tile([0, 0.5, 1, 2], 16), seed=np.arange(64))
    # Rows at temperature 0 take the best whatever their filters say.
    greedy = params.temperature == 0
    params = dataclasses.replace(params, top_p=jnp.where(greedy, 0.5, 1.0))
    without = jitted_sample(logits, positions, params, truncates=False)
    for target in (CPU, HOPPER):
        tokens = jitted_sample(logits, positions, params, target=target)
        np.testing.assert_array_equal(tokens, without)


def test_noise_has_the_same_bits_in_any_batch_and_vocabulary():
    batch = jax.jit(jax.vmap(_noise, in_axes=(0, 0, None)), static_argnums=2)
    seeds, positions = jnp.arange(5, dtype=jnp.uint32), jnp.arange(5, dtype=jnp.int32) + 9
    five, one = batch(seeds, positions, 300), batch(seeds[3:4], positions[3:4], 257)
    np.testing.assert_array_equal(np.asarray(five)[3, :257], np.asarray(one)[0])


def test_greedy_takes_the_lowest_of_equals_and_heeds_the_mask():
    logits = np.zeros((2, 70), np.float32)
    logits[0, [40, 65]] = 3
    np.testing.assert_array_equal(jax.jit(sample_greedy)(logits), [40, 0])
    allowed = np.ones((2, 70), bool)
    allowed[0, 40] = allowed[1, :69] = False
    np.testing.assert_array_equal(jax.jit(sample_greedy)(logits, packed(allowed)), [65, 69])


def test_equals_at_the_top_k_boundary_all_stay():
    row = np.zeros(VOCAB, np.float32)
    row[10] = 1
    tokens = jitted_sample(
        np.tile(row, (512, 1)), jnp.arange(512, dtype=jnp.int32), arrays(512, top_k=2)
    )
    assert len(set(np.asarray(tokens).tolist())) > 50


def test_logprobs_are_those_of_the_unmasked_model():
    logits = logits_of(3)
    tokens = jnp.array([5, 0, 99], jnp.int32)
    chosen, ids, best = jax.jit(token_logprobs, static_argnums=2)(logits, tokens, 4)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(chosen, expected[np.arange(3), np.asarray(tokens)], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :4])
    np.testing.assert_allclose(best, -np.sort(-expected, axis=1)[:, :4], atol=1e-5)


@pytest.mark.parametrize("target", [HOPPER, TPU], ids=lambda target: target.platform)
@pytest.mark.parametrize("vocab", [4096, 5000])
def test_the_best_of_a_large_vocabulary_come_in_order_equals_by_id(vocab, target):
    logits = np.round(logits_of(6, vocab))
    logits[5] = 0
    tokens = jnp.zeros(6, jnp.int32)
    _, ids, best = jax.jit(token_logprobs, static_argnums=(2, 3))(logits, tokens, 20, target)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, expected)
    wide = logits.astype(np.float64)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(best, np.take_along_axis(wide, expected, axis=1), atol=1e-5)
