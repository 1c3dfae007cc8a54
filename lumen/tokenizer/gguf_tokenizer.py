"""Builds a tokenizer from the metadata of a GGUF file.

GGUF stores vocabulary and merges but only a *name* for how text is split before the merges. The
rules behind the names are those of the models' own tokenizer.json files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lumen.errors import TokenizerError
from lumen.tokenizer.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched whole in a text

# Letters with contractions, then digits in groups of {digits}, then the rest.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is prepared for the merges.

    pattern: a regular expression of words; None for GPT-2's own. single_digits: cut every digit
    off first. nfc: compose characters first. whole_words: a word in the vocabulary is not merged.
    adds_bos: whether a text begins with the bos token when the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_SPLITTING = {
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "llama-bpe": _Splitting(
        pattern=_WORDS.format(digits=r"\p{N}{1,3}"), whole_words=True, adds_bos=True
    ),
    "qwen2": _Splitting(pattern=_WORDS.format(digits=r"\p{N}"), nfc=True),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Raises TokenizerError for kinds other than byte-level BPE ("gpt2") and for splitting rules
    other than gpt-2, smollm, llama-bpe and qwen2.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"GGUF tokenizer kind {kind!r} is not supported; only 'gpt2' (byte-level BPE) is. "
            f"Use the model's Hugging Face directory, which has a tokenizer.json."
        )
    rule = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if rule not in _SPLITTING:
        raise TokenizerError(
            f"GGUF pre-tokenizer {rule!r} is not supported; supported are "
            f"{', '.join(_SPLITTING)}. Use the model's Hugging Face directory instead."
        )
    splitting = _SPLITTING[rule]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[_merge(line) for line in metadata["tokenizer.ggml.merges"]],
            ignore_merges=splitting.whole_words,
        )
    )
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(_pre_tokenizers(splitting))
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    special = _special_tokens(metadata, tokens)
    bos = special.get("bos_token")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", splitting.adds_bos):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return Tokenizer(backend, special, metadata.get("tokenizer.chat_template"))


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _pre_tokenizers(splitting: _Splitting) -> list[Any]:
    steps: list[Any] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        pattern = tokenizers.Regex(splitting.pattern)
        steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    own_pattern = splitting.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_pattern))
    return steps


def _add_whole_tokens(
    backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int] | tuple[int, ...]
) -> None:
    """Register the tokens that text is searched for before it is split."""
    for kind in (_CONTROL, _USER_DEFINED):
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
                for token, its_kind in zip(tokens, kinds, strict=False)
                if its_kind == kind
            ]
        )


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    found = {}
    for name, ours in names.items():
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and 0 <= index < len(tokens):
            found[ours] = tokens[index]
    return found
