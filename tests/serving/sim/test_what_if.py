"""A recorded run under other settings: the model is found in the log, and so is its run."""

import pytest

from serving.cluster.worker_events import WorkerConfig
from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.event_sink import handle_recorded
from serving.engine.events import AddRequest, CancelRequest, PlanStep, StepDone, Submit
from serving.engine.executor import ExecutorLimits
from serving.engine.request import EngineRequest, SamplingParams
from serving.errors import ConfigurationError
from serving.incident import log_file
from serving.incident.cores import EngineParts
from serving.incident.log_file import Header
from serving.incident.recorder import Recorder
from serving.sim.modelled_executor import ModelledExecutor, StepCost
from serving.sim.what_if import changed, read_run, run_again

LIMITS = ExecutorLimits(4, 24, 6, 4, 64, 8, 2, 97, 3, "r1")
COST = StepCost(0.01, 0.001, 0.0001)
BEGAN = 1000.0


def request(index, length, most, deadline=None):
    prompt = tuple(range(8, 8 + length))  # all start alike
    sampling = SamplingParams(temperature=0.0, max_tokens=most, stop_token_ids=(50,))
    return AddRequest(EngineRequest(f"r{index}", 1, prompt, sampling, deadline=deadline))


ARRIVALS = [
    (0.0, request(0, 20, 30)),
    (0.05, request(1, 33, 20)),
    (0.2, request(2, 9, 25)),
    (0.3, CancelRequest("r2", 1)),
    (0.31, request(3, 40, 24)),
    (0.32, request(4, 24, 40)),
    (0.33, request(5, 24, 40, deadline=BEGAN + 0.6)),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The plain loop on a device that takes exactly as long as COST says."""
    parts = EngineParts(LIMITS, EngineConfig(pipeline_depth=1))
    path = tmp_path_factory.mktemp("logs") / "engine.lumenlog"
    recorder = Recorder(path, Header("engine", "code", 0.0, parts), keep_answers=False)
    core, executor = EngineCore(parts.limits, parts.config), ModelledExecutor(LIMITS, COST)
    coming, now = list(ARRIVALS), 0.0

    def tell(event):
        return handle_recorded(core.handle, event, BEGAN + now, recorder)

    done = None
    while coming or done is not None:
        if done is None or (coming and coming[0][0] < done):
            now, event = coming.pop(0)
            tell(event)
            if done is not None:
                continue
        else:
            now, done = done, None
            tell(StepDone(executor.collect()))
        for effect in tell(PlanStep()):
            if isinstance(effect, Submit):
                executor.submit(effect.plan)
                done = now + executor.predicted_duration(effect.plan)
    recorder.close()
    return path


def test_the_same_settings_give_the_same_run(log):
    run = read_run(log)
    for name in ("fixed_s", "per_token_s", "per_context_token_s"):
        assert getattr(run.cost, name) == pytest.approx(getattr(COST, name), rel=1e-3)
    live, again = run.timings, run_again(run, run.parts.config)
    assert live.ended == {"cancelled": 1, "deadline": 1, "length": 3, "stop": 1}
    assert again.ended == {"cancelled": 1, "deadline": 1, "length": 4}  # as long as it was live
    assert live.made == again.made
    assert live.placed == again.placed > len(ARRIVALS) - 1
    assert again.ttft_s == pytest.approx(live.ttft_s, abs=1e-3)
    assert again.itl_s == pytest.approx(live.itl_s, abs=1e-3)


def test_other_settings_give_another_run(log):
    run = read_run(log)
    usual = run_again(run, run.parts.config)
    uncached = run_again(run, changed(run.parts.config, ["prefix_caching=false"]))
    assert sum(uncached.ttft_s) > sum(usual.ttft_s)
    small = run_again(run, changed(run.parts.config, ["max_step_tokens=5"]))
    assert len(small.ttft_s) == 5  # one deadline passes before its first token
    assert all(slow > fast for slow, fast in zip(small.ttft_s, usual.ttft_s, strict=False))


@pytest.mark.parametrize(
    "setting", ["speed=3", "decode_steps", "decode_steps=x", "prefix_caching=1", "eos_token_ids=3"]
)
def test_settings_that_are_none_are_named(setting):
    with pytest.raises(ConfigurationError, match=r"name=value.*decode_steps.*watermark"):
        changed(EngineConfig(), ["watermark=0.5", setting])


def test_logs_that_say_nothing_of_an_engine_are_refused(tmp_path):
    path = tmp_path / "log"
    worker = WorkerConfig("w", "one", "m", "r", 100, ())
    for parts, said in (
        (worker, "not an engine"),
        (EngineParts(LIMITS, EngineConfig()), "no step ended"),
    ):
        path.write_bytes(log_file.start(Header("core", "code", 0.0, parts)))
        with pytest.raises(ConfigurationError, match=said):
            read_run(path)
