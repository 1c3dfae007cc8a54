import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.engine.executor import ExecutorLimits
from tools.bench import results
from tools.bench.engine import bars, measurements
from tools.bench.engine.bars import Bar
from tools.bench.engine.engine import TINY, InProcessEngine, Run, build
from tools.bench.engine.measurements import Bench
from tools.bench.engine.profile import DecodeTrace, DeviceEvent, device_step
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.report import MEASURED, line, markdown, measured, not_measured
from tools.bench.engine.runner import Options, run
from tools.bench.engine.start_up import StartUp, report, start
from tools.bench.engine.step_clock import StepTime, steady_step
from tools.bench.engine.works import FULL, SMOKE, Job, alike

TOOL = Path(__file__).parents[2] / "tools" / "bench_engine.py"

SETTINGS = dataclasses.replace(TINY, prefill_buckets=(32,))


@pytest.fixture(scope="module")
def built():
    return build(SETTINGS, None)


@pytest.fixture
def engine(built):
    made = InProcessEngine(built.executor, SETTINGS)
    yield made
    made.close()


def test_smoke_run_measures_every_work_and_gives_a_results_file(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"2026-11-25 00:00:00.{number},{20 + number},8\n" for number in range(10)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines))
    done = subprocess.run(
        [sys.executable, str(TOOL), "--smoke", "--reps=2", "--gateway=", f"--trace={trace}",
         "--trace_start=0.15", "--trace_seconds=0.5", "--saturation=50", "--load=0.5",
         f"--json={tmp_path / 'engine.json'}", f"--markdown={tmp_path / 'engine.md'}"],
        capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "engine.json").read_text())
    assert {"commit", "command", "hardware", "date", "versions", "settings"} <= set(content)
    rows = {one["name"]: one for one in content["rows"]}
    idle = rows.pop("device idle per step, batch 4, context 24")
    assert idle["status"] == "not measured: no GPU in the profile, or too few whole steps"
    saturation = rows["saturation, 5 requests of 0.5 s of the trace from 0.15 s on"]
    assert saturation["note"].startswith("as given; 1600 tokens/s in and out")
    assert len(rows["ITL p99 at 25 requests/s, 50 % of saturation"]["samples"]) == 2
    assert {one["status"] for one in rows.values()} == {MEASURED}
    assert all(one["median"] > 0 for name, one in rows.items() if not name.startswith("(a) decode"))
    assert rows["KV capacity"]["samples"] == [64 * 16]
    for name in ("cold", "warm"):
        assert len(rows[f"start to ready, {name} compile cache"]["samples"]) == 1
    for batch in SMOKE.batches:
        one = rows[f"(a) decode step, batch {batch}, context 24"]
        # A difference of two times, of tiny work here: on a busy machine it may be negative.
        pairs = zip(one["long_s"], one["short_s"], strict=True)
        expected = [1e3 * (long - short) / (SMOKE.long - SMOKE.short) for long, short in pairs]
        assert one["samples"] == pytest.approx(expected, abs=0.1)
        assert len(expected) == 2
        assert min(one["long_s"] + one["short_s"]) > 0
        interpreter = rows[f"interpreter time per step, batch {batch}"]
        assert interpreter["samples"][0] == pytest.approx(
            interpreter["dispatch_ms"][0] + interpreter["planning_ms"][0], abs=1e-3
        )
    # Bars are those of one model on one chip; a smoke run is compared with nothing.
    assert not any(one["peer"] or one["floor"] for one in rows.values())
    assert (tmp_path / "engine.md").read_text().count("\n| ") >= len(content["rows"])


def test_full_work_is_what_the_peer_was_measured_with():
    assert (FULL.batches, FULL.context) == ((1, 8, 32, 64, 128, 256), 1024)
    assert (FULL.long, FULL.short) == (128, 16)
    assert FULL.prompts == (1024, 4096, 16384)
    assert (FULL.many, FULL.many_tokens) == (32, 2048)
    assert FULL.offline == (512, 1024, 256)
    lengths = FULL.mix.lengths()
    random = np.random.default_rng(0)
    expected = np.clip(random.lognormal(5.0, 1.1, 512), 4, 4096).astype(int)
    assert lengths.prompts == tuple(expected.tolist())
    expected = np.clip(random.lognormal(5.2, 0.9, 512), 4, 1024).astype(int)
    assert lengths.outputs == tuple(expected.tolist())


def test_bars_follow_from_the_peer():
    assert bars.decode(32) == Bar(6.38, pytest.approx(5.8696), 5.42)
    assert bars.prefill(1024) == Bar(27.9, pytest.approx(27.342), pytest.approx(25.11))
    assert bars.decode(7) == bars.prefill(100) == bars.NONE


def test_prompts_are_random_and_the_same_each_time():
    one, other = alike(2, 5, 3).jobs(1000)
    assert (len(one.prompt), one.output_tokens) == (5, 3)
    assert one.prompt != other.prompt
    assert alike(2, 5, 3).jobs(1000) == [one, other]


def test_every_token_is_counted(engine):
    found = engine.generate([Job((5, 6, 7), 9), Job((8,), 4)])
    assert found.output_tokens == 13
    assert found.seconds > 0
    # Steps are those of this run, prefills and decodes.
    assert sum(step.prefill_tokens for step in found.steps) == 4
    assert sum(step.decode_rows for step in found.steps) == 11
    assert engine.generate([Job((9,), 2)]).output_tokens == 2


def test_a_request_that_ends_otherwise_is_an_error(engine):
    with pytest.raises(EngineError, match=r"ended as .*FAILED.*at most 127"):
        engine.generate([Job((1,) * 128, 1)])
    with pytest.raises(EngineError, match="brought 28 tokens, not 40"):
        engine.generate([Job((1,) * 100, 40)])


def test_an_engine_that_dies_says_so_now_and_later():
    class Broken:
        limits = ExecutorLimits(4, 8, 4, 16, 64, 32, 2, 100, 5, "r")

        def submit(self, plan):
            raise RuntimeError("out of luck")

    made = InProcessEngine(Broken(), SETTINGS)
    with pytest.raises(EngineError, match="failed: out of luck"):
        made.generate([Job((1,), 1)])
    with pytest.raises(EngineError, match="failed earlier: out of luck"):
        made.generate([Job((1,), 1)])


def test_without_a_trace_its_latency_is_not_measured(engine):
    (one,) = measurements.itl(bench(engine))
    assert one["status"] == "not measured: no trace given"


def bench(engine, **sizes):
    return Bench(engine, dataclasses.replace(SMOKE, **sizes), reps=1, barred=True)


def test_what_an_engine_cannot_hold_is_a_row_that_says_so(engine):
    rows = list(measurements.decode(bench(engine, batches=(8,))))
    assert [one["status"] for one in rows] == [
        "not measured: the engine runs 4 requests side by side"
    ]
    (one, _) = measurements.prefill(bench(engine, prompts=(128,)))
    assert one["status"] == "not measured: a request of this engine has at most 128 tokens"


def test_an_engine_elsewhere_is_measured_without_its_steps():
    class Elsewhere:
        vocab_size, max_requests, max_tokens = 100, 512, 32768

        def generate(self, jobs):
            tokens = sum(job.output_tokens for job in jobs)
            return Run(0.1 + 0.005 * jobs[0].output_tokens, tokens, ())

    there = Bench(Elsewhere(), FULL, reps=2, barred=True)
    first = next(measurements.decode(there))
    assert first["samples"] == pytest.approx([5.0, 5.0])
    assert (first["peer"], first["verdict"]) == (4.92, "below floor")
    assert all(one["status"] == MEASURED for one in measurements.mix(there))
    assert {one["status"] for one in measurements.idle(there)} == {
        "not measured: the engine runs in another process"
    }


def steps(*rows_prefills, period=0.01):
    return [
        StepTime(rows, prefill, period * number, 0.001, 0.006, 0.004 * number)
        for number, (rows, prefill) in enumerate(rows_prefills)
    ]


def test_steady_steps_are_whole_and_undisturbed():
    found = steady_step(steps((0, 9), (4, 9), *[(4, 0)] * 5, (3, 0)), rows=4)
    assert found.step == pytest.approx(10.0)
    assert found.dispatch == pytest.approx(1.0)
    assert found.planning == pytest.approx(3.0)
    assert found.interpreter == pytest.approx(4.0)
    assert found.cpu == pytest.approx(4.0)
    assert steady_step(steps((4, 0), (4, 5), (4, 0), (4, 0), (3, 0), (4, 0)), rows=4) is None


def test_a_profile_is_added_up_by_kernel_without_its_ends():
    # Steps of 100 us: "a" takes 60 of them, "b" 20, and "b" runs beside "a" once more.
    events = []
    for number in range(20):
        start = 1e5 * number
        events += [DeviceEvent(start, 6e4, "a"), DeviceEvent(start + 7e4, 2e4, "b")]
        events.append(DeviceEvent(start + 1e4, 1e4, "b"))
    events.append(DeviceEvent(0.0, 2e5, "first"))
    found = device_step(events, step_s=9e-5, traced_s=1e-4)
    assert (found.step, found.traced_step) == pytest.approx((0.09, 0.1))
    assert found.busy == pytest.approx(0.08, rel=0.1)
    assert found.idle == pytest.approx(0.09 - found.busy)
    assert [one.name for one in found.kernels] == ["a", "b"]
    assert [one.us for one in found.kernels] == pytest.approx([60, 30], rel=0.1)
    assert [one.launches for one in found.kernels] == pytest.approx([1, 2], rel=0.1)
    assert device_step([], 1e-4, 1e-4) is None


def test_a_trace_covers_the_steps_asked_for(monkeypatch, tmp_path):
    calls = []
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(
            f"tools.bench.engine.profile.jax.profiler.{name}",
            lambda *_, n=name, **__: calls.append(n),
        )
    trace = DecodeTrace(tmp_path, rows=4, before=2, steps=3)
    for number, step in enumerate(steps((4, 9), *[(4, 0)] * 6)):
        trace(step)
        assert len(calls) == (number >= 2) + (number >= 5)
    trace.stop()
    assert calls == ["start_trace", "stop_trace"]
    assert trace.result() is None  # nothing was traced


@pytest.mark.parametrize(
    ("unit", "bar", "speed", "verdict"),
    [
        ("ms", Bar(8.0, 7.0, 4.0), 2.0, "aim"),
        ("ms", Bar(8.0, 7.0, 3.0), 2.0, "floor"),
        ("ms", Bar(2.0, 1.9, 1.8), 0.5, "below floor"),
        ("tokens/s", Bar(2.0, 3.0, 5.0), 2.0, "floor"),
        ("tokens/s", Bar(8.0, 8.4, 9.6), 0.5, "below floor"),
        ("ms", bars.NONE, None, ""),
    ],
)
def test_speed_and_verdict(unit, bar, speed, verdict):
    one = measured("x", unit, [4.0, 9.0, 3.0], bar)
    assert (one["median"], one["speed"], one["verdict"]) == (4.0, speed, verdict)
    assert line(one).endswith(verdict)
    assert markdown([one]).splitlines()[-1].split(" | ")[7] == verdict


def test_table_shows_reasons_and_kernels():
    kernels = [{"name": "gemm", "launches": 2.0, "us": 30.5}]
    rows = [
        not_measured("y", "ms", "not measured: why"),
        measured("x", "ms", [1.0], kernels=kernels),
    ]
    text = markdown(rows)
    assert "| y |  | ms |  |  |  |  |  | not measured: why |" in text
    assert "| 30.5 | 2.0 | `gemm` |" in text


def test_a_start_is_told_and_read_again(tmp_path, built):
    told = report(dataclasses.replace(built, seconds=2.5, weights_s=1.0))
    command = [sys.executable, "-c", f"print('noise'); print({told!r})"]
    assert start(command, tmp_path) == StartUp(2.5, 1.0, 64 * 16)
    with pytest.raises(EngineError, match="status 3: no such device"):
        start([sys.executable, "-c", "import sys; print('no such device', file=sys.stderr); "
               "sys.exit(3)"], tmp_path)  # fmt: skip


def test_what_breaks_is_a_row_and_a_failure(monkeypatch):
    def broken(command, folder):
        raise EngineError("no device")

    def interrupted(bench):
        yield measured("first", "ms", [1.0])
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.bench.engine.runner.start", broken)
    monkeypatch.setitem(measurements.WORKS, "c", interrupted)
    outcome = run(Options(settings=SETTINGS, works=("start", "c"), smoke=True))
    assert outcome.failures == [
        "start to ready: EngineError: no device",
        "interrupted: what follows was not measured",
    ]
    assert [one["name"] for one in outcome.rows] == ["start to ready", "KV capacity", "first"]
    assert results.results(outcome.rows, outcome.facts, {})["settings"]["kv_tokens"] == 1024


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"works": ("e",)}, "--works=e"), ({"works": ()}, "--works"), ({"reps": 0}, "--reps"),
     ({"starts": 0}, "--starts"), ({"gateway": ("idle",)}, "--gateway=idle")],
)  # fmt: skip
def test_bad_options_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Options(settings=SETTINGS, **settings)
