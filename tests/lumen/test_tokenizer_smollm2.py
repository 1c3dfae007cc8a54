"""The default model's tokenizer against transformers (tools/make_tokenizer_goldens.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from lumen.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer_smollm2.json"


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_directory(smollm2)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return content


def test_ids_and_text_equal_those_of_transformers(
    tokenizer: Tokenizer, golden: dict[str, Any]
) -> None:
    assert len(golden["texts"]) > 10
    for row in golden["texts"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]
        detokenizer = tokenizer.detokenizer()
        text = "".join(detokenizer.push([token]) for token in row["ids"]) + detokenizer.flush()
        assert text == row["decoded"]


def test_prompts_equal_those_of_transformers(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert len(golden["chats"]) >= 4
    for row in golden["chats"]:
        prompt = tokenizer.apply_chat_template(row["messages"], row["begin_answer"])
        assert prompt == row["prompt"]


def test_identity(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    # llama.cpp's rule for "smollm": digits first, so both spaces stay together.
    ids = tokenizer.encode("  1998 x")
    assert [tokenizer.token_bytes(token) for token in ids] == [
        b"  ", b"1", b"9", b"9", b"8", b" x"
    ]  # fmt: skip
