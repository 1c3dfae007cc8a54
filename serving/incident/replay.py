"""Executes a log again: the same core, the same events, and whether it answers the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.engine.event_sink import EventSink
from serving.errors import ConfigurationError
from serving.incident.cores import Handle, code_identity, make
from serving.incident.log_file import Entry, Header, LogReader, digest
from serving.incident.values import encode


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event whose answer is another one now. replayed: JSON; entry.answer if kept."""

    entry: Entry
    replayed: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of one log.

    events: executed, the differing one included. difference: None if all answers are the same.
    notice: why the log does not reach to the end of its run, or "". other_code: the cores' source
    is not the one that recorded, so a difference may be meant.
    """

    header: Header
    events: int
    difference: Difference | None
    notice: str
    other_code: bool


def replay(
    path: Path,
    *,
    seen: Callable[[Entry, Sequence[object] | Exception], None] | None = None,
    sink: EventSink | None = None,
) -> Replay:
    """Execute a log up to its end or the first difference.

    seen(entry, answer): called for every event. sink: told what a live shell's would be.
    Raises EventLogError if the file is malformed, and ConfigurationError if its core can no
    longer be made.
    """
    with LogReader(path) as log:
        handle = _made(path, log.header)
        events = 0
        difference = None
        for entry in log.entries():
            events += 1
            answer: Sequence[object] | Exception
            try:
                answer = handle(entry.event, entry.now)
            except Exception as error:  # the core raised live as well, if it is the same
                answer = error
            if sink is not None:
                sink(entry.now, entry.event, answer)
            text = encode(answer)
            if seen is not None:
                seen(entry, answer)
            if digest(text) != entry.digest:
                difference = Difference(entry, text)
                break
        other = log.header.code != code_identity()
        return Replay(log.header, events, difference, log.notice, other)


def _made(path: Path, header: Header) -> Handle:
    try:
        return make(header.parts)
    except (ValueError, ArithmeticError, MemoryError) as error:
        raise ConfigurationError(
            f"{path}: no core can be made of the settings of {header.name} ({error})."
        ) from error
