"""A live CPU run replays to the same effects; a changed core is noticed; a cut log is read."""

from collections import Counter
from pathlib import Path

import pytest

from serving.cluster.messages import AbortRequest
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import GatewayMessage
from serving.engine.core import EngineCore
from serving.engine.events import CancelRequest, Submit
from serving.engine.request import FinishReason
from serving.incident.log_file import LogReader
from serving.incident.recorder import Recorder
from serving.incident.replay import replay
from tests.serving.incident.live_run import CANCELLED, REQUESTS

CORES = ("engine", "worker", "gateway")


def entries_of(path: Path):
    with LogReader(path) as log:
        return list(log.entries())


def test_the_live_run_had_a_cancel_and_preemptions(recorded):
    ends = dict(recorded.ends)
    assert ends.pop(CANCELLED) is FinishReason.CANCELLED
    assert set(ends.values()) == {FinishReason.LENGTH}
    placed = Counter()

    def count(entry, answer):
        for effect in answer:
            if isinstance(effect, Submit):
                placed["rows"] += len(effect.plan.assignments)

    replay(recorded.engine, seen=count)
    assert placed["rows"] > REQUESTS


@pytest.mark.parametrize("core", CORES)
def test_a_live_run_replays_to_the_same_effects(recorded, core):
    path = getattr(recorded, core)
    outcome = replay(path)
    assert outcome.difference is None
    assert outcome.notice == ""
    assert not outcome.other_code
    assert outcome.events == len(entries_of(path)) > REQUESTS


@pytest.mark.parametrize(("core", "answers"), [("engine", True), ("worker", False)])
def test_a_replay_records_the_same_bytes(recorded, tmp_path, core, answers):
    path = getattr(recorded, core)
    with LogReader(path) as log:
        again = Recorder(tmp_path / "again", log.header, keep_answers=answers, most_waiting=1 << 30)
    replay(path, sink=again)
    again.close()
    assert again.path.read_bytes() == path.read_bytes()


def test_a_changed_engine_is_noticed_at_the_event_it_answers_otherwise(recorded, monkeypatch):
    kept = EngineCore._end

    def end(self, request, reason, detail, outputs):
        kept(self, request, FinishReason.LENGTH, detail, outputs)

    monkeypatch.setattr(EngineCore, "_end", end)
    difference = replay(recorded.engine).difference
    assert isinstance(difference.entry.event, CancelRequest)
    assert '"cancelled"' in difference.entry.answer
    assert difference.replayed == difference.entry.answer.replace('"cancelled"', '"length"')


def test_a_changed_worker_is_noticed_though_only_digests_were_kept(recorded, monkeypatch):
    monkeypatch.setattr(WorkerCore, "_cancel", lambda self, attempt: None)
    difference = replay(recorded.worker).difference
    assert isinstance(difference.entry.event, GatewayMessage)
    assert isinstance(difference.entry.event.message, AbortRequest)
    assert difference.entry.answer is None
    assert difference.replayed == "[]"


def test_a_core_that_raises_now_differs_there(recorded, monkeypatch):
    def fail(self, event, now):
        raise RuntimeError("a defect")

    monkeypatch.setattr(EngineCore, "handle", fail)
    outcome = replay(recorded.engine)
    assert outcome.events == 1
    assert outcome.difference.replayed == '["RuntimeError","a defect",[]]'


def test_other_code_is_told_apart(recorded, monkeypatch):
    monkeypatch.setattr("serving.incident.replay.code_identity", lambda: "another")
    assert replay(recorded.engine).other_code


@pytest.mark.parametrize("kept", [0, 1, 7])
def test_a_cut_log_replays_up_to_the_cut(recorded, tmp_path, kept):
    entries = entries_of(recorded.gateway)
    begin = entries[kept].offset
    end = entries[kept + 1].offset
    whole = recorded.gateway.read_bytes()
    cut = tmp_path / "cut.lumenlog"
    for length in (begin, begin + 3, begin + 8, begin + 9, end - 1):
        cut.write_bytes(whole[:length])
        outcome = replay(cut)
        assert outcome.events == kept
        assert outcome.difference is None
        assert f"cut off at byte {begin}, after {kept} events" in outcome.notice
