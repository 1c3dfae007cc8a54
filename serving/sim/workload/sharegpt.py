"""Conversations in the form of ShareGPT's: texts, of which the lengths count, and no times."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving.errors import WorkloadFileError
from serving.sim.workload.draws import positive
from serving.sim.workload.requests import Workload
from serving.sim.workload.source_file import MOST_TOKENS, read_text, shown
from serving.sim.workload.table import RequestTable

TOKENS_PER_WORD = 1.3  # of English prose, with vocabularies of 32,000 to 128,000
_ASKS = frozenset(("human", "user"))
_ANSWERS = frozenset(("gpt", "assistant", "chatgpt", "bing", "bard"))
_SPACE = " \t\r\n"
_EXPECTED = 'an object as {"conversations": [{"from": "human", "value": "..."}, ...]}'


def read_sharegpt(
    path: Path,
    count_tokens: Callable[[str], int] | None = None,
    tokens_per_word: float = TOKENS_PER_WORD,
) -> Workload:
    """The first question and its answer of each conversation, all due at once.

    count_tokens: tokens of a text. None: the lengths are guessed, `tokens_per_word` times the words
    between white space; the workload's name says which. Conversations without such a pair, or with
    an empty text in it, are left out and counted. Raises WorkloadFileError, and ConfigurationError
    if tokens_per_word is not more than 0.
    """
    positive("tokens_per_word", tokens_per_word)

    def guess(text: str) -> int:
        return round(tokens_per_word * len(text.split()))

    count = count_tokens or guess
    prompts: list[int] = []
    outputs: list[int] = []
    left_out = 0
    for conversation in _conversations(path):
        pair = conversation.first_pair()
        lengths = [count(text) for text in pair] if pair else [0]
        if not 1 <= min(lengths) <= max(lengths) <= MOST_TOKENS:
            left_out += 1
            continue
        prompts.append(lengths[0])
        outputs.append(lengths[1])
    if not prompts:
        raise WorkloadFileError(path, "no conversation with a question and its answer", "some")
    how = "lengths by the tokenizer" if count_tokens else f"{tokens_per_word:g} tokens a word"
    table = RequestTable.plain([0.0] * len(prompts), prompts, outputs)
    return Workload(f"{path.name} ({how})", 0.0, table, left_out=left_out)


class _Conversation:
    """One conversation and where in the file it begins."""

    def __init__(self, path: Path, text: str, start: int, content: object) -> None:
        self._path = path
        self._text = text
        self._start = start
        self._content = content

    def first_pair(self) -> tuple[str, str] | None:
        """The first question and the answer right after it."""
        if not isinstance(self._content, dict) or "conversations" not in self._content:
            raise self._wrong(self._content)
        turns = self._content["conversations"]
        if not isinstance(turns, list):
            raise self._wrong(turns, "conversations")
        asked: str | None = None
        for turn in turns:
            who, said = self._turn(turn)
            if asked is not None:
                return (asked, said) if who in _ANSWERS else None
            if who in _ASKS:
                asked = said
        return None

    def _turn(self, turn: object) -> tuple[str, str]:
        if not isinstance(turn, dict):
            raise self._wrong(turn, "conversations")
        who, said = turn.get("from"), turn.get("value")
        if not isinstance(who, str):
            raise self._wrong(who, "from")
        if not isinstance(said, str):
            raise self._wrong(said, "value")
        # Half a surrogate pair is text to JSON but not to tokenizers.
        return who, said.encode("utf-8", "replace").decode()

    def _wrong(self, found: object, field: str = "") -> WorkloadFileError:
        line, column = _place(self._text, self._start)
        return WorkloadFileError(
            self._path, shown(found), f"{_EXPECTED} beginning there", line, column, field
        )


def _conversations(path: Path) -> Iterator[_Conversation]:
    """The members of the file's one list, decoded one by one, since that tells where they are."""
    text = read_text(path)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise _unexpected(path, text, at, "a list of conversations, beginning with [")
    at = _skip(text, at + 1)
    decoder = json.JSONDecoder()
    while text[at : at + 1] != "]":
        content, end = _decoded(path, text, at, decoder)
        yield _Conversation(path, text, at, content)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise _unexpected(path, text, at, "a conversation after the comma")
        elif text[at : at + 1] != "]":
            raise _unexpected(path, text, at, "a comma, or ] at the end of the list")
    if (at := _skip(text, at + 1)) != len(text):
        raise _unexpected(path, text, at, "nothing after the list")


def _decoded(path: Path, text: str, at: int, decoder: json.JSONDecoder) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise WorkloadFileError(
            path, error.msg.lower(), "correct JSON", error.lineno, error.colno
        ) from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        line, column = _place(text, at)
        raise WorkloadFileError(path, str(error), _EXPECTED, line, column) from None


def _unexpected(path: Path, text: str, at: int, expected: str) -> WorkloadFileError:
    line, column = _place(text, at)
    found = shown(text[at : at + 1]) if at < len(text) else "the end of the file"
    return WorkloadFileError(path, found, expected, line, column)


def _place(text: str, at: int) -> tuple[int, int]:
    """Line and column, from 1."""
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)


def _skip(text: str, at: int) -> int:
    """The next place from `at` on that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
