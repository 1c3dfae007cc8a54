"""bench_replicas: what it reads from reports and from another process's interpreter lock."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.bench.engine import replicas
from tools.bench.engine.engine import TINY
from tools.bench.engine.load_watch import Load, Report, steady, step_ms
from tools.bench.engine.lock_watch import LockShares, LockWatch, LockWatchError
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.replicas import Options, found_in
from tools.bench.engine.report import MEASURED
from tools.bench.spawn import child_running

TOOL = Path(__file__).parents[2] / "tools" / "bench_replicas.py"

OPTIONS = Options(
    settings=TINY, replicas=2, alone=(0,), context=24, output=64, waves=1, reps=1,
    cache_dir=None, barred=True,
)  # fmt: skip


@pytest.mark.slow
def test_smoke_run_measures_two_replicas_and_the_lock(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), "--smoke", "--alone=", f"--json={tmp_path / 'replicas.json'}"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "replicas.json").read_text())
    rows = {one["name"]: one for one in content["rows"]}
    for replica in range(2):
        assert rows[f"decode step of batch 2, device {replica} of 2"]["status"] == MEASURED
        assert rows[f"decode step of batch 2, device {replica} of 2"]["median"] > 0
    assert rows["output tokens of all, 2 replicas"]["median"] > 0
    assert content["settings"]["replicas"] == 2


def report(at_s, *loads, lock=None):
    return Report(at_s, {number: Load(*load) for number, load in enumerate(loads)}, lock)


def test_whole_batches_are_the_longest_row_of_reports_without_its_first():
    def of(*running):
        return [report(float(at), (at, one, 0)) for at, one in enumerate(running)]

    found = steady(of(4, 4, 3, 4, 4, 4, 4, 2), 4)
    assert [one.at_s for one in found] == [4.0, 5.0, 6.0]
    assert steady(of(3, 3), 4) == []
    both = [report(0.0, (1, 4, 0), (1, 4, 0)), report(0.5, (2, 4, 0), (2, 3, 0))]
    assert steady(both, 4) == []


def test_a_step_is_the_slope_of_the_reports():
    reports = [report(7.0 + at, (100 + 50 * at, 4, 0)) for at in range(4)]
    assert step_ms(reports, 0) == pytest.approx(20.0)
    # A report that lags by a step moves the result by less than the difference of the ends would.
    late = [*reports[:3], report(10.0, (249, 4, 0))]
    assert 20.0 < step_ms(late, 0) < 1e3 * 3 / 149


def test_a_run_gives_steps_tokens_and_the_lock():
    locks = [LockShares(1000 * at, {1: 100 * at, 2: 50 * at, 3: 50 * at}) for at in range(1, 6)]
    reports = [
        report(float(at), (50 * at, 4, 0), (100 * at, 4, 0), lock=lock)
        for at, lock in enumerate(locks)
    ]
    arrivals = dict.fromkeys(range(200), 30)  # 600 tokens/s, from second 0 to 10
    found = found_in(reports, 4, 1, arrivals)
    assert found.step_ms == pytest.approx((20.0, 10.0))
    assert (found.seconds, found.reports) == (3.0, 4)
    assert found.tokens_per_s == pytest.approx(600.0)
    # 150 steps of all per second: 6.67 ms each, of which the main thread has a tenth.
    assert found.common_ms == pytest.approx(0.6667, rel=1e-3)
    assert found.own_ms == pytest.approx(0.6667, rel=1e-3)
    unwatched = [dataclasses.replace(one, lock=None) for one in reports]
    assert found_in(unwatched, 4, 1, arrivals).own_ms is None
    assert found_in(reports[:2], 4, 1, arrivals) is None


@pytest.mark.parametrize(
    ("step", "verdict", "times"), [(10.2, "floor", 1.02), (10.4, "below floor", 1.04)]
)
def test_a_replica_among_others_is_set_beside_itself_alone(step, verdict, times):
    alone = list(replicas._rows(OPTIONS, 1, 0, [found(10.0)], []))
    assert alone[0]["name"] == "decode step of batch 4, device 0 alone"
    rows = list(replicas._rows(OPTIONS, 2, None, [found(step, 10.0)], alone))
    assert (rows[0]["verdict"], rows[0]["times_alone"]) == (verdict, times)
    assert "times_alone" not in rows[1]  # device 1 was not measured alone
    assert rows[3]["note"] == "taken 20 % of the time"
    unbarred = dataclasses.replace(OPTIONS, barred=False)
    first = next(replicas._rows(unbarred, 2, None, [found(step, 10.0)], alone))
    assert not first["verdict"]


def found(*step_ms):
    per_replica = 1e3 / sum(1e3 / ms for ms in step_ms)
    return replicas.Found(step_ms, 0.15 * per_replica, 0.05 * per_replica, 1.0, 3.0, 6)


def test_too_short_a_run_is_not_measured():
    (row,) = replicas._rows(OPTIONS, 2, None, [None], [])
    assert row["status"].startswith("not measured")


def test_a_setup_that_does_not_start_is_a_failure_and_the_others_go_on(monkeypatch):
    def measure(options, count, device, scratch):
        if device == 0:
            raise EngineError("it did not start")
        return [found(10.0, 10.0)]

    monkeypatch.setattr(replicas, "_measure", measure)
    rows, failures = replicas.run(OPTIONS)
    assert failures == ["device 0 alone: it did not start"]
    assert [one["status"] for one in rows] == [MEASURED] * 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alone": (2,)}, "--alone=2"),
        ({"reps": 0}, "--reps"),
        ({"output": 200}, "--max_model_len"),
        ({"settings": dataclasses.replace(TINY, tensor_parallel=2)}, "--tensor_parallel"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        dataclasses.replace(OPTIONS, **change)


def test_a_device_is_one_of_those_that_may_be_seen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert replicas._device_name(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert replicas._device_name(1) == "6"


BUSY = "import sys; print(flush=True)\nwhile not sys.stdin.closed: pass"
IDLE = "import sys, time; print(flush=True); time.sleep(60)"


@pytest.fixture(params=[BUSY, IDLE], ids=["busy", "idle"])
def child(request):
    command = [sys.executable, "-c", request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process, request.param is BUSY
        process.kill()


def test_a_lock_is_seen_from_outside(child):
    process, busy = child
    try:
        watch = LockWatch(process.pid)
    except LockWatchError as error:
        pytest.skip(str(error))
    with watch:
        while watch.shares().looks < 200:
            time.sleep(0)  # lets the watch look
        first = watch.shares()
        while (seen := watch.shares().since(first)).looks < 200:
            time.sleep(0)  # lets the watch look
    assert seen.share([process.pid]) == (1.0 if busy else 0.0)
    assert seen.share([]) == 0.0


def test_a_process_that_cannot_be_looked_into_is_said():
    with pytest.raises(LockWatchError, match=r"cannot be looked into|only Linux|does not run"):
        LockWatch(2**22 + 1)  # more than there are numbers of processes


def test_a_child_is_found_by_what_it_runs():
    command = [sys.executable, "-m", "http.server", "--bind=127.0.0.1", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = child_running(os.getpid(), "http.server")
        assert (found.pid, found.flag("bind")) == (process.pid, "127.0.0.1")
        with pytest.raises(RuntimeError, match="not given --listen"):
            found.flag("listen")
        with pytest.raises(RuntimeError, match=r"no child that runs serving\.launch\.worker"):
            child_running(os.getpid(), "serving.launch.worker")
        process.kill()


def test_devices_that_are_no_numbers_are_refused():
    done = subprocess.run(
        [sys.executable, str(TOOL), "--smoke", "--alone=x"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "--alone=x: each must be the number of a device" in done.stderr
