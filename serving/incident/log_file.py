"""The file of an event log: records with a length and a checksum, readable up to where it was cut.

    LUMENLOG, version (u32), then records: length (u32), crc32 (u32), that many bytes:
      H + JSON of Header                                     first
      E + now (f64), digest of the answer (16 bytes), length of the event (u32),
          JSON of the event, JSON of the answer (empty unless answers are kept)
      Z + JSON of Ending                                     last; absent after a crash

Everything is little-endian.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from serving.errors import ConfigurationError, EventLogError
from serving.incident.cores import EVENTS, Parts
from serving.incident.values import decode, encode

VERSION = 1
SUFFIX = ".lumenlog"

_MAGIC = b"LUMENLOG"
_START = struct.Struct("<8sI")
_RECORD = struct.Struct("<II")
_EVENT = struct.Struct("<d16sI")
_LONGEST = 1 << 28  # a request of millions of tokens; more is a broken length


@dataclass(frozen=True, slots=True)
class Header:
    """Of which core a log is. started: Unix time in seconds. code: see `code_identity`."""

    name: str
    code: str
    started: float
    parts: Parts


@dataclass(frozen=True, slots=True)
class Ending:
    """The log was closed. why: empty if by the shell; `lost`: events that came after its end."""

    why: str
    lost: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. number: from 1. offset: of its record in the file. answer: JSON, if kept."""

    number: int
    offset: int
    now: float
    event: object
    digest: bytes
    answer: str | None


def start(header: Header) -> bytes:
    """The first bytes of a log."""
    return _START.pack(_MAGIC, VERSION) + _record(b"H" + encode(header).encode())


def entry(now: float, event: object, answer: str, *, keep_answer: bool) -> bytes:
    """The bytes of an event and its answer, which is JSON already."""
    text = encode(event).encode()
    kept = answer.encode() if keep_answer else b""
    return _record(b"E" + _EVENT.pack(now, digest(answer), len(text)) + text + kept)


def ending(what: Ending) -> bytes:
    """The last bytes of a log."""
    return _record(b"Z" + encode(what).encode())


def digest(answer: str) -> bytes:
    """What is kept of every answer, 16 bytes."""
    return hashlib.blake2b(answer.encode(), digest_size=16).digest()


def _record(payload: bytes) -> bytes:
    return _RECORD.pack(len(payload), zlib.crc32(payload)) + payload


class LogReader:
    """Reads one log from its start. Use as a context manager.

    Raises EventLogError, which names the file and the offset, for what is no log, of another
    version or damaged; a log that only stops short is read up to there, and `notice` says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notice = ""
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise EventLogError(path, 0, f"nothing ({error.strerror})", "an event log") from error
        self._offset = 0
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "LogReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def entries(self) -> Iterator[Entry]:
        """All events in order, once. Sets `notice` when it comes to the end."""
        events = EVENTS[type(self.header.parts)]
        number = 0
        while True:
            offset = self._offset
            payload = self._next()
            if payload is None:
                self.notice = (
                    f"{self.path} was cut off at byte {offset}, after {number} events: "
                    "its process ended without closing it."
                )
                return
            if payload[:1] == b"Z":
                self._end(offset, payload, number)
                return
            number += 1
            if payload[:1] != b"E" or len(payload) < 1 + _EVENT.size:
                raise self._error(offset, f"a record of kind {payload[:1]!r}", "an event")
            now, digest, length = _EVENT.unpack_from(payload, 1)
            text = payload[1 + _EVENT.size :]
            answer = self._text(offset, text[length:]) or None
            try:
                event = decode(events, self._text(offset, text[:length]))
            except ValueError as error:
                raise self._error(offset, f"an event in which {error}", "one of its core") from None
            yield Entry(number, offset, now, event, digest, answer)

    def _read_header(self) -> Header:
        begin = self._file.read(_START.size)
        if len(begin) < _START.size or not begin.startswith(_MAGIC):
            raise self._error(0, f"a file that starts {begin[:8]!r}", f"{_MAGIC.decode()}")
        version = _START.unpack(begin)[1]
        if version != VERSION:
            found = f"version {version} of the format"
            raise self._error(8, found, f"version {VERSION}; replay it with the code that wrote it")
        offset = self._offset = _START.size
        payload = self._next()
        if payload is None or payload[:1] != b"H":
            raise self._error(offset, "no whole header", "the core's name and settings")
        try:
            header: Header = decode(Header, self._text(offset, payload[1:]))
        except (ValueError, ConfigurationError) as error:
            raise self._error(offset, f"a header in which {error}", "one of a core") from None
        return header

    def _end(self, offset: int, payload: bytes, number: int) -> None:
        try:
            end: Ending = decode(Ending, self._text(offset, payload[1:]))
        except ValueError as error:
            raise self._error(offset, f"an end in which {error}", "the end of a log") from None
        if self._file.read(1):
            raise self._error(self._offset, "more records after the last", "the end of the file")
        if end.why:
            self.notice = (
                f"Recording of {self.path} stopped after {number} events: {end.why}; "
                f"{end.lost} more happened."
            )

    def _next(self) -> bytes | None:
        """The next record's bytes; None if the file does not hold it whole."""
        offset = self._offset
        head = self._file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            return None
        length, checksum = _RECORD.unpack(head)
        if not 0 < length <= _LONGEST:
            raise self._error(offset, f"a record of {length} bytes", f"1 to {_LONGEST}")
        payload = self._file.read(length)
        if len(payload) < length:
            return None
        if zlib.crc32(payload) != checksum:
            raise self._error(offset, "a record with a wrong checksum", "an undamaged one")
        self._offset = offset + _RECORD.size + length
        return payload

    def _text(self, offset: int, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._error(offset, "bytes that are no UTF-8", "JSON") from None

    def _error(self, offset: int, found: str, expected: str) -> EventLogError:
        return EventLogError(self.path, offset, found, expected)
