"""Prefill and decode through the arena equal one dense forward pass."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from lumen_kernels.target import CPU

from lumen.model import load_model
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.request import SamplingParams
from tests.lumen.rotating import rotating

GREEDY_WITH_LOGPROBS = SamplingParams(temperature=0.0, logprobs=20)


@dataclass
class Dense:
    """The same model with attention over the whole sequence at once."""

    model: object

    def logprobs(self, tokens) -> np.ndarray:
        """Log-probabilities of the token after each position, float32 [tokens, vocab]."""
        config, defs = self.model.config, self.model.defs
        count = len(tokens)
        positions = jnp.arange(count)
        distance = positions[:, None] - positions[None]
        seen = distance >= 0
        if config.sliding_window is not None:
            seen &= distance < config.sliding_window

        def attend(layer_in_unit, q, k, v, arena):
            group = q.shape[1] // k.shape[1]
            keys, values = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
            scores = jnp.einsum("qhd,khd->hqk", q, keys) * config.head_dim**-0.5
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            return jnp.einsum("hqk,khd->qhd", weights, values), arena

        @jax.jit
        def run(tokens, embedding, units, head):
            hidden = defs.embedding.merge(embedding)(tokens)
            rotated = rotating(attend, config, positions, config.num_kv_heads)
            for unit in units:
                hidden, _ = defs.unit.merge(unit)(hidden, None, rotated, CPU)
            return jax.nn.log_softmax(defs.head.merge(head)(hidden, CPU))

        model = self.model
        return np.asarray(run(jnp.asarray(tokens), model.embedding, model.units, model.head))


def check(driver, dense, prompt, count):
    """Generate greedily, then compare every step's log-probabilities with the dense pass."""
    results = [driver.start(0, prompt, GREEDY_WITH_LOGPROBS, chunk=7)]
    rows = np.array([0], np.int32)
    results += [driver.run(decode_rows=rows) for _ in range(count - 1)]
    tokens = [int(result.tokens[0, 0]) for result in results]
    expected = dense.logprobs([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    for token, result, row in zip(tokens, results, expected, strict=True):
        best = np.argsort(-row)[:20]
        logprobs = result.logprobs
        np.testing.assert_allclose(logprobs.chosen[0, 0], row[token], atol=1e-4)
        np.testing.assert_allclose(logprobs.top[0, 0], row[best], atol=1e-4)
        np.testing.assert_allclose(row[logprobs.top_ids[0, 0]], row[best], atol=1e-4)
        assert row[token] > row[best[0]] - 1e-4


def test_prefill_and_decode_equal_a_dense_pass(driver, weights, prompt):
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    dense = Dense(load_model(weights("tiny-smollm"), mesh, "float32"))
    check(driver, dense, prompt(21), 20)


def test_a_sliding_window_on_two_devices_equals_a_dense_pass(drive, weights, prompt, cache_dir):
    source = weights("tiny-mistral")
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    config = DeviceExecutorConfig(
        max_model_len=64,
        num_rows=1,
        num_blocks=4,
        max_prefill_tokens=8,
        prefill_buckets=(8,),
        cache_dir=cache_dir,
    )
    executor = build_device_executor(source, jax.devices()[2:4], config)
    check(drive(executor), Dense(load_model(source, mesh, "float32")), prompt(30), 12)
    assert executor.compilations_since_start() == 0
