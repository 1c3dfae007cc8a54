"""Traces of the Azure Public Dataset, LLM inference 2023 and 2024 (CC-BY-4.0)."""

import re
from datetime import datetime
from pathlib import Path

from serving.sim.workload.requests import Workload
from serving.sim.workload.source_file import CsvSource, span
from serving.sim.workload.table import RequestTable

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# The files of 2023 have seven digits after the point, of which datetime would keep six; those of
# 2024 name a zone.
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", re.ASCII
)


def read_azure(path: Path) -> Workload:
    """A CSV file with columns TIMESTAMP, ContextTokens and GeneratedTokens, in order of time.

    Times count from the first request. Raises WorkloadFileError.
    """
    source = CsvSource(path, _COLUMNS)
    at_s: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    first: tuple[datetime, int] | None = None
    for line, (time, prompt, output) in source.rows():
        whole, nanoseconds = _moment(source, line, time)
        first = first or (whole, nanoseconds)
        at = (whole - first[0]).total_seconds() + (nanoseconds - first[1]) * 1e-9
        if at < (at_s[-1] if at_s else 0.0):
            raise source.wrong(line, _COLUMNS[0], time, "a time not before that of the row above")
        at_s.append(at)
        prompts.append(source.tokens(line, _COLUMNS[1], prompt))
        outputs.append(source.tokens(line, _COLUMNS[2], output))
    return Workload(path.name, span(at_s), RequestTable.plain(at_s, prompts, outputs))


def _moment(source: CsvSource, line: int, text: str) -> tuple[datetime, int]:
    """(whole seconds, nanoseconds); a time without a zone counts as UTC."""
    match = _TIME.fullmatch(text)
    try:
        if match:
            whole, fraction, zone = match.groups()
            nanoseconds = int((fraction or "").ljust(9, "0"))
            return datetime.fromisoformat(whole + (zone or "Z")), nanoseconds
    except ValueError:  # a 13th month, a 25th hour
        pass
    raise source.wrong(line, _COLUMNS[0], text, "a time as 2023-11-16 18:15:46.6805900")
