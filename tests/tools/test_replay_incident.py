"""The replay tool as a person runs it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.event_sink import handle_recorded
from serving.engine.events import AddRequest, CancelRequest, PlanStep, StepDone
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepResult
from serving.engine.request import EngineRequest, SamplingParams
from serving.incident import log_file
from serving.incident.cores import EngineParts
from serving.incident.log_file import LogReader
from serving.incident.recorder import open_recorder

TOOL = Path(__file__).parents[2] / "tools" / "replay_incident.py"


def run(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"})


def recorded(folder: Path) -> Path:
    limits = ExecutorLimits(4, 24, 6, 4, 64, 8, 2, 97, 3, "r1")
    parts = EngineParts(limits, EngineConfig())
    recorder = open_recorder(folder, "replica", parts, keep_answers=True, limit_bytes=1 << 20)
    core = EngineCore(parts.limits, parts.config)
    request = EngineRequest("a", 1, tuple(range(8)), SamplingParams(max_tokens=1))
    longer = SamplingParams(max_tokens=20)
    cancelled = AddRequest(dataclasses.replace(request, request_id="b", sampling=longer))
    done = StepDone(StepResult(1, np.zeros(1, np.int32), np.full((1, 1), 5, np.int32)))
    events = (AddRequest(request), PlanStep(), done, cancelled, CancelRequest("b", 1))
    for now, event in enumerate(events):
        handle_recorded(core.handle, event, float(now), recorder)
    recorder.close()
    return recorder.path


def test_it_replays_shows_and_points_at_a_difference(tmp_path):
    path = recorded(tmp_path)
    shown = run("--show", path)
    assert shown.returncode == 0, shown.stderr
    assert "CancelRequest(request_id='b', attempt=1)" in shown.stdout
    assert "replica: 5 events, every answer the same." in shown.stdout

    with LogReader(path) as log:
        header, entries = log.header, list(log.entries())
    other = tmp_path / "other.lumenlog"
    answer = entries[4].answer.replace("cancelled", "length")
    other.write_bytes(
        log_file.start(header)
        + b"".join(
            log_file.entry(e.now, e.event, text, keep_answer=True)
            for e, text in zip(entries, [*(e.answer for e in entries[:4]), answer], strict=True)
        )
    )
    broken = tmp_path / "broken.lumenlog"
    broken.write_bytes(b"none")
    different = run(other, broken, path)
    assert different.returncode == 2
    assert f"event 5 (byte {entries[4].offset} of {other}) is answered differently" in (
        different.stdout
    )
    assert '"length"' in different.stdout
    assert '"cancelled"' in different.stdout
    assert "every answer the same" in different.stdout
    assert f"{broken}, byte 0" in different.stderr
    assert run(other).returncode == 1


def test_what_if_stands_beside_what_was(tmp_path):
    done = run("--what_if=decode_steps=2", recorded(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = {line[:16].strip(): line[16:].split() for line in done.stdout.splitlines()}
    assert lines[""] == ["recorded", "modelled", "decode_steps=2"]
    assert lines["ended length"] == ["1", "1", "1"]
    assert float(lines["ttft p50 ms"][0]) == 2000.0
    wrong = run("--what_if=speed=2", recorded(tmp_path))
    assert wrong.returncode == 2
    assert "speed=2" in wrong.stderr
    wrong = run("--what_if=spread_steps=1e3", recorded(tmp_path))
    assert wrong.returncode == 2
    assert "the value of spread_steps is a whole number." in wrong.stderr


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(TOOL), "--show", str(recorded(tmp_path))],
            stdout=full, stderr=subprocess.PIPE, text=True, env={"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be printed: No space left on device." in done.stderr
    assert "Traceback" not in done.stderr
