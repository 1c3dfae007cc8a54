"""Tokenizers from directories and GGUF metadata, and the byte tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from lumen.errors import TokenizerError
from lumen.tokenizer import Tokenizer
from lumen.tokenizer.byte_tokenizer import byte_tokenizer
from lumen.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from lumen.tokenizer.token_spelling import byte_alphabet

SPELLING = {value: character for character, value in byte_alphabet().items()}


def spelled(text: str) -> str:
    return "".join(SPELLING[value] for value in text.encode())


def gguf_metadata(pre: str, merged: list[str], **more: Any) -> dict[str, Any]:
    """All bytes, then `merged` words (each two known halves joined), then three whole tokens."""
    tokens = [SPELLING[value] for value in range(256)]
    merges = []
    for word in merged:
        tokens.append(spelled(word))
        merges.append(f"{spelled(word[:-1])} {spelled(word[-1])}")
    tokens += ["<s>", "</s>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **more,
    }


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [
        tokenizer.token_bytes(token).decode()
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]


DIGITS = ["19", "199", "1998", "  ", " 1"]


def test_smollm_cuts_every_digit_off_before_anything_else() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata("smollm", DIGITS))
    assert pieces(tokenizer, "1998") == ["1", "9", "9", "8"]
    # The trap: with several spaces before a digit, all of them belong together.
    assert pieces(tokenizer, "  1998") == ["  ", "1", "9", "9", "8"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", [" ", " ", "1998"]),
        ("llama-bpe", [" ", " ", "199", "8"]),
        ("qwen2", [" ", " ", "1", "9", "9", "8"]),
    ],
)
def test_other_rules_for_digits(pre: str, expected: list[str]) -> None:
    assert pieces(tokenizer_from_gguf(gguf_metadata(pre, DIGITS)), "  1998") == expected


def test_only_qwen_composes_characters() -> None:
    decomposed, composed = "e\u0301", "\u00e9"
    qwen = tokenizer_from_gguf(gguf_metadata("qwen2", []))
    smollm = tokenizer_from_gguf(gguf_metadata("smollm", []))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    assert smollm.encode(decomposed) != smollm.encode(composed)
    assert smollm.decode(smollm.encode(decomposed)) == decomposed


def test_whole_tokens_and_beginning_of_text_from_gguf() -> None:
    metadata = gguf_metadata("smollm", [])
    begin, end, tool = 256, 257, 258
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a<tool></s>") == [97, tool, end]
    assert tokenizer.decode([97, tool, end]) == "a<tool>"
    assert tokenizer.decode([97, tool, end], skip_special_tokens=False) == "a<tool></s>"
    assert tokenizer.special_token_ids == {begin, end}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (begin, (end,))
    assert tokenizer.vocab_size == 259

    with_begin = tokenizer_from_gguf({**metadata, "tokenizer.ggml.add_bos_token": True})
    assert with_begin.encode("a") == [begin, 97]
    assert with_begin.encode("a", add_special_tokens=False) == [97]
    assert tokenizer_from_gguf(gguf_metadata("llama-bpe", [])).encode("a") == [begin, 97]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'.*only 'gpt2'"),
        ({"tokenizer.ggml.model": None}, "kind None"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, "'deepseek-llm'.*smollm, llama-bpe, qwen2"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        tokenizer_from_gguf({**gguf_metadata("smollm", []), **changes})


def test_the_way_through_a_directory(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    metadata = gguf_metadata("llama-bpe", DIGITS, **{"tokenizer.chat_template": template})
    tokenizer = tokenizer_from_gguf(metadata)
    tokenizer.save(tmp_path)
    read = Tokenizer.from_directory(tmp_path)
    for text in ("  1998 x", "<s>a<tool>", "日本 😀", ""):
        assert read.encode(text) == tokenizer.encode(text)
    assert read.special_tokens == tokenizer.special_tokens
    assert read.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi</s>"


def directory(path: Path, config: dict[str, Any]) -> Path:
    """A directory whose post-processor adds <s>, as saved by transformers."""
    vocabulary = {character: value for value, character in SPELLING.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    backend.enable_truncation(4)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_special_tokens_as_text_or_object_and_the_files_own_post_processor(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    tokenizer = Tokenizer.from_directory(directory(tmp_path, config))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("abcdefgh") == [256, *b"abcdefgh"]  # and nothing is truncated
    assert tokenizer.encode("ab", add_special_tokens=False) == list(b"ab")
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.apply_chat_template([])


def test_one_of_several_templates_and_the_separate_file(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    directory(tmp_path, {"chat_template": several})
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([]) == "yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template([]) == "file"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json\.$"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(TokenizerError, match=r"SentencePiece tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    directory(tmp_path, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        Tokenizer.from_directory(tmp_path)


def test_unsupported_decoders_are_refused_by_name() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(TokenizerError, match="names no decoder"):
        Tokenizer(backend)
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(backend)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TokenizerError, match="surrogate at character 1"):
        byte_tokenizer(259).encode("a\ud800")


def test_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer(300)
    assert tokenizer.vocab_size == 300
    text = "h\u00e9 \u65e5\U0001f600\n"
    assert tokenizer.encode(text) == [3 + value for value in text.encode()]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0, 1, 3 + 104, 2]) == "h"
    assert tokenizer.decode([260, 299, 300]) == " 260 299"
    assert tokenizer.eos_token_ids == (2,)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat == "user: hi\nassistant: "
    with pytest.raises(TokenizerError, match="258 is too small"):
        byte_tokenizer(258)
