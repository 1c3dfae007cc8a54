"""The recorder never holds its shell up: it stops and says what is missing."""

import threading

import pytest

from serving.cluster.worker_events import WorkerConfig, WorkerTick
from serving.errors import ConfigurationError
from serving.incident import log_file
from serving.incident.log_file import Header, LogReader
from serving.incident.recorder import Recorder, open_recorder

PARTS = WorkerConfig("w", "one", "m", "r", 100, ())
HEADER = Header("w", "code", 0.0, PARTS)


def read(path):
    with LogReader(path) as log:
        return [entry.now for entry in log.entries()], log.notice


def test_falling_behind_ends_the_log_and_counts_what_it_lacks(tmp_path, monkeypatch, caplog):
    entered, go_on = threading.Event(), threading.Event()
    entry = log_file.entry

    def slow(*arguments, **options):
        entered.set()
        assert go_on.wait(10)
        return entry(*arguments, **options)

    monkeypatch.setattr(log_file, "entry", slow)
    recorder = Recorder(tmp_path / "log", HEADER, most_waiting=2)
    recorder(0.0, WorkerTick(), [])
    assert entered.wait(10)
    for now in range(1, 8):
        recorder(float(now), WorkerTick(), [])
    assert recorder.lost == 5
    go_on.set()
    recorder.close()
    times, notice = read(recorder.path)
    assert times == [0.0, 1.0, 2.0]
    assert "events came faster than they could be written; 5 more happened" in notice
    assert caplog.text.count("recording of") == 1


def test_a_full_file_and_events_that_cannot_be_written_end_the_log(tmp_path):
    full = Recorder(tmp_path / "full", HEADER, limit_bytes=len(log_file.start(HEADER)) + 1)
    odd = Recorder(tmp_path / "odd", HEADER)
    for recorder, event in ((full, WorkerTick()), (odd, object())):
        recorder(0.0, WorkerTick(), [])
        recorder(1.0, event, [])
        recorder(2.0, WorkerTick(), [])
        recorder.close()
        recorder.close()
        recorder(3.0, WorkerTick(), [])
        assert recorder.lost == 2
    assert read(full.path)[0] == read(odd.path)[0] == [0.0]
    assert "bytes; 2 more happened" in read(full.path)[1]
    assert "A object is in an event" in read(odd.path)[1]


def test_a_log_that_is_not_closed_has_what_was_written(tmp_path):
    recorder = Recorder(tmp_path / "log", HEADER)
    assert recorder.path.read_bytes() == log_file.start(HEADER)
    assert recorder.path.stat().st_mode & 0o777 == 0o600
    recorder(0.5, WorkerTick(), [])
    size = len(log_file.start(HEADER))
    for _ in range(10_000):
        if recorder.path.stat().st_size > size:
            break
        threading.Event().wait(0.001)
    times, notice = read(recorder.path)
    recorder.close()
    assert times == [0.5]
    assert "cut off" in notice


def test_names_become_files_of_their_own(tmp_path):
    options = {"keep_answers": False, "limit_bytes": 1 << 20}
    first = open_recorder(tmp_path / "new" / "logs", "rack/1:w", PARTS, **options)
    first.close()
    assert first.path.parent == tmp_path / "new" / "logs"
    assert first.path.name.startswith("rack_1_w-")
    with pytest.raises(ConfigurationError, match=r"--record_dir: .*File exists"):
        Recorder(first.path, HEADER)
    with pytest.raises(ConfigurationError, match="--record_dir"):
        open_recorder(first.path, "w", PARTS, **options)
