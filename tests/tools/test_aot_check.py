"""The ahead-of-time check as a person runs it: what it prints, refuses and exits with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import results_file
from serving.results_file import row
from tools.aot.report import merged

ROOT = Path(__file__).parents[2]

# A Llama small enough to compile in seconds; there are no weights beside it.
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def aot_check(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "aot_check.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "small-llama"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    return model


# An arena of 1 GiB: XLA would move a small one into VMEM, and that is a copy.
BLOCKS = 65536
SMALL = ("--num_rows=2", "--token_budget=16", f"--num_blocks={BLOCKS}")


def test_what_fits_says_so_in_a_table_and_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    arguments = (f"--model={folder}", "--topology=v5e", *SMALL, f"--json={file}")
    result = aot_check(*arguments)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    for words in ("v5e:1x1", "KV tokens", "decode_unit 1", "decode_unit 2", "prefill_unit 16",
                  "head 2", "logits 2", "draw 2 complete", "zero_arena"):  # fmt: skip
        assert words in out
    assert (
        "Fits: small-llama (bfloat16), tensor parallel 1, on v5e:1x1: 1 replica of 1,048,576" in out
    )
    assert "Copied needlessly" not in out

    content = json.loads(file.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    name = "small-llama (bfloat16), tensor parallel 1, on v5e:1x1"
    assert rows[f"{name}: fits"]["median"] == 1
    assert rows[f"{name}: KV capacity of a replica"]["median"] == pytest.approx(
        BLOCKS * 16, rel=1e-5
    )
    # 16 tokens, 2 layers, 1 head, K and V of 128 bfloat16 each
    assert rows[f"{name}: KV arena"]["median"] == BLOCKS * 16 * 2 * 2 * 256 / 2**30
    assert rows[f"{name}: decode_unit 2, compile"]["problems"] == []
    assert content["versions"]["libtpu"]


def test_a_file_keeps_the_figures_of_other_deployments(tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    first = {"command": "one", "rows": [row("a on v6e: fits", "bool", [1])]}
    results_file.write(file, first)
    second = {"command": "two", "rows": [row("a on v5e: fits", "bool", [0])]}
    both = merged(file, second)
    assert both["command"] == "one\ntwo"
    assert both["rows"] == first["rows"] + second["rows"]
    results_file.write(file, both)
    again = {"command": "one", "rows": [row("a on v6e: fits", "bool", [0])]}
    assert merged(file, again)["rows"] == second["rows"] + again["rows"]
    assert merged(file, again)["command"] == "one\ntwo"


def test_what_does_not_fit_says_why_and_what_would() -> None:
    result = aot_check("--model=random:llama-3.1-70b", "--topology=v5e:2x2", "--tensor_parallel=4")
    assert result.returncode == 1
    assert "Does not fit: random:llama-3.1-70b" in result.stdout
    assert "--tensor_parallel=16" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_every_generation_has_a_line(folder: Path) -> None:
    result = aot_check(f"--model={folder}", "--topology=all", "--quick", *SMALL)
    assert result.returncode == 0, result.stderr
    for generation in ("v4:", "v5e:", "v5p:", "v6e:", "tpu7x:"):
        assert f"on {generation}" in result.stdout
    assert "Programs of" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology=v9", "--model=random:llama-3.1-8b"), "choose one of v4, v5e, v5p, v6e"),
        (("--topology=v5e:2x2", "--model=random:nothing"), "There is no preset named 'nothing'"),
        (("--topology=v5e:2x2",), "--model must have a value"),
        (("--topology=v5e", "--model=random:llama-3.1-8b", "--rows=2"), "Unknown command line"),
        (
            ("--topology=v5e:2x2", "--model=random:llama-3.1-8b", "--tensor_parallel=3"),
            "--tensor_parallel=3 does not divide the 4 devices of v5e:2x2; choose one of 1, 2, 4",
        ),
        (
            ("--topology=v5e", "--model=random:llama-3.1-8b", "--max_model_len=1000000"),
            "--max_model_len is 1000000, but the model goes up to 131072 tokens",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_sentence(flags: tuple[str, ...], message: str) -> None:
    result = aot_check(*flags)
    assert result.returncode == 2
    assert result.stderr.startswith("aot_check: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_the_slices() -> None:
    result = aot_check("--help")
    for words in ("v5e:2x4", "tpu7x:2x2x1", "--tensor_parallel", "Exits with 0"):
        assert words in result.stdout
