"""A steady decode step costs what changed: counted here, since a timer would only measure noise.

`python tests/serving/engine/test_steady_step.py` prints the time per step at batch 256.
"""

import statistics
import sys
import time

import numpy as np

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import AddRequest, PlanStep, StepDone, Submit
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepPlan, StepResult
from serving.engine.request import EngineRequest, SamplingParams

BLOCK_SIZE = 16


class Steady:
    """A full batch of long decodes, answered with tokens that stop nothing."""

    def __init__(self, rows: int, depth: int, spread: int = BLOCK_SIZE) -> None:
        limits = ExecutorLimits(
            num_rows=rows,
            num_blocks=64 * rows,
            slots_per_block=6,
            block_size=BLOCK_SIZE,
            max_model_len=1024,
            max_prefill_tokens=2048,
            max_prefills=64,
            vocab_size=128_000,
            max_logprobs=5,
            model_revision="r1",
        )
        config = EngineConfig(eos_token_ids=(7,), pipeline_depth=depth, spread_steps=1)
        self.core = EngineCore(limits, config)
        self.plans: list[StepPlan] = []
        for index in range(rows):
            prompt = (8 + index, *range(100, 139 + index % spread))
            sampling = SamplingParams(temperature=0.0, max_tokens=900)
            request = EngineRequest(f"request-{index}", 1, prompt, sampling)
            self.core.handle(AddRequest(request), 0.0)
        for _ in range(40):
            self.fill()
            self.collect()
        self.fill(depth - 1)

    def fill(self, most: int = 2) -> None:
        while len(self.plans) < most and (plan := self.plan()) is not None:
            self.plans.append(plan)

    def plan(self) -> StepPlan | None:
        for effect in self.core.handle(PlanStep(), 0.0):
            if isinstance(effect, Submit):
                return effect.plan
        return None

    def result(self) -> StepDone:
        plan = self.plans.pop(0)
        chunks = [chunk.row for chunk in plan.prefills if chunk.samples]
        rows = np.concatenate([plan.decode_rows, np.asarray(chunks, np.int32)])
        tokens = np.full((len(rows), 1 if len(rows) else 0), 1000 + plan.step_id, np.int32)
        return StepDone(StepResult(plan.step_id, rows, tokens))

    def collect(self) -> None:
        self.core.handle(self.result(), 0.0)


def calls_of(action) -> int:
    """Calls of Python functions that an action makes."""
    count = 0

    def on_event(_frame, event, _argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(on_event)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_a_steady_plan_names_its_rows_and_nothing_else():
    steady = Steady(rows=32, depth=2, spread=1)
    plans = []
    for _ in range(BLOCK_SIZE):
        plan = steady.plan()
        assert plan is not None
        plans.append(plan)
        steady.plans.append(plan)
        steady.collect()
    assert all(plan.decode_rows is plans[0].decode_rows for plan in plans)
    assert not any(plan.assignments or plan.prefills or plan.masks for plan in plans)
    # All rows are equally long, so they cross into new blocks in one step of sixteen.
    assert sorted(plan.table.rows.size for plan in plans) == [0] * (BLOCK_SIZE - 1) + [32]


def test_planning_costs_the_same_for_any_number_of_rows():
    counts = {}
    for rows in (8, 256):
        steady = Steady(rows, depth=1, spread=1)
        counts[rows] = []
        for _ in range(BLOCK_SIZE):
            counts[rows].append(calls_of(lambda s=steady: s.fill(1)))
            steady.collect()
    # In some of the sixteen steps groups of rows cross into new blocks.
    quiet = {rows: sorted(values)[: BLOCK_SIZE // 2] for rows, values in counts.items()}
    assert quiet[8] == quiet[256]
    assert max(quiet[256]) < 80


def test_taking_tokens_in_costs_one_call_per_row():
    steady = Steady(rows=256, depth=1, spread=1)
    counts = []
    for _ in range(BLOCK_SIZE):
        steady.fill(1)
        event = steady.result()
        counts.append(calls_of(lambda e=event: steady.core.handle(e, 0.0)))
    assert sorted(counts)[BLOCK_SIZE // 2] < 256 + 40


def _print_times() -> None:
    for depth in (1, 2):
        steady = Steady(256, depth)
        plan_s, result_s = [], []
        for _ in range(300):
            start = time.thread_time()
            steady.fill(depth)
            plan_s.append(time.thread_time() - start)
            event = steady.result()
            start = time.thread_time()
            steady.core.handle(event, 0.0)
            result_s.append(time.thread_time() - start)
        both = [1e3 * (a + b) for a, b in zip(plan_s, result_s, strict=True)]
        print(
            f"pipeline_depth {depth}, 256 rows, CPU ms per step: "
            f"plan {1e3 * statistics.median(plan_s):.3f}, "
            f"result {1e3 * statistics.median(result_s):.3f}, "
            f"both {statistics.median(both):.3f}, p90 {statistics.quantiles(both, n=10)[-1]:.3f}"
        )


if __name__ == "__main__":
    _print_times()
