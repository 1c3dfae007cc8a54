"""The light executor: durations of what the device would call, tokens that are positions."""

from pathlib import Path

import numpy as np
import pytest

from serving.engine.config import EngineConfig
from serving.engine.events import AddRequest
from serving.engine.plan import PrefillChunk, RowAssignment, StepPlan
from serving.engine.request import EngineRequest, RequestOutput, SamplingParams
from serving.errors import ExecutorError
from serving.sim.cost_model import CallWork, StepWork, attention_pairs
from serving.sim.executor import SimExecutor
from serving.sim.profile import read_profile
from serving.sim.replica_node import ReplicaNode
from serving.sim.timed_executor import TimedExecutor
from serving.sim.world import World

PROFILE = read_profile(Path(__file__).parents[3] / "configs/profiles/h200_llama_8b.json")


def made() -> TimedExecutor:
    return TimedExecutor(PROFILE, PROFILE.limits())


def chunk(row, start, tokens, samples=True):
    return PrefillChunk(row, start, np.ones(tokens, np.int32), samples)


def start(step_id, *chunks, decode=(), **more):
    assignments = tuple(RowAssignment(c.row, c.start, SamplingParams(), ()) for c in chunks)
    return StepPlan(step_id, np.asarray(decode, np.int32), chunks, assignments, **more)


def decode(step_id, rows, **more):
    return StepPlan(step_id, np.asarray(rows, np.int32), **more)


def duration(executor, plan):
    executor.submit(plan)
    seconds = executor.predicted_duration(plan)
    return seconds, executor.collect()


def test_prompts_share_a_call_and_large_ones_take_several():
    executor = made()
    seconds, result = duration(executor, start(1, chunk(0, 0, 600), chunk(1, 64, 400)))
    pairs = attention_pairs(0, 600) + attention_pairs(64, 400)
    assert seconds == PROFILE.cost.seconds(StepWork(calls=(CallWork(1024, pairs),)))
    assert result.rows.tolist() == [0, 1]
    assert result.tokens.tolist() == [[600], [464]]
    seconds, _ = duration(executor, start(2, chunk(2, 0, 4096), chunk(3, 0, 128)))
    calls = (CallWork(4096, attention_pairs(0, 4096)), CallWork(128, attention_pairs(0, 128)))
    assert seconds == PROFILE.cost.seconds(StepWork(calls=calls))


def test_decodes_read_what_their_rows_hold():
    executor = made()
    duration(executor, start(1, chunk(0, 0, 600), chunk(5, 0, 100, samples=False)))
    seconds, result = duration(executor, decode(2, [0, 5]))
    assert seconds == PROFILE.cost.seconds(StepWork(8, 2, 700))
    assert result.tokens.tolist() == [[601], [101]]
    seconds, result = duration(executor, decode(3, [0, 5], steps=3))
    assert seconds == pytest.approx(PROFILE.cost.seconds(StepWork(8, 2, 702, 3)))
    assert result.tokens.tolist() == [[602, 603, 604], [102, 103, 104]]
    seconds, result = duration(executor, decode(4, [0, 5], steps=2))
    assert seconds == pytest.approx(PROFILE.cost.seconds(StepWork(8, 2, 708, 2)))
    assert result.tokens.tolist() == [[605, 606], [105, 106]]


def test_a_plan_that_fits_is_one_mixed_call():
    executor = made()
    duration(executor, start(1, chunk(0, 0, 600)))
    seconds, result = duration(executor, start(2, chunk(1, 0, 150), decode=[0]))
    mixed = CallWork(256, attention_pairs(0, 150))
    assert seconds == PROFILE.cost.seconds(StepWork(1, 1, 600, mixed=mixed))
    assert result.rows.tolist() == [0, 1]
    assert result.tokens.tolist() == [[601], [150]]


def test_an_interrupt_leaves_the_rest_of_the_steps_out():
    executor = made()
    duration(executor, start(1, chunk(0, 0, 600)))
    plan = decode(2, [0], steps=5)
    executor.submit(plan)
    assert executor.predicted_duration(plan, 2) < executor.predicted_duration(plan)
    executor.interrupt(1)
    assert executor.collect().tokens.tolist() == [[601, 602]]
    assert duration(executor, decode(3, [0]))[1].tokens.tolist() == [[603]]


def test_coasting_is_many_steps():
    executor, single = made(), made()
    for one in (executor, single):
        duration(one, start(1, chunk(0, 0, 600), chunk(1, 0, 100)))
        one.submit(decode(2, [0, 1]))
        one.submit(decode(3, [0, 1]))
    foretold = executor.coming_durations(5).tolist()
    tokens = executor.coast(4)
    singly = []
    for step in range(4):
        singly.append(single.oldest_duration())
        assert single.collect().tokens[:, 0].tolist() == tokens[:, step].tolist()
        single.submit(decode(4 + step, [0, 1]))
    assert foretold == [*singly, single.oldest_duration()]
    assert executor.oldest_duration() == single.oldest_duration()
    for one in (executor, single):
        one.submit(decode(8, [0, 1]))
    for _ in range(3):
        ours, theirs = executor.collect(), single.collect()
        assert (ours.step_id, ours.tokens.tolist()) == (theirs.step_id, theirs.tokens.tolist())


def test_a_failure_comes_back_as_a_result():
    executor = made()
    executor.submit(start(1, chunk(0, 0, 10)))
    executor.fail("the device is gone")
    assert executor.collect().error == "the device is gone"
    with pytest.raises(ExecutorError, match="submit one first"):
        executor.collect()
    with pytest.raises(ExecutorError, match="not in flight"):
        executor.predicted_duration(decode(9, [0]))


def test_the_shell_of_the_fault_search_runs_on_it_too():
    world = World(0)
    published: list[RequestOutput] = []
    executor: SimExecutor = made()
    node = ReplicaNode(
        world,
        "r",
        executor,
        EngineConfig(decode_steps=8),
        stepped=lambda outputs, load: published.extend(outputs),
        failed=lambda reason: None,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    world.time.at(0.0, lambda: node.post(AddRequest(EngineRequest("a", 1, (5,) * 100, sampling))))
    # In the middle of eight steps, which end after the one under way.
    world.time.at(0.05, lambda: node.post(AddRequest(EngineRequest("b", 1, (6,) * 50, sampling))))
    while world.time.step():
        pass
    for name, prompt in (("a", 100), ("b", 50)):
        tokens = [t for output in published if output.request_id == name for t in output.tokens]
        assert tokens == list(range(prompt, prompt + 30))
    assert max(len(output.tokens) for output in published) == 8
    assert node.core.is_idle()
