"""The replay tool as a person runs it."""

import subprocess
import sys
from pathlib import Path

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.event_sink import handle_recorded
from serving.engine.events import AddRequest, CancelRequest, PlanStep
from serving.engine.executor import ExecutorLimits
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
    request = EngineRequest("a", 1, tuple(range(10)), SamplingParams())
    for now, event in enumerate((AddRequest(request), PlanStep(), CancelRequest("a", 1))):
        handle_recorded(core.handle, event, float(now), recorder)
    recorder.close()
    return recorder.path


def test_it_replays_shows_and_points_at_a_difference(tmp_path):
    path = recorded(tmp_path)
    shown = run("--show", path)
    assert shown.returncode == 0, shown.stderr
    assert "CancelRequest(request_id='a', attempt=1)" in shown.stdout
    assert "replica: 3 events, every answer the same." in shown.stdout

    with LogReader(path) as log:
        header, entries = log.header, list(log.entries())
    other = tmp_path / "other.lumenlog"
    answer = entries[2].answer.replace("cancelled", "length")
    other.write_bytes(
        log_file.start(header)
        + b"".join(
            log_file.entry(e.now, e.event, text, keep_answer=True)
            for e, text in zip(entries, [entries[0].answer, entries[1].answer, answer], strict=True)
        )
    )
    broken = tmp_path / "broken.lumenlog"
    broken.write_bytes(b"none")
    different = run(other, broken, path)
    assert different.returncode == 2
    assert f"event 3 (byte {entries[2].offset} of {other}) is answered differently" in (
        different.stdout
    )
    assert '"length"' in different.stdout
    assert '"cancelled"' in different.stdout
    assert "every answer the same" in different.stdout
    assert f"{broken}, byte 0" in different.stderr
    assert run(other).returncode == 1
