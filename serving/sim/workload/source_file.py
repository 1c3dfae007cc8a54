"""Files of requests as people find them: text in lines, cells of CSV, numbers in range."""

import codecs
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.errors import WorkloadFileError

MOST_TOKENS = 100_000_000  # of one request: a thousand times the longest context there is
MOST_SECONDS = 1e9  # of a trace: thirty years
_SHOWN = 40  # characters of what was found


def shown(value: object) -> str:
    """What was found, as an error quotes it: never long, and no control characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def read_text(path: Path) -> str:
    """The whole file, without a byte order mark. Raises WorkloadFileError if it is not UTF-8."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise WorkloadFileError(
            path, f"no readable file ({reason})", "a file of requests"
        ) from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line_start = before.rfind(b"\n") + 1
        raise WorkloadFileError(
            path,
            f"the byte {data[error.start]:#04x}",
            "UTF-8 text",
            before.count(b"\n") + 1,
            len(before[line_start:].decode()) + 1,
        ) from None


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line) of every line that is not blank, without line ends of any kind.

    str.splitlines would also split at characters that may stand inside a JSON string.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(number, line) for number, line in lines if line and not line.isspace()]


class CsvSource:
    """The rows of a CSV file with a header, whatever the order of its columns."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._lines = read_lines(path)
        wanted = f"a header with {', '.join(columns)}"
        if not self._lines:
            raise WorkloadFileError(path, "nothing", wanted, 1)
        number, line = self._lines[0]
        header = self._cells(number, line)
        self._width = len(header)
        missing = [column for column in columns if column not in header]
        if missing:
            found = f"{shown(','.join(header))} without {', '.join(missing)}"
            raise WorkloadFileError(path, found, wanted, number)
        self._places = {column: header.index(column) for column in columns}
        if len(self._lines) == 1:
            raise WorkloadFileError(path, "no row after the header", "one per request", number)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """(line number, cells in the order of the columns that were asked for)."""
        places = list(self._places.values())
        for number, line in self._lines[1:]:
            cells = self._cells(number, line)
            if len(cells) != self._width:
                raise WorkloadFileError(
                    self.path, f"{len(cells)} cells", f"{self._width} as in the header", number
                )
            yield number, [cells[place] for place in places]

    def wrong(self, line: int, column: str, found: object, expected: str) -> WorkloadFileError:
        """The error that says what is wrong with one cell."""
        place = self._places[column] + 1
        return WorkloadFileError(self.path, shown(found), expected, line, place, column)

    def tokens(self, line: int, column: str, cell: str, least: int = 1) -> int:
        """A number of tokens."""
        # int() alone takes "1_000", "+5" and digits of any script.
        if cell.isascii() and cell.isdigit() and len(cell) <= 18:
            value = int(cell)
            if least <= value <= MOST_TOKENS:
                return value
        raise self.wrong(line, column, cell, f"a whole number from {least} to {MOST_TOKENS}")

    def seconds(self, line: int, column: str, cell: str) -> float:
        """A time in seconds, whole or not."""
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not 0 <= value <= MOST_SECONDS:
            raise self.wrong(line, column, cell, f"seconds from 0 to {MOST_SECONDS:.0f}")
        return value

    def _cells(self, number: int, line: str) -> list[str]:
        if '"' not in line:
            return [cell.strip() for cell in line.split(",")]
        try:
            (cells,) = csv.reader([line], strict=True)
        except csv.Error as error:
            raise WorkloadFileError(
                self.path, f"{shown(line)} ({error})", "cells separated by commas", number
            ) from None
        return [cell.strip() for cell in cells]


def span(at_s: Sequence[float]) -> float:
    """How long requests of a trace arrive, from their times, the first of which is 0.

    The last is followed by a gap of the mean length, so that a trace played twice keeps its rhythm.
    """
    if len(at_s) < 2:
        return at_s[-1]
    return at_s[-1] * len(at_s) / (len(at_s) - 1)
