"""Tokens to text as they arrive, never giving out part of a character."""

import codecs
from collections.abc import Iterable

from lumen.tokenizer.token_spelling import TokenSpelling

_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Text of a growing token sequence, in pieces whose concatenation is the decoded whole.

    Each token costs the same however long the text already is. What is held back is at most one
    incomplete character (three bytes). A Unicode character may still combine with the next one;
    such sequences of whole characters are not held back.

    One deliberate difference from decoding the whole: where a run of <0xNN> tokens (Llama 2,
    Mistral) is not valid UTF-8, the whole decodes to U+FFFD for every byte of the run, those that
    form characters included. Here characters are given out as soon as they are complete and
    U+FFFD stands for the rest of the run only; waiting for the end of the run would stall the
    stream of a text written in such tokens.
    """

    def __init__(
        self,
        spelling: TokenSpelling,
        skip_special_tokens: bool = True,
        context: Iterable[int] = (),
    ) -> None:
        """Begin a text.

        context: tokens of the text that were delivered before, for resuming; they set the state
            and their text is not given out again.
        """
        self._spelling = spelling
        self._skipped = spelling.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._run = _ByteRun()
        self._strip = spelling.strip_start
        self._first = True
        self.push(context)

    def push(self, tokens: Iterable[int]) -> str:
        """Take the next tokens and return the text that they complete, possibly none."""
        spell = self._spell_bytes if self._spelling.byte_level else self._spell_piece
        return self._stripped("".join(spell(t) for t in tokens if t not in self._skipped))

    def flush(self) -> str:
        """End the text: what was held back, as U+FFFD since it never became a character."""
        return self._stripped(self._utf8.decode(b"", final=True) + self._run.end())

    def _spell_bytes(self, token: int) -> str:
        return self._utf8.decode(self._spelling.bytes_of(token))

    def _spell_piece(self, token: int) -> str:
        piece = self._spelling.bytes_of(token)
        if not piece:
            return ""
        if self._spelling.is_single_byte(token):
            self._first = False
            return self._run.add(piece)
        text = piece.decode()
        if self._first and self._spelling.first_drops_spaces:
            text = text.replace(" ", "")
        self._first = False
        return self._run.end() + text

    def _stripped(self, text: str) -> str:
        """Drop the spaces that the decoder drops from the beginning of a text."""
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            self._strip -= 1
            text = text[1:]
        return text


class _ByteRun:
    """Consecutive single-byte tokens. Once a byte fits no character, so does the rest."""

    def __init__(self) -> None:
        self._pending = b""
        self._broken = False

    def add(self, byte: bytes) -> str:
        """The character this byte completes, U+FFFD for bytes that fit none, or nothing yet."""
        if self._broken:
            return _REPLACEMENT
        self._pending += byte
        try:
            text = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            self._broken = True
            text = _REPLACEMENT * len(self._pending)
        self._pending = b""
        return text

    def end(self) -> str:
        """The run is over: U+FFFD for each byte that still waits for its character."""
        text = _REPLACEMENT * len(self._pending)
        self._pending, self._broken = b"", False
        return text
