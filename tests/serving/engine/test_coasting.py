"""A stretch of steps taken at once must leave behind what single steps do, to the last block."""

import random
from collections import deque

import numpy as np
import pytest

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import (
    AddRequest,
    CancelRequest,
    Coast,
    Coasted,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepResult
from serving.engine.request import EngineRequest, FinishReason, Priority, SamplingParams
from serving.errors import InternalError

BLOCK = 4


class Engine:
    """A core whose executor draws token 50 + position, stepped singly or in stretches."""

    def __init__(self, coasts, rows=4, blocks=24, **config) -> None:
        limits = ExecutorLimits(
            num_rows=rows,
            num_blocks=blocks,
            slots_per_block=2,
            block_size=BLOCK,
            max_model_len=64,
            max_prefill_tokens=8,
            max_prefills=2,
            vocab_size=1000,
            max_logprobs=1,
            model_revision="r",
        )
        self.core = EngineCore(limits, EngineConfig(**config))
        self.coasts = coasts
        self.plans = deque()
        self.step = 0
        self.stretches = 0
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, tuple[int, FinishReason]] = {}
        self.tables: list[tuple[int, int, int]] = []

    def add(self, name, prompt, output, priority=Priority.HIGH):
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        self.tokens[name] = []
        self.handle(AddRequest(EngineRequest(name, 1, prompt, sampling, priority=priority)))
        self.fill()

    def cancel(self, name):
        self.handle(CancelRequest(name, 1))
        self.fill()

    def until(self, step):
        """Have that many steps come back in all."""
        while self.step < step and self.plans:
            if self.coasts and (quiet := min(self.core.quiet_steps(), step - self.step)):
                self.coast(quiet)
                continue
            plan = self.plans.popleft()
            self.step += 1
            rows = plan.drawing_rows()
            tokens = self.drawn(self.core.oldest_sampling())
            self.handle(StepDone(StepResult(plan.step_id, rows, tokens)))
            self.fill()

    def drawn(self, sampling, steps=1):
        if not sampling:
            return np.zeros((0, 0), np.int32)
        first = np.array([50 + len(request.tokens) for request in sampling], np.int32)
        return first[:, None] + np.arange(steps, dtype=np.int32)

    def coast(self, steps):
        self.stretches += 1
        tokens = self.drawn(self.core.oldest_sampling(), steps)
        for effect in self.handle(Coast(tokens)):
            if isinstance(effect, Coasted):
                self.plans = deque(effect.plans)
                self.enter(self.plans[-1])
        self.step += steps

    def fill(self):
        while any(isinstance(effect, Submit) for effect in self.handle(PlanStep())):
            pass

    def enter(self, plan):
        table = plan.table
        entries = (table.rows.tolist(), table.columns.tolist(), table.slot_bases.tolist())
        self.tables += zip(*entries, strict=True)

    def handle(self, event):
        effects = self.core.handle(event, 0.0)
        for effect in effects:
            if isinstance(effect, Submit):
                self.plans.append(effect.plan)
                self.enter(effect.plan)
            elif isinstance(effect, Publish):
                for output in effect.outputs:
                    known = self.tokens[output.request_id]
                    assert output.start_index == len(known)
                    known.extend(output.tokens)
                    if output.finish is not None:
                        self.finished[output.request_id] = (self.step, output.finish)
        self.core.check_invariants()
        return effects

    def state(self):
        """Everything that decides what comes next, block by block."""
        core = self.core
        allocator, cache = core._memory._allocator, core._memory._cache
        running = [
            (r.request_id, r.row, tuple(r.blocks), tuple(r.tokens), r.registered, r.preemptions)
            for r in core._batch.requests
            if r is not None
        ]
        return {
            "running": running,
            "waiting": [(r.request_id, tuple(r.tokens)) for r in core._waiting],
            "states": list(allocator._states),
            "free": sorted(allocator._free),
            "evicted next": list(allocator._cached),
            "known": None if cache is None else dict(cache._block_of),
            "load": core.load(),
            "plans": [(p.step_id, p.decode_rows.tolist()) for p in self.plans],
            "finished": dict(self.finished),
            "tables": sorted(self.tables),
        }


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("publish_every", [1, 5])
def test_stretches_leave_the_same_state(depth, prefix_caching, publish_every):
    stretches = preemptions = 0
    for seed in range(5):
        chance = random.Random(f"{seed}/{depth}/{prefix_caching}")
        blocks = chance.choice([16, 24, 40])
        config = {
            "pipeline_depth": depth,
            "prefix_caching": prefix_caching,
            "publish_every": publish_every,
        }
        single, coasting = (Engine(coasts, blocks=blocks, **config) for coasts in (False, True))
        step = 0
        for index in range(20):
            step += chance.choice([0, 1, 3, 17, 40])
            stem = [7 + chance.randrange(2)] * chance.choice([0, 4, 9])
            prompt = (*stem, *(100 + chance.randrange(9) for _ in range(chance.randrange(1, 9))))
            output = chance.choice([1, 2, 9, 30, 47])
            priority = chance.choice([Priority.HIGH, Priority.LOW])
            gone = f"r{chance.randrange(index + 1)}" if chance.random() < 0.15 else None
            for engine in (single, coasting):
                engine.until(step)
                if gone is not None:
                    engine.cancel(gone)
                engine.add(f"r{index}", prompt, output, priority)
            assert coasting.state() == single.state()
            preemptions += sum(row[-1] for row in single.state()["running"])
            step = max(step, single.step)
        for engine in (single, coasting):
            engine.until(10_000)
            assert engine.core.is_idle()
        assert coasting.state() == single.state()
        assert coasting.tokens == single.tokens
        stretches += coasting.stretches
    assert stretches > 50
    assert preemptions > 2


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("blocks", [10, 11, 12, 13])
def test_a_block_is_evicted_while_another_request_computes_the_same(depth, blocks):
    # Whether its key is free again when the copy is complete depends on the order in a step.
    single, coasting = (Engine(coasts, blocks=blocks, pipeline_depth=depth) for coasts in (0, 1))
    for engine in (single, coasting):
        engine.add("r", (1, 2), 30)
        engine.until(100)
        engine.add("again", (1, 2), 4 * blocks - 2)
        engine.until(1000)
    assert coasting.state() == single.state()
    assert coasting.stretches


def test_nothing_is_foretold_where_tokens_must_be_looked_at():
    engine = Engine(coasts=False)
    sampling = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(3,))
    engine.tokens["r"] = []
    engine.handle(AddRequest(EngineRequest("r", 1, (1, 2), sampling)))
    engine.fill()
    engine.until(4)
    assert engine.core.quiet_steps() == 0


def test_who_waits_for_a_row_does_not_end_a_stretch():
    engine = Engine(coasts=False, rows=1)
    engine.add("r", (1, 2), 30)
    engine.until(5)
    quiet = engine.core.quiet_steps()
    engine.add("waits", (1, 2), 5)
    assert engine.core.quiet_steps() == quiet > 0


def test_nothing_is_foretold_past_a_deadline_or_an_end():
    engine = Engine(coasts=False)
    engine.add("r", (1, 2), 30)
    engine.until(5)
    quiet = engine.core.quiet_steps()
    assert quiet == 30 - 5 - 2 - 1  # two more are in flight, and the next plan is the last
    sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    late = EngineRequest("late", 1, (1, 2), sampling, deadline=1e9)
    engine.tokens["late"] = []
    engine.handle(AddRequest(late))
    engine.fill()
    engine.until(9)
    assert engine.core.quiet_steps() == 0


def test_more_than_the_quiet_steps_are_refused():
    engine = Engine(coasts=False)
    engine.add("r", (1, 2), 30)
    engine.until(5)
    too_many = np.zeros((1, engine.core.quiet_steps() + 1), np.int32)
    with pytest.raises(InternalError, match="was to coast"):
        engine.handle(Coast(too_many))


def test_rare_outputs_come_first_then_every_so_many_then_last():
    engine = Engine(coasts=False, publish_every=8, pipeline_depth=1)
    published = []
    take = engine.handle

    def handle(event):
        effects = take(event)
        for effect in effects:
            if isinstance(effect, Publish):
                published.extend(len(output.tokens) for output in effect.outputs)
        return effects

    engine.handle = handle
    engine.add("r", (1, 2), 20)
    engine.until(100)
    assert published == [1, 8, 8, 3]
    assert engine.tokens["r"] == [50 + place for place in range(2, 22)]


def test_a_cancelled_request_gives_what_was_not_published():
    engine = Engine(coasts=False, publish_every=8, pipeline_depth=1)
    engine.add("r", (1, 2), 20)
    engine.until(6)
    assert len(engine.tokens["r"]) == 1
    engine.cancel("r")
    assert len(engine.tokens["r"]) == 6
    assert engine.finished["r"] == (6, FinishReason.CANCELLED)
