"""Parity of the default model with Hugging Face transformers (tools/make_goldens.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lumen.checkpoint import open_source, open_tokenizer
from lumen.model import load_model

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 1e-3
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def prompts():
    return json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))


def test_prompts_tokenize_as_the_reference_does(prompts, smollm2):
    tokenizer = open_tokenizer(smollm2)
    for prompt in prompts:
        assert (
            list(tokenizer.encode(prompt["text"], add_special_tokens=False)) == prompt["token_ids"]
        )


@pytest.mark.parametrize("tensor", [1, 2])
def test_logits_and_greedy_tokens_match_the_reference(
    tensor, prompts, smollm2, forward, tensor_mesh
):
    model = load_model(open_source(smollm2), tensor_mesh(tensor), jnp.float32)
    with np.load(GOLDEN / "smollm2.npz") as arrays:
        goldens = dict(arrays)
    longest = max(len(prompt["token_ids"]) for prompt in prompts) + NEW_TOKENS
    for i, prompt in enumerate(prompts):
        tokens, ids, best, lse = (goldens[f"{i}/{k}"] for k in ("tokens", "ids", "logits", "lse"))
        start = len(prompt["token_ids"])
        assert tokens[:start].tolist() == prompt["token_ids"]
        assert len(tokens) == start + NEW_TOKENS
        # The reference's own tokens are the input, so that one near-tie does not end the check.
        padded = np.zeros(longest, np.int32)
        padded[: len(tokens)] = tokens
        logits = forward(model, padded)[start - 1 : len(tokens) - 1]
        ours = np.take_along_axis(logits, ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(ours, best, atol=TOLERANCE, rtol=0)
        ours_lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(ours_lse, lse, atol=TOLERANCE, rtol=0)
        clear = best[:, 0] - best[:, 1] > TOLERANCE
        assert clear.sum() > NEW_TOKENS // 2
        np.testing.assert_array_equal(logits.argmax(axis=1)[clear], tokens[start:][clear])
