"""The conversion tool as a person runs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from lumen.checkpoint import check
from lumen.checkpoint.opening import open_source, open_tokenizer
from lumen.random_weights import random_weights

ROOT = Path(__file__).parents[2]


def convert(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_there_and_back_again(tmp_path: Path) -> None:
    native, huggingface = tmp_path / "native", tmp_path / "hf"
    first = convert("--source=random:tiny-qwen3", f"--target={native}", "--dtype=bfloat16")
    assert first.returncode == 0, first.stderr
    assert str(native) in first.stdout
    second = convert(f"--source={native}", f"--target={huggingface}", "--format=huggingface")
    assert second.returncode == 0, second.stderr

    expected = random_weights("tiny-qwen3")
    for path in (native, huggingface):
        source = open_source(path)
        check(source)
        for name in expected.shapes():
            found = source.read(name)
            assert found.dtype.name == "bfloat16"
            np.testing.assert_array_equal(found, expected.read(name).astype(found.dtype))
        tokenizer = open_tokenizer(path)
        assert tokenizer is not None
        assert tokenizer.vocab_size == 512


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    result = convert("--source=random:nothing", f"--target={tmp_path / 'x'}")
    assert result.returncode == 1
    assert result.stderr.startswith("convert_checkpoint: There is no preset named 'nothing'")
    assert "Traceback" not in result.stderr
