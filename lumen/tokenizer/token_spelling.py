"""What each token contributes to a text, before bytes are joined into characters.

A tokenizer's decoder turns a list of tokens into a string. The decoders of the supported model
families all amount to one of two rules, which is what makes decoding one token at a time exact:

- byte level (GPT-2, Llama 3, Qwen, SmolLM2): a token is a string of bytes, spelled with one
  printable character per byte; the text is all bytes together, as UTF-8.
- pieces (Llama 2, Mistral): a token is a piece of text with U+2581 for the space, or, written
  <0xNN>, a single byte where no piece fitted; some leading spaces of the whole text are dropped.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from lumen.errors import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte value: itself if printable, else from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (value for value in range(256) if value not in printable)
    alphabet = {chr(value): value for value in sorted(printable)}
    alphabet |= {chr(256 + index): value for index, value in enumerate(others)}
    return alphabet


_BYTE_OF = byte_alphabet()


class TokenSpelling:
    """Token id to bytes, by the rule of the tokenizer's decoder.

    byte_level: which of the two rules holds.
    strip_start: how many leading spaces of a text are dropped (pieces only).
    first_drops_spaces: whether the first token of a text loses all its spaces (pieces only).
    special_ids: ids that decoding leaves out when asked to skip special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises TokenizerError if the tokenizer's decoder follows neither rule."""
        self._backend = backend
        self._spelled: dict[int, bytes] = {}
        self._replacements: list[tuple[str, str]] = []
        self.byte_level = False
        self.byte_fallback = False
        self.strip_start = 0
        self.first_drops_spaces = False
        self._read_decoder(_decoder_description(backend))
        self.special_ids = frozenset(
            token for token, added in backend.get_added_tokens_decoder().items() if added.special
        )

    def bytes_of(self, token: int) -> bytes:
        """The bytes one token stands for; empty for an id the tokenizer does not know."""
        spelled = self._spelled.get(token)
        if spelled is None:
            spelled = self._spelled[token] = self._spell(token)
        return spelled

    def is_single_byte(self, token: int) -> bool:
        """Whether this is a <0xNN> token of the pieces rule."""
        if not self.byte_fallback:
            return False
        text = self._backend.id_to_token(token)
        return text is not None and _BYTE_TOKEN.fullmatch(text) is not None

    def _spell(self, token: int) -> bytes:
        text = self._backend.id_to_token(token) if token >= 0 else None
        if text is None:
            return b""
        if self.byte_level:
            if all(character in _BYTE_OF for character in text):
                return bytes(_BYTE_OF[character] for character in text)
            return str(text).encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replacements:
            text = text.replace(pattern, content)
        return str(text).encode()

    def _read_decoder(self, decoder: Mapping[str, Any]) -> None:
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            self.byte_level = True
            return
        if kinds == ["Metaspace"]:
            self._replacements = [(steps[0]["replacement"], " ")]
            self.first_drops_spaces = steps[0].get("prepend_scheme", "always") != "never"
            return
        # Strip works on what it is given: after Fuse that is the whole text, before it one token.
        fused = False
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    self._replacements.append((pattern, content))
                case {"type": "ByteFallback"}:
                    self.byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if fused:
                    self.strip_start = start
                case _:
                    raise TokenizerError(
                        f"A tokenizer whose decoder is {' + '.join(kinds)} is not supported; "
                        f"supported are ByteLevel, Metaspace, and sequences of Replace, "
                        f"ByteFallback, Fuse and Strip of leading spaces."
                    )


def _decoder_description(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    if backend.decoder is None:
        raise TokenizerError(
            "The tokenizer names no decoder, so its tokens cannot be joined into text; "
            "use a tokenizer.json with a decoder such as ByteLevel."
        )
    description = json.loads(backend.decoder.__getstate__())
    assert isinstance(description, dict)
    return description
