import subprocess
import sys
from pathlib import Path

import pytest

from serving.engine.executor import ExecutorLimits
from serving.sim.cost_fit import errors, fit
from serving.sim.profile import read_profile
from serving.sim.timed_executor import TimedExecutor
from tools.bench.executor_grid import GridClock, GridPoint, grid

ROOT = Path(__file__).parents[2]
H200 = read_profile(ROOT / "configs/profiles/h200_llama_8b.json")


class Device:
    """An executor as the H200's profile says, with the clock that its steps move."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.inner = TimedExecutor(H200, H200.limits())
        self.limits: ExecutorLimits = self.inner.limits
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def submit(self, plan):
        self.inner.submit(plan)

    def collect(self):
        self.now += self.inner.oldest_duration()
        return self.inner.collect()

    def interrupt(self):
        pass


def test_the_grid_of_an_h200_is_measured_in_time_and_gives_its_profile_back(monkeypatch):
    config, limits = H200.executor.config(), H200.limits()
    points = grid(config, limits)
    device = Device(monkeypatch)
    clock = GridClock(device, config)
    times = [clock.measure(point) for point in points]
    assert device.now < 60
    used = [one for one in times if not one.point.held_out]
    assert {point.rows for point in points} >= set(config.decode_buckets)
    assert {call.tokens for one in used for call in one.measured.work.calls} == set(
        config.chunk_buckets
    )
    assert {one.measured.work.mixed.tokens for one in used if one.measured.work.mixed} == {
        tokens for tokens, _ in config.mixed_calls
    }
    found = fit([one.measured for one in times])
    assert found.held_out is not None
    assert found.held_out.points > 50
    assert found.held_out.largest < 0.01
    assert found.model.pair_s == pytest.approx(H200.cost.pair_s, rel=0.01)
    assert errors(H200.cost, [one.measured for one in times]).largest < 0.002


def test_every_repetition_is_the_same_step(monkeypatch):
    device = Device(monkeypatch)
    clock = GridClock(device, H200.executor.config())
    for point in (
        GridPoint(64, 2048),
        GridPoint(chunks=((1024, 500), (0, 300))),
        GridPoint(60, 2048, ((4096, 400),)),
        GridPoint(64, 1088, ((0, 4096),)),
    ):
        measured = clock.measure(point).measured
        assert len(measured.samples) >= 4
        assert max(measured.samples) / min(measured.samples) < 1.01
        assert H200.cost.seconds(measured.work) == pytest.approx(measured.seconds, rel=0.002)


@pytest.mark.slow
def test_smoke_run_writes_a_profile(tmp_path):
    path = tmp_path / "profile.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/profile_executor.py"), "--smoke", "--name=tiny",
         f"--profile={path}"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Held out:" in done.stdout
    profile = read_profile(path)
    assert (profile.name, profile.executor.batch_sizes) == ("tiny", (1, 2, 4))
    assert profile.cost.mixed_s is not None
    assert profile.moves.kv_bytes_per_token > 0
    assert len(profile.measured) >= 10
    assert all(len(step.samples) >= 2 for step in profile.measured)


@pytest.mark.parametrize("flag", ["--copy_gb_s=0", "--point_seconds=nan"])
def test_speeds_and_times_that_are_none_are_refused_before_the_start(flag):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/profile_executor.py"), "--smoke", flag],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert f"profile_executor: {flag}: it must be more than 0 and finite." in done.stderr
