"""Each family through the whole engine, paged and chunked, against transformers."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lumen.presets import PRESETS
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from tests.serving.engine_device.engine_runs import TIE, CountingExecutor, generate

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.npz"
NEW_TOKENS = 16
TOP = 20


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("tiny-")])
def test_greedy_tokens_and_logprobs_match_the_reference(preset, weights, cache_dir):
    with np.load(GOLDEN) as arrays:
        goldens = {name: value for name, value in arrays.items() if name.startswith(f"{preset}/")}
    config = DeviceExecutorConfig(
        max_model_len=64, num_rows=2, num_blocks=16, max_prefill_tokens=16,
        prefill_buckets=(16,), cache_dir=cache_dir,
    )  # fmt: skip
    executor = build_device_executor(weights(preset), jax.devices()[:1], config)
    sequences = [goldens[f"{preset}/{i}/tokens"].tolist() for i in range(3)]
    prompts = [tokens[:-NEW_TOKENS] for tokens in sequences]
    outputs = generate(CountingExecutor(executor), prompts, NEW_TOKENS, top=TOP)
    compared = 0
    for i, (tokens, prompt, output) in enumerate(zip(sequences, prompts, outputs, strict=True)):
        ids, logits, lse = (goldens[f"{preset}/{i}/{part}"] for part in ("ids", "logits", "lse"))
        for step, got in enumerate(output.tokens):
            at = len(prompt) - 1 + step  # whose logits choose this token
            theirs = dict(zip(ids[at].tolist(), (logits[at] - lse[at]).tolist(), strict=True))
            for token, logprob in output.logprobs[step].top:
                assert abs(logprob - theirs[token]) <= TIE
            compared += 1
            if got != tokens[at + 1]:
                assert logits[at, 0] - logits[at, 1] <= TIE
                break
    assert compared > NEW_TOKENS
