"""Traces in Mooncake's form (FAST'25 release, Apache-2.0): one JSON object a line."""

import json
import math
from pathlib import Path
from typing import Any

from serving.errors import WorkloadFileError
from serving.sim.workload.draws import whole
from serving.sim.workload.requests import Workload
from serving.sim.workload.source_file import (
    MOST_SECONDS,
    MOST_TOKENS,
    read_lines,
    shown,
    span,
)
from serving.sim.workload.table import RequestTable

_MOST_HASH = 2**63 - 1


def read_mooncake(path: Path, block_tokens: int = 512) -> Workload:
    """Lines with timestamp (ms), input_length, output_length and hash_ids, in order of time.

    hash_ids number the prompt's blocks of `block_tokens` tokens; they become the prefix. Times
    count from the first request. Raises WorkloadFileError, and ConfigurationError if block_tokens
    is less than 1.
    """
    whole("block_tokens", block_tokens)
    lines = read_lines(path)
    if not lines:
        raise WorkloadFileError(path, "nothing", "one JSON object a line", 1)
    at_s: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    prefixes: list[tuple[int, ...]] = []
    first = 0.0
    for number, text in lines:
        line = _Line(path, number, text)
        milliseconds = line.milliseconds()
        if not at_s:
            first = milliseconds
        at = (milliseconds - first) * 1e-3
        if at < (at_s[-1] if at_s else 0.0):
            raise line.wrong("timestamp", milliseconds, "a time not before that of the line above")
        prompt = line.tokens("input_length")
        at_s.append(at)
        prompts.append(prompt)
        outputs.append(line.tokens("output_length"))
        prefixes.append(line.hashes(math.ceil(prompt / block_tokens)))
    table = RequestTable.plain(at_s, prompts, outputs, tuple(prefixes))
    return Workload(path.name, span(at_s), table, block_tokens)


class _Line:
    """One line; every part is checked when it is taken."""

    def __init__(self, path: Path, number: int, text: str) -> None:
        self._path = path
        self._number = number
        self._text = text
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise WorkloadFileError(
                path, f"{shown(text)} ({error.msg})", "a JSON object", number, error.colno
            ) from None
        except (ValueError, RecursionError) as error:  # digits or brackets without end
            raise WorkloadFileError(
                path, f"{shown(text)} ({error})", "a JSON object", number, 1
            ) from None
        if not isinstance(content, dict):
            raise WorkloadFileError(path, shown(text), "a JSON object", number, 1)
        self._content = content

    def wrong(self, field: str, found: object, expected: str) -> WorkloadFileError:
        """The error that says what is wrong with a field."""
        column = self._text.find(f'"{field}"') + 1
        return WorkloadFileError(
            self._path, shown(found), expected, self._number, column or None, field
        )

    def milliseconds(self) -> float:
        """The timestamp."""
        value = self._get("timestamp")
        if type(value) not in (int, float) or not 0 <= value <= 1e3 * MOST_SECONDS:
            raise self.wrong("timestamp", value, f"milliseconds from 0 to {1e3 * MOST_SECONDS:.0f}")
        return float(value)

    def tokens(self, field: str) -> int:
        """A number of tokens."""
        value = self._get(field)
        if type(value) is not int or not 1 <= value <= MOST_TOKENS:  # True is an int to isinstance
            raise self.wrong(field, value, f"a whole number from 1 to {MOST_TOKENS}")
        return value

    def hashes(self, most: int) -> tuple[int, ...]:
        """Numbers of the prompt's blocks, of which it has `most`."""
        value = self._get("hash_ids")
        if type(value) is not list or len(value) > most:
            raise self.wrong("hash_ids", value, f"a list of at most {most} numbers of blocks")
        for one in value:
            if type(one) is not int or not 0 <= one <= _MOST_HASH:
                raise self.wrong("hash_ids", one, f"numbers of blocks from 0 to {_MOST_HASH}")
        return tuple(value)

    def _get(self, field: str) -> Any:
        if field not in self._content:
            found = f"no {field}, but {shown(', '.join(self._content))}"
            raise WorkloadFileError(
                self._path, found, "timestamp, input_length, output_length, hash_ids", self._number
            )
        return self._content[field]
