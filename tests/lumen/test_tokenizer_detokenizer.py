"""Incremental detokenisation: whole characters only, and in sum what decoding the whole gives."""

from itertools import groupby, pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lumen.tokenizer import Tokenizer
from lumen.tokenizer.byte_tokenizer import byte_tokenizer
from lumen.tokenizer.token_spelling import byte_alphabet

WORDS = ["the", "é", "日本", "😀", "👩‍👩‍👧", "e\u0301", " ", "  ", "x y", "<0x41", "\u00a0"]


def byte_level() -> Tokenizer:
    """Bytes, merged pieces that cut characters anywhere, and added tokens of both kinds."""
    spelling = {value: character for character, value in byte_alphabet().items()}
    tokens = [spelling[value] for value in range(256)]
    cut = "a日é😀 b".encode()
    tokens += sorted(
        {"".join(spelling[v] for v in cut[i:j]) for i in range(len(cut)) for j in (i + 2, i + 3)}
        - set(tokens)
    )
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|日|>"])
    backend.add_tokens(["<tool é>", "two words"])
    return Tokenizer(backend)


def pieces(decoder: object) -> Tokenizer:
    """SentencePiece-like: words with U+2581 for the space, and all 256 bytes."""
    tokens = [f"<0x{value:02X}>" for value in range(256)]
    tokens += [word.replace(" ", "\u2581") for word in WORDS]
    tokens += ["\u2581the", "\u2581\u2581a", "b\u2581c"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[],
            byte_fallback=True,
        )
    )
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


def fallback_decoder(strip: int = 1) -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", strip, 0),
        ]
    )


BYTE_LEVEL = byte_level()
LLAMA_2 = pieces(fallback_decoder())
LLAMA_2_STRIP_2 = pieces(fallback_decoder(2))
METASPACE = pieces(decoders.Metaspace())
METASPACE_NEVER = pieces(decoders.Metaspace(prepend_scheme="never"))


def ids(tokenizer: Tokenizer, first: int = 0) -> st.SearchStrategy[list[int]]:
    # One id more than the tokenizer knows: models' tables are often longer.
    return st.lists(st.integers(first, tokenizer.vocab_size), max_size=40)


def streamed(tokenizer: Tokenizer, tokens: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [detokenizer.push([token]) for token in tokens] + [detokenizer.flush()]


@given(ids(BYTE_LEVEL), st.booleans())
def test_byte_level_sum_is_the_whole(tokens: list[int], skip: bool) -> None:
    text = "".join(streamed(BYTE_LEVEL, tokens, skip))
    assert text == BYTE_LEVEL.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [LLAMA_2, LLAMA_2_STRIP_2, METASPACE, METASPACE_NEVER])
@given(tokens=ids(LLAMA_2, first=256), skip=st.booleans())
def test_pieces_sum_is_the_whole(tokenizer: Tokenizer, tokens: list[int], skip: bool) -> None:
    text = "".join(streamed(tokenizer, tokens, skip))
    assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(st.lists(st.one_of(st.integers(256, LLAMA_2.vocab_size), st.text(max_size=4)), max_size=20))
def test_characters_written_in_byte_tokens(parts: list[int | str]) -> None:
    tokens: list[int] = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else part.encode()
    assert "".join(streamed(LLAMA_2, tokens, True)) == LLAMA_2.decode(tokens)


def run_text(run: bytes) -> str:
    """Characters up to the first byte that fits none, then U+FFFD for each byte."""
    try:
        return run.decode()
    except UnicodeDecodeError as error:
        return run[: error.start].decode() + "\ufffd" * (len(run) - error.start)


@given(ids(LLAMA_2))
def test_invalid_byte_tokens_keep_the_characters_before_them(tokens: list[int]) -> None:
    known = [t for t in tokens if t < LLAMA_2.vocab_size and t not in LLAMA_2.special_token_ids]
    expected = ""
    for is_byte, group in groupby(known, lambda token: token < 256):
        members = list(group)
        expected += (
            run_text(bytes(members))
            if is_byte
            else "".join(LLAMA_2.token_bytes(token).decode() for token in members)
        )
    text = "".join(streamed(LLAMA_2, tokens, True))
    assert text == expected.removeprefix(" ")
    whole = LLAMA_2.decode(tokens)
    assert text == whole or ("\ufffd" in text and "\ufffd" in whole)


def test_a_broken_run_of_byte_tokens() -> None:
    valid, broken = list("é".encode()), [0xC3, 0x41, 0x42]
    assert streamed(LLAMA_2, [*valid, *broken, 256, 0x43], True) == [
        "", "é", "", "\ufffd\ufffd", "\ufffd", "the", "C", ""
    ]  # fmt: skip
    assert streamed(LLAMA_2, [0xE6, 256], True) == ["", "\ufffdthe", ""]
    assert streamed(LLAMA_2, [0xE6, 0x97], True) == ["", "", "\ufffd\ufffd"]


@given(st.text())
def test_multi_byte_text_comes_in_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer(259)
    parts = streamed(tokenizer, tokenizer.encode(text), True)
    assert "".join(parts) == text
    assert all(len(part) <= 1 for part in parts)
    assert parts[-1] == ""
    assert ("\ufffd" in "".join(parts)) == ("\ufffd" in text)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, LLAMA_2, METASPACE])
@given(data=st.data())
def test_any_cut_gives_the_same_text_and_resuming_goes_on(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    tokens = data.draw(ids(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))
    bounds = [0, *sorted(cuts), len(tokens)]
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.push(tokens[a:b]) for a, b in pairwise(bounds)] + [detokenizer.flush()]
    assert "".join(parts) == "".join(streamed(tokenizer, tokens, True))

    resumed = tokenizer.detokenizer(context=tokens[: bounds[1]])
    rest = resumed.push(tokens[bounds[1] :]) + resumed.flush()
    assert rest == "".join(parts[1:])


def test_what_is_held_back_is_less_than_a_character() -> None:
    detokenizer = byte_tokenizer(259).detokenizer()
    emoji = [3 + value for value in "😀".encode()]
    assert [detokenizer.push([token]) for token in emoji] == ["", "", "", "😀"]
    # A byte that can't continue the character releases it at once, for good or bad.
    assert detokenizer.push(emoji[:2]) == ""
    assert detokenizer.push([3 + ord("a")]) == "\ufffda"


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(259), LLAMA_2])
@given(data=st.binary(max_size=200))
def test_never_more_than_three_bytes_are_held_back(tokenizer: Tokenizer, data: bytes) -> None:
    """So a token costs the same late in a text as early, even if nothing in it is valid."""
    first = 0 if tokenizer is LLAMA_2 else 3
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    shown = ""
    for taken, value in enumerate(data, start=1):
        shown += detokenizer.push([first + value])
        whole = (
            run_text(data[:taken])
            if tokenizer is LLAMA_2
            else data[:taken].decode(errors="replace")
        )
        if tokenizer is LLAMA_2:
            whole = whole.removeprefix(" ")
        assert len(whole) - len(shown) <= 3
        assert whole.startswith(shown)
