"""bench_engine through a gateway and a worker."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.engine.bars import Bar
from tools.bench.engine.engine import TINY
from tools.bench.engine.gateway import GatewayEngine, beside_in_process, serve_flags
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.report import MEASURED, measured, not_measured
from tools.bench.engine.works import Job

TOOL = Path(__file__).parents[2] / "tools" / "bench_engine.py"


def test_works_go_through_a_gateway_and_are_set_beside_those_in_process(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--smoke", "--works=c", "--gateway=c", "--reps=1",
         f"--cache_dir={tmp_path / 'programs'}", f"--json={tmp_path / 'engine.json'}"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {one["name"]: one for one in json.loads((tmp_path / "engine.json").read_text())["rows"]}
    alone = rows["(c) offline, 6 requests of 24 in, 8 out"]
    through = rows["(c) offline, 6 requests of 24 in, 8 out, through gateway and worker"]
    assert alone["status"] == through["status"] == MEASURED
    assert through["share_of_in_process"] == pytest.approx(
        through["median"] / alone["median"], rel=1e-3
    )
    # Worker and engine run the same programs: what the one compiled the other loads.
    assert len(list((tmp_path / "programs" / "executables").iterdir())) == 1


def test_a_worker_gets_the_settings_of_the_engine(tmp_path):
    flags = serve_flags(TINY, tmp_path, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})
    assert "--noprefix_cache" in flags
    given = dict(flag.removeprefix("--").split("=") for flag in flags if "=" in flag)
    assert given["model"] == "random:tiny-llama"
    assert given["token_budget"] == "36"  # every row and a whole prefill call
    assert given["mixed_calls"] == "False"
    assert (given["num_rows"], given["replicas"], given["num_blocks"]) == ("4", "1", "64")
    assert float(given["memory_fraction"]) == pytest.approx(0.45)
    free = dataclasses.replace(TINY, num_blocks=None, step_tokens=50)
    flags = serve_flags(free, tmp_path, {})
    assert "--token_budget=50" in flags
    assert not any(flag.startswith("--num_blocks") for flag in flags)
    assert any(flag.startswith("--memory_fraction=0.675") for flag in flags)
    with pytest.raises(ValueError, match="--pipeline_depth must be 2"):
        serve_flags(dataclasses.replace(TINY, pipeline_depth=1), tmp_path, {})


@pytest.fixture
def nobody_there():
    # Port 1 is privileged, and nothing of ours listens there.
    with GatewayEngine("127.0.0.1:1", 100, 4, 64) as engine:
        yield engine


def test_requests_that_fail_are_an_error(nobody_there):
    with pytest.raises(EngineError, match="2 of 2 requests failed: UNAVAILABLE"):
        nobody_there.generate([Job((1, 2), 3), Job((4,), 1)])


def test_a_client_that_dies_is_an_error(nobody_there):
    for client in nobody_there._clients:
        client.kill()
        client.wait()
    with pytest.raises(EngineError, match="A client of the gateway ended"):
        nobody_there.generate([Job((1, 2), 3)])


@pytest.mark.parametrize(
    ("unit", "through", "share", "verdict"),
    [
        ("output tokens/s", 99.0, 0.99, "aim"),
        ("output tokens/s", 96.0, 0.96, "floor"),
        ("output tokens/s", 90.0, 0.9, "below floor"),
        ("ms", 101.0, 0.9901, "aim"),
        ("ms", 104.0, 0.9615, "floor"),
        ("ms", 110.0, 0.9091, "below floor"),
    ],
)
def test_a_share_of_the_speed_in_process_is_the_bar(unit, through, share, verdict):
    alone = measured("x", unit, [100.0], Bar(50.0))
    found = beside_in_process(measured("x", unit, [through]), alone, barred=True)
    assert found["name"] == "x, through gateway and worker"
    assert (found["share_of_in_process"], found["verdict"]) == (share, verdict)
    assert found["peer"] is None
    assert not beside_in_process(measured("x", unit, [through]), alone, barred=False)["verdict"]


def test_without_the_other_side_there_is_no_share():
    one, none = measured("x", "ms", [1.0]), not_measured("x", "ms", "not measured: why")
    for through, alone in ((one, None), (one, none), (none, one)):
        found = beside_in_process(through, alone, barred=True)
        assert "share_of_in_process" not in found
        assert found["status"] == through["status"]
