"""SmolLM2 through the whole engine against transformers (tools/make_goldens.py)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from lumen.checkpoint import open_source
from lumen.default_model import default_model
from lumen.errors import ModelUnavailableError
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from tests.serving.engine_device.engine_runs import TIE, CountingExecutor, generate

GOLDEN = Path(__file__).parents[2] / "golden"
NEW_TOKENS = 64
TOP = 20


@pytest.fixture(scope="module")
def checkpoint():
    try:
        return default_model()
    except ModelUnavailableError as error:
        pytest.skip(f"the default model cannot be had here: {error}")


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_prompts_at_once_with_preemption(checkpoint, cache_dir, tensor):
    """Tokens equal the reference's up to its first near tie, log-probabilities within 1e-3."""
    prompts = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))
    with np.load(GOLDEN / "smollm2.npz") as arrays:
        goldens = dict(arrays)
    config = DeviceExecutorConfig(
        max_model_len=256, num_rows=8, num_blocks=24, max_prefill_tokens=32,
        prefill_buckets=(32,), cache_dir=cache_dir,
    )  # fmt: skip
    executor = build_device_executor(open_source(checkpoint), jax.devices()[:tensor], config)
    counting = CountingExecutor(executor)
    outputs = generate(counting, [p["token_ids"] for p in prompts], NEW_TOKENS, top=TOP)
    assert counting.assignments > len(prompts), "nobody was preempted"
    assert executor.compilations_since_start() == 0
    compared = 0
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids, logits, lse = (goldens[f"{i}/{key}"] for key in ("ids", "logits", "lse"))
        expected = goldens[f"{i}/tokens"][len(prompt["token_ids"]) :].tolist()
        assert len(output.tokens) == len(expected) == NEW_TOKENS
        for step in range(NEW_TOKENS):
            theirs = dict(zip(ids[step].tolist(), (logits[step] - lse[step]).tolist(), strict=True))
            for token, logprob in output.logprobs[step].top:
                assert abs(logprob - theirs[token]) <= 2 * TIE
            compared += 1
            if output.tokens[step] != expected[step]:
                assert logits[step, 0] - logits[step, 1] <= TIE
                break
    assert compared > len(prompts) * NEW_TOKENS * 0.9
