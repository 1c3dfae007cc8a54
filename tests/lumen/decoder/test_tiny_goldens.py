"""Parity with Hugging Face transformers on tiny models (tools/make_goldens.py)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lumen.model import load_model
from lumen.presets import PRESETS
from lumen.random_weights import random_weights

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny.npz"
TOLERANCE = 1e-3
LONGEST = 61  # every sequence is padded to it, so that one program serves all
TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def test_every_tiny_preset_has_a_golden(goldens):
    assert {name.split("/")[0] for name in goldens} == set(TINY)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("preset", TINY)
def test_logits_and_greedy_tokens_match_the_reference(
    preset, tensor, goldens, forward, tensor_mesh
):
    model = load_model(random_weights(f"random:{preset}"), tensor_mesh(tensor), jnp.float32)
    checked = 0
    for i in range(3):
        tokens, ids, best, lse = (
            goldens[f"{preset}/{i}/{part}"] for part in ("tokens", "ids", "logits", "lse")
        )
        padded = np.zeros(LONGEST, np.int32)
        padded[: len(tokens)] = tokens
        logits = forward(model, padded)[: len(tokens)]
        ours = np.take_along_axis(logits, ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(ours, best, atol=TOLERANCE, rtol=0)
        ours_lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(ours_lse, lse, atol=TOLERANCE, rtol=0)
        clear = best[:, 0] - best[:, 1] > TOLERANCE
        np.testing.assert_array_equal(logits.argmax(axis=1)[clear], ids[clear, 0])
        checked += clear.sum()
    assert checked > 100
