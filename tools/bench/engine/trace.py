"""A recorded trace of requests: a window of it, played faster or slower.

Files are those of the Azure Public Dataset, LLM inference traces 2023 (CC-BY-4.0): comma-separated,
with columns TIMESTAMP, ContextTokens and GeneratedTokens, in the order of time.
"""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.bench.engine.works import Job, Lengths, TimedJob

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_ORDER_SEED = 2
_NANOSECOND = np.timedelta64(1, "ns")  # timestamps have seven digits after the point


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """at_s: seconds after the first request of the file. prompt, output: tokens."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Window:
    """Requests of a stretch of `seconds` of a trace; their at_s count from its start.

    left_out: requests of that stretch that the engine cannot hold.
    """

    seconds: float
    requests: tuple[TraceRequest, ...]
    left_out: int = 0

    @property
    def rate(self) -> float:
        """Requests per second, as recorded."""
        return len(self.requests) / self.seconds

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        return sum(one.prompt for one in self.requests) / len(self.requests)

    @property
    def mean_output(self) -> float:
        """Tokens."""
        return sum(one.output for one in self.requests) / len(self.requests)

    def endless(self, vocab_size: int) -> Iterator[Job]:
        """The requests in random order, over and over with other prompts, without their times."""
        random = np.random.default_rng(_ORDER_SEED)
        order = random.permutation(len(self.requests)).tolist()
        for index in itertools.cycle(order):
            one = self.requests[index]
            yield Job(tuple(random.integers(0, vocab_size, one.prompt).tolist()), one.output)

    def jobs(self, rate: float, vocab_size: int) -> list[TimedJob]:
        """The window compressed or stretched in time to `rate` requests per second."""
        lengths = Lengths(
            tuple(one.prompt for one in self.requests), tuple(one.output for one in self.requests)
        )
        return [
            TimedJob(one.at_s * self.rate / rate, job)
            for one, job in zip(self.requests, lengths.jobs(vocab_size), strict=True)
        ]


def read_trace(path: Path) -> list[TraceRequest]:
    """Every request of a file. Raises ValueError if it is not such a trace, saying where."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--trace={path} cannot be read: {error}.") from error
    if not rows or any(column not in rows[0] for column in _COLUMNS):
        raise ValueError(
            f"--trace={path} must be a CSV file with columns {', '.join(_COLUMNS)}, and not empty."
        )
    requests: list[TraceRequest] = []
    first: np.datetime64 | None = None
    for number, row in enumerate(rows, start=2):
        time, prompt, output = (row[column] or "" for column in _COLUMNS)
        try:
            at = np.datetime64(time.strip().replace(" ", "T"), "ns")
            one = (int(prompt), int(output))
        except ValueError as error:
            raise ValueError(f"--trace={path}, line {number} is not a request: {error}.") from error
        first = at if first is None else first
        at_s = float((at - first) / _NANOSECOND) * 1e-9
        if min(one) < 1 or (requests and at_s < requests[-1].at_s):
            raise ValueError(
                f"--trace={path}, line {number}: times must ascend, lengths be at least 1."
            )
        requests.append(TraceRequest(at_s, *one))
    return requests


def window(
    trace: Sequence[TraceRequest], start_s: float, seconds: float, max_tokens: int
) -> Window:
    """The requests that came within `seconds` from `start_s` on.

    max_tokens: of prompt and output; longer requests are left out. Raises ValueError if none is
    left.
    """
    there = [one for one in trace if start_s <= one.at_s < start_s + seconds]
    kept = [one for one in there if one.prompt + one.output <= max_tokens]
    if not kept:
        raise ValueError(
            f"The trace has no request of at most {max_tokens} tokens between {start_s:g} and "
            f"{start_s + seconds:g} s."
        )
    moved = (TraceRequest(one.at_s - start_s, one.prompt, one.output) for one in kept)
    return Window(seconds, tuple(moved), len(there) - len(kept))
