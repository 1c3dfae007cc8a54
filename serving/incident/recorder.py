"""Writes a core's event log beside a live run, without ever holding the run up."""

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from serving.errors import ConfigurationError
from serving.incident import log_file
from serving.incident.cores import Parts, code_identity
from serving.incident.log_file import Ending, Header
from serving.incident.values import encode

_log = logging.getLogger(__name__)

_MOST_WAITING = 2048
"""Events that may wait to be written: ten seconds of a replica of 256 rows, some 40 MB."""

_CLOSING_S = 10.0  # for what waits to be written when the shell ends


class Recorder:
    """An EventSink (`serving.engine.event_sink`) that writes to a file.

    The shell's thread only puts references into a queue; a thread of the recorder's own encodes
    and writes. A log with a hole replays to nothing, so if that thread falls behind, the disk
    fails or the file reaches `limit_bytes`, recording ends for good and the log says how much it
    lacks; serving goes on. keep_answers: also keep the answers themselves and not their digests
    alone, which makes the file several times as large and a difference readable.

    Measured on a loaded 2-core x86 host: 0.26 us of the shell's thread per event; of the other one
    19, 92 and 304 us per decode step of 1, 64 and 256 rows, three events and 0.2, 0.8 and 2.7 kB in
    all (0.4, 6.6 and 26 kB with answers). Steps of 8 ms of 256 rows kept their median.

    Raises ConfigurationError if the file cannot be made; one that exists is not overwritten.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        *,
        keep_answers: bool = False,
        limit_bytes: int = 1 << 30,
        most_waiting: int = _MOST_WAITING,
    ) -> None:
        self.path = path
        self._keep_answers = keep_answers
        self._limit_bytes = limit_bytes
        self._most_waiting = most_waiting
        self._waiting: queue.SimpleQueue[
            tuple[float, object, Sequence[object] | Exception] | None
        ] = queue.SimpleQueue()
        self._stopped_why = ""
        self._refused = 0  # counted by the shell's thread
        self._dropped = 0  # counted by the thread that writes
        self._closed = False
        try:
            # For the owner alone: a log holds what clients asked and were answered.
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        except OSError as error:
            raise ConfigurationError(
                f"--record_dir: {path} cannot be made ({error.strerror})."
            ) from error
        self._bytes = self._file.write(log_file.start(header))
        self._file.flush()
        self._thread = threading.Thread(target=self._run, name=f"record-{header.name}", daemon=True)
        self._thread.start()

    def __call__(self, now: float, event: object, answer: Sequence[object] | Exception) -> None:
        """See EventSink. From one thread at a time."""
        if self._closed:
            return
        if not self._stopped_why and self._waiting.qsize() >= self._most_waiting:
            self._stop("events came faster than they could be written")
        if self._stopped_why:
            self._refused += 1
        else:
            self._waiting.put((now, event, answer))

    @property
    def lost(self) -> int:
        """Events that happened after recording had to stop."""
        return self._refused + self._dropped

    def close(self) -> None:
        """Write what waits and the end of the log. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
            self._thread.join(_CLOSING_S)

    def _stop(self, why: str) -> None:
        self._stopped_why = why
        _log.warning("recording of %s stopped: %s", self.path, why)

    def _run(self) -> None:
        writes, sound = True, True
        try:
            with self._file:
                while (told := self._waiting.get()) is not None:
                    if not writes:
                        self._dropped += 1
                        continue
                    try:
                        writes = self._write(*told)
                    except Exception as error:  # a full disk, or an event the log cannot hold
                        writes, sound = False, not isinstance(error, OSError)
                        self._stop(f"an event could not be written ({error})")
                    self._dropped += not writes
                if sound:
                    self._file.write(log_file.ending(Ending(self._stopped_why, self.lost)))
        except OSError as error:
            _log.warning("%s has no proper end: %s", self.path, error)

    def _write(self, now: float, event: object, answer: Sequence[object] | Exception) -> bool:
        """Write one event; False if the file is full."""
        if self._bytes >= self._limit_bytes:
            self._stop(f"the file has its {self._limit_bytes} bytes")
            return False
        record = log_file.entry(now, event, encode(answer), keep_answer=self._keep_answers)
        self._bytes += self._file.write(record)
        if self._waiting.empty():
            self._file.flush()  # a crash then costs the events in the queue, no more
        time.sleep(0)  # lets a shell that waits for the interpreter go first
        return True


def open_recorder(
    folder: Path, name: str, parts: Parts, *, keep_answers: bool, limit_bytes: int
) -> Recorder:
    """Record a core under a file name of its own in that folder, which is made if it is not there.

    Raises ConfigurationError if it cannot be written.
    """
    started = time.time()
    spelled = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
    path = folder / f"{spelled}-{int(started * 1e6):x}{log_file.SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--record_dir: {folder} cannot be made ({error.strerror})."
        ) from error
    header = Header(name, code_identity(), started, parts)
    return Recorder(path, header, keep_answers=keep_answers, limit_bytes=limit_bytes)
