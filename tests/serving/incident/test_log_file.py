"""What is no log, of another version or damaged is refused by file and offset."""

import pytest

from serving.cluster.worker_events import WorkerTick
from serving.engine.config import EngineConfig
from serving.engine.events import CancelRequest, PlanStep
from serving.engine.executor import ExecutorLimits, MixedSize
from serving.errors import EventLogError
from serving.incident import log_file
from serving.incident.cores import EngineParts
from serving.incident.log_file import Ending, Header, LogReader

LIMITS = ExecutorLimits(4, 24, 6, 4, 64, 8, 2, 97, 3, "r1", (MixedSize(8, 4, 2),))
HEADER = Header("replica", "code", 12.5, EngineParts(LIMITS, EngineConfig(watermark=0.1)))
START = log_file.start(HEADER)


def event(what, now=1.0, answer="[]", keep=True):
    return log_file.entry(now, what, answer, keep_answer=keep)


def read(tmp_path, content):
    path = tmp_path / "a.lumenlog"
    path.write_bytes(content)
    with LogReader(path) as log:
        return log.header, list(log.entries()), log.notice


def test_what_is_written_is_read(tmp_path):
    first, second = event(CancelRequest("é", 2), 0.1), event(PlanStep(), 1 / 3, "[1]", keep=False)
    header, entries, notice = read(
        tmp_path, START + first + second + log_file.ending(Ending("", 0))
    )
    assert header == HEADER
    assert [(e.number, e.offset, e.now, e.event, e.answer) for e in entries] == [
        (1, len(START), 0.1, CancelRequest("é", 2), "[]"),
        (2, len(START + first), 1 / 3, PlanStep(), None),
    ]
    assert entries[1].digest == log_file.digest("[1]")
    assert notice == ""


def test_a_log_that_had_to_stop_says_so(tmp_path):
    content = START + event(PlanStep()) + log_file.ending(Ending("the disk is slow", 3))
    notice = read(tmp_path, content)[2]
    assert notice.endswith("stopped after 1 events: the disk is slow; 3 more happened.")


def damaged(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


GOOD = event(PlanStep())
END = log_file.ending(Ending("", 0))


@pytest.mark.parametrize(
    ("content", "offset", "said"),
    [
        (b"", 0, "expected LUMENLOG"),
        (b"PK\3\4 something else", 0, "expected LUMENLOG"),
        (damaged(START, 8), 8, "version 0 of the format"),
        (START[:30], 12, "no whole header"),
        (damaged(START, 40), 12, "wrong checksum"),
        (START[:12] + GOOD, 12, "no whole header"),
        (START + GOOD + damaged(GOOD, 20), len(START + GOOD), "wrong checksum"),
        (START + b"\0" * 8, len(START), "a record of 0 bytes"),
        (START + b"\xff" * 8, len(START), "a record of 4294967295 bytes"),
        (START + START[12:], len(START), "a record of kind b'H'"),
        (START + event(WorkerTick()), len(START), '["WorkerTick"] stands where'),
        (START + event(CancelRequest("r", True)), len(START), "true stands where a int"),
        (START + event(CancelRequest(None, 1)), len(START), "null stands where a str"),
        (START + END + GOOD, len(START + END), "more records after the last"),
    ],
)
def test_malformed_logs_are_refused_by_offset(tmp_path, content, offset, said):
    with pytest.raises(EventLogError, match=r"a\.lumenlog") as refused:
        read(tmp_path, content)
    assert refused.value.offset == offset
    assert said in str(refused.value)
    assert f"byte {offset}:" in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EventLogError, match=r"none\.lumenlog.*No such file"):
        LogReader(tmp_path / "none.lumenlog")


def test_settings_that_no_core_takes_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(EngineConfig, "__post_init__", lambda self: None)
        config = EngineConfig(pipeline_depth=9)
    header = Header("replica", "code", 0.0, EngineParts(LIMITS, config))
    with pytest.raises(EventLogError, match="pipeline_depth is 9"):
        read(tmp_path, log_file.start(header))
