"""Greedy output does not depend on how the engine gets there (invariant 2), on a real device."""

import jax
import numpy as np
import pytest

from serving.engine.device import DeviceExecutorConfig, build_device_executor
from tests.serving.engine_device.engine_runs import (
    CountingExecutor,
    assert_same_greedy,
    generate,
)

COUNT = 24
PLAIN = {"pipeline_depth": 1, "prefix_caching": False}
OVERLAPPED = {"pipeline_depth": 2, "prefix_caching": False}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(11)
    return [rng.integers(0, 500, n).tolist() for n in (3, 16, 40, 61, 75, 33)]


@pytest.fixture(scope="module")
def reference(executor, prompts):
    """Each request alone, whole steps, plain loop."""
    return generate(CountingExecutor(executor), prompts, COUNT, together=False, **PLAIN)


def check(reference, outputs):
    for expected, output in zip(reference, outputs, strict=True):
        assert_same_greedy(expected, output)


@pytest.mark.parametrize("loop", [PLAIN, OVERLAPPED, {**OVERLAPPED, "decode_steps": 4}])
def test_batched_in_either_loop(executor, prompts, reference, loop):
    counting = CountingExecutor(executor)
    check(reference, generate(counting, prompts, COUNT, **loop))
    assert counting.widest_decode == executor.limits.num_rows


@pytest.mark.parametrize("chunk", [5, 8, 32])
def test_chunked_prefill(executor, prompts, reference, chunk):
    counting = CountingExecutor(executor, max_prefill_tokens=chunk)
    check(reference, generate(counting, prompts, COUNT, **OVERLAPPED))
    assert counting.longest_chunk == chunk


@pytest.mark.parametrize("loop", [PLAIN, OVERLAPPED])
def test_preemption(executor, prompts, reference, loop):
    counting = CountingExecutor(executor, num_blocks=9)  # 144 tokens; the longest takes 99
    check(reference, generate(counting, prompts, COUNT, **loop))
    assert counting.assignments > len(prompts), "nobody was preempted"


@pytest.mark.parametrize("depth", [1, 2])
def test_prefix_hit_and_miss(executor, prompts, reference, depth):
    again = [*prompts, *prompts]
    outputs = generate(
        CountingExecutor(executor), again, COUNT, together=False, pipeline_depth=depth
    )
    check([*reference, *reference], outputs)
    hits = [output.cached_tokens for output in outputs[len(prompts) :]]
    assert hits == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def test_two_devices(executor, prompts, reference, weights, cache_dir):
    config = DeviceExecutorConfig(
        max_model_len=128, num_rows=4, num_blocks=64, max_prefill_tokens=32,
        prefill_buckets=(8, 32), cache_dir=cache_dir,
    )  # fmt: skip
    parallel = build_device_executor(weights(), jax.devices()[2:4], config)
    check(reference, generate(CountingExecutor(parallel), prompts, COUNT, **OVERLAPPED))
    assert parallel.compilations_since_start() == 0
