"""check_engine: what it compares, what it lets pass, and that it can fail."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lumen.presets import preset
from lumen.random_weights import RandomWeights, random_weights
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.errors import ExecutorError
from tools.bench.engine.receipts import Receipt
from tools.bench.engine.works import Job
from tools.check.comparison import Errors, Tolerance, errors, picked
from tools.check.forced import BEST, ForcedRun, Logprobs, Texts, joined, random_texts
from tools.check.kernels import calls
from tools.check.plain_model import PlainModel
from tools.check.report import error_row, markdown, token_row
from tools.check.token_by_token import TokenCheck, compared

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny.npz"
STRICT = Tolerance(1e-4, 1e-4, 1e-4, 1e-4)


def tool(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_engine.py"), *flags],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]},
    )  # fmt: skip


def test_smoke_run_compares_with_xla_and_gives_a_results_file(tmp_path):
    done = tool("--smoke", "--parts=fast", f"--json={tmp_path / 'check.json'}")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "check.json").read_text())
    rows = {one["name"]: one for one in content["rows"]}
    assert list(rows) == [
        "prefill", "decode, batch 2", "decode, batch 1", "mixed, 32 tokens with 2 rows",
        "XLA by itself, decode of few rows against all",
    ]  # fmt: skip
    assert [rows[f"decode, batch {batch}"]["positions"] for batch in (1, 2)] == [2, 4]
    assert rows["mixed, 32 tokens with 2 rows"]["positions"] == 4
    assert all(one["most"] < 1e-4 and one["listed"] == 1.0 for one in rows.values())
    assert content["settings"]["tolerance"]["mean"] == 0.03


def test_smoke_run_compares_token_by_token():
    done = tool("--smoke", "--parts=tokens")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("336 of 336 tokens of 14 requests equal") == 2
    assert "decode: none, XLA alone" in done.stdout


def test_smoke_run_drops_weights(tmp_path):
    done = tool("--smoke", "--parts=hole", f"--json={tmp_path / 'check.json'}")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert row["hole_bytes"] >= row["weight_bytes"] > 0
    assert len(row["samples"]) == 4
    assert row["verdict"] == "ok"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--parts=all", "--parts=all: no such part"),
        ("--parts=", "--parts must name something"),
        ("--batches=1,many", "--batches=1,many must be whole numbers"),
        ("--batches=0", "--batches must be whole numbers, each at least 1"),
        ("--batches=600", "--batches has 600, but the engine has --num_rows=512"),
        ("--chunk=0", "--steps and --chunk must be at least 1"),
        ("--shortest=9000", "--shortest must be at least 1 and at most --longest"),
        ("--chunks=a", "--chunks=a; it must be whole numbers"),
        ("--json=/proc/none/x.json", "/proc/none/x.json cannot be written"),
    ],
)
def test_bad_flags_are_named(flag, told):
    done = tool(flag)
    assert done.returncode != 0
    assert f"check_engine: {told}" in done.stderr


@pytest.fixture(scope="module")
def source():
    return random_weights("random:tiny-qwen2")


@pytest.fixture(scope="module")
def executor(source):
    config = DeviceExecutorConfig(
        max_model_len=64, num_rows=2, block_size=16, num_blocks=8, max_prefill_tokens=16,
        max_prefills=2, prefill_buckets=(16,),
    )  # fmt: skip
    return build_device_executor(source, jax.devices()[:1], config)


@pytest.fixture(scope="module")
def texts():
    tokens = np.random.default_rng(0).integers(0, 512, (2, 50), np.int32)
    return Texts(tokens, (37, 5), more=6)


def plain_logprobs(source, texts, row, index):
    end = texts.prompt_lengths[row] + index
    logits = PlainModel(source).logits(texts.tokens[row, :end])[-1].astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def assert_says(found, at, expected, forced):
    best = np.argsort(-expected)[:BEST]
    np.testing.assert_allclose(found.best[at], expected[best], atol=1e-4)
    np.testing.assert_allclose(expected[found.best_ids[at]], expected[best], atol=1e-4)
    np.testing.assert_allclose(found.chosen[at], expected[forced], atol=1e-4)


def test_texts_are_forced_and_positions_are_the_right_ones(executor, source, texts):
    run = ForcedRun(executor, texts, chunk_tokens=7)
    after_prompts = run.prefill()
    assert run.given(2).tolist() == [1, 1]
    both, first = run.decode(2), run.decode(1)
    assert run.given(2).tolist() == [3, 2]
    run.go_back(2)
    assert run.given(2).tolist() == [2, 2]
    again = run.decode(2)
    for row in range(2):
        for found, index in ((after_prompts, 0), (both, 1), (again, 2)):
            expected = plain_logprobs(source, texts, row, index)
            assert_says(found, row, expected, texts.generated(row, index))
    assert_says(first, 0, plain_logprobs(source, texts, 0, 2), texts.generated(0, 2))
    assert errors(first, picked([again], [0])).most < 1e-4
    mixed = run.mixed([1], [0], 10)
    assert run.given(2).tolist() == [1, 4]
    assert_says(mixed, 0, plain_logprobs(source, texts, 1, 3), texts.generated(1, 3))
    assert_says(mixed, 1, plain_logprobs(source, texts, 0, 0), texts.generated(0, 0))
    assert errors(mixed, picked([after_prompts, again], [1, 0], [1, 0])).most > 1e-2
    end = Logprobs(mixed.chosen[1:], mixed.best_ids[1:], mixed.best[1:])
    assert errors(end, picked([after_prompts], [0], [0])).most < 1e-4


def test_other_weights_are_found_out(executor, texts):
    other = build_device_executor(
        RandomWeights(preset("tiny-qwen2"), "tiny-qwen2", seed=1), jax.devices()[:1],
        DeviceExecutorConfig(max_model_len=64, num_rows=2, num_blocks=8, max_prefill_tokens=16,
                             prefill_buckets=(16,)),
    )  # fmt: skip
    found = errors(ForcedRun(other, texts, 16).prefill(), ForcedRun(executor, texts, 16).prefill())
    assert found.broken(Tolerance(0.03, 0.1, 0.3, 0.15))
    assert error_row("x", found, Tolerance(0.03, 0.1, 0.3, 0.15))["verdict"] != "ok"
    assert error_row("x", found, None)["verdict"] == "not judged"


def test_texts_that_do_not_fit_are_refused(executor):
    with pytest.raises(ExecutorError, match="need 10 blocks; there are 8"):
        ForcedRun(executor, random_texts(2, 60, 60, 6, 512), 16)


def test_random_texts_have_mixed_lengths():
    found = random_texts(200, 16, 1000, 5, 100)
    assert found.prompt_lengths[0] == 1000
    assert 16 <= min(found.prompt_lengths) < 30
    assert 80 < np.median(found.prompt_lengths) < 200
    assert found.tokens.shape == (200, 1006)


def logprobs(*rows):
    ids, values, chosen = zip(*rows, strict=True)
    return Logprobs(*(np.array(one) for one in (chosen, ids, values)))


def test_errors_are_those_of_the_tokens_both_list():
    reference = logprobs(([3, 5], [-1.0, -2.0], -4.0), ([1, 2], [-1.0, -1.5], -1.0))
    found = logprobs(([3, 9], [-1.25, -2.0], -4.5), ([2, 1], [-1.2, -1.3], -1.0))
    one = errors(found, reference)
    assert (one.positions, one.agreement, one.listed) == (2, 0.5, 0.75)
    assert one.gap == pytest.approx(0.5)
    assert one.mean == pytest.approx((0.25 + 0.3 + 0.3) / 3)
    assert (one.most, one.chosen_most) == pytest.approx((0.3, 0.5))
    assert one.chosen_mean == pytest.approx(0.25)
    # A best token that the reference does not list is at least as far as its last.
    assert (
        errors(logprobs(([7, 8], [0.0, 0.0], 0.0)), logprobs(([3, 5], [-1.0, -2.0], 0.0))).gap == 1
    )
    assert joined([found, found]).best.shape == (4, 2)


def test_nothing_in_common_and_nan_break_any_tolerance():
    nothing = errors(logprobs(([7], [0.0], 0.0)), logprobs(([3], [0.0], 0.0)))
    nan = errors(logprobs(([3], [np.nan], 0.0)), logprobs(([3], [0.0], 0.0)))
    loose = Tolerance(1e9, 1e9, 1e9, 1e9)
    assert len(nothing.broken(loose)) == len(nan.broken(loose)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [({"mean": 0.2}, "mean 0.2 > 0.0001"), ({"p99": 1.0}, "p99"), ({"most": 1.0}, "most"),
     ({"chosen_most": 1.0}, "most"), ({"gap": 1.0}, "gap"), ({"chosen_mean": 1.0}, None)],
)  # fmt: skip
def test_each_tolerance_can_break(change, named):
    fine = Errors(9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 1.0)
    broken = dataclasses.replace(fine, **change).broken(STRICT)
    assert len(broken) == (named is not None)
    assert not named or broken[0].startswith(named)


@pytest.mark.parametrize(
    "name", ["tiny-llama3", "tiny-llama-linear", "tiny-smollm", "tiny-mistral", "tiny-qwen2",
             "tiny-qwen3"],
)  # fmt: skip
def test_the_plain_model_is_that_of_transformers(name):
    plain = PlainModel(random_weights(f"random:{name}"))
    with np.load(GOLDEN) as goldens:
        for number in range(3):
            tokens, ids, best = (
                goldens[f"{name}/{number}/{part}"] for part in ("tokens", "ids", "logits")
            )
            logits = plain.logits(tokens)[-len(ids) :]
            found = np.take_along_axis(logits, ids, axis=1)
            np.testing.assert_allclose(found, best, atol=1e-3)


def test_a_wrong_token_is_found_and_told(source):
    plain = PlainModel(source)
    prompt, tokens = [5, 6, 7], []
    for _ in range(4):
        tokens.append(int(plain.logits(np.array(prompt + tokens, np.int32))[-1].argmax()))
    right = Receipt("1", Job(tuple(prompt), 4), tokens)
    assert compared([right], plain).wrong == 0
    wrong = Receipt("2", Job(tuple(prompt), 4), [*tokens[:3], tokens[3] ^ 1])
    found = compared([right, wrong], plain)
    assert (found.tokens, found.wrong, found.first_wrong) == (8, 1, (1, 3))
    one = token_row("tiny", found, {"decode": {"write": 1}, "prefill": {}})
    assert one["verdict"] == "1 tokens differ, first token 3 of request 1"
    text = markdown([one])
    assert "7 of 8 tokens of 2 requests equal" in text
    assert "decode: write; prefill: none, XLA alone" in text


def test_tables_have_a_line_for_each_row():
    row = error_row("decode", Errors(9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.0, 1.0), STRICT)
    assert (
        "| decode | 9 | 0.1 | 0.2 | 0.3 | 0.4 | 0.5 | 0.5 | 0 | 1 | mean 0.1 > 0.0001"
        in markdown([row])
    )
    assert token_row("t", TokenCheck(1, 2, 0, None, 0.1), {})["verdict"] == "ok"


def test_kernel_calls_are_told_by_function():
    text = (
        "  func.func public @main(%0) {\n    call @write_2\n  }\n"
        "  func.func private @write(%0) {\n    stablehlo.custom_call @mosaic_gpu_v2(%0)\n  }\n"
        "  func.func private @run_12(%0) {\n    stablehlo.custom_call @mosaic_gpu_v2(%0)\n"
        "    stablehlo.custom_call @mosaic_gpu_v2(%1)\n  }\n"
        "  func.func private @write_2(%0) {\n    stablehlo.custom_call @other(%0)\n  }\n"
    )
    assert calls(text) == {"write": 1, "run": 2}
