"""Where the time of each step goes on the thread that runs the engine's loop."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serving.engine.executor import Executor, ExecutorLimits
from serving.engine.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step, seen from the loop when its result came.

    decode_rows, prefill_tokens: what the step computed. at_s: when `collect` returned, on
    `time.perf_counter`. submit_s, collect_s: spent since the step before in dispatching plans and
    in waiting for results. cpu_s: processor time of the loop's thread so far.
    """

    decode_rows: int
    prefill_tokens: int
    at_s: float
    submit_s: float
    collect_s: float
    cpu_s: float


class StepClock:
    """An executor that notes the time of every step of the one it stands for.

    watch: called with each step, on the loop's thread; None: nobody.
    """

    def __init__(self, executor: Executor) -> None:
        self.steps: list[StepTime] = []
        self.watch: Callable[[StepTime], None] | None = None
        self._executor = executor
        self._submitted: deque[tuple[int, int]] = deque()
        self._submit_s = 0.0

    @property
    def limits(self) -> ExecutorLimits:
        """Those of the executor."""
        return self._executor.limits

    def submit(self, plan: StepPlan) -> None:
        """Dispatch the plan."""
        tokens = sum(chunk.tokens.size for chunk in plan.prefills)
        self._submitted.append((plan.decode_rows.size, tokens))
        started = time.perf_counter()
        self._executor.submit(plan)
        self._submit_s += time.perf_counter() - started

    def collect(self) -> StepResult:
        """Wait for the oldest plan."""
        started = time.perf_counter()
        result = self._executor.collect()
        ended = time.perf_counter()
        rows, tokens = self._submitted.popleft()
        waited = ended - started
        step = StepTime(rows, tokens, ended, self._submit_s, waited, time.thread_time())
        self._submit_s = 0.0
        self.steps.append(step)
        if self.watch is not None:
            self.watch(step)
        return result

    def interrupt(self) -> None:
        """End a multi-step plan."""
        self._executor.interrupt()


@dataclass(frozen=True, slots=True)
class SteadyStep:
    """Milliseconds of a decode step of a whole batch, among others like it.

    step: from result to result, median. dispatch: in the executor's `submit`. planning: everything
    else but waiting for the device: taking in results, publishing, planning. cpu: processor time
    of the thread, mean (its clock may be coarse).
    """

    step: float
    dispatch: float
    planning: float
    cpu: float

    @property
    def interpreter(self) -> float:
        """What the loop does itself in a step."""
        return self.dispatch + self.planning


_FEWEST_STEADY = 3


def steady_step(steps: Sequence[StepTime], rows: int) -> SteadyStep | None:
    """The typical step among those that decode `rows` rows, as the step before did, and nothing
    else; None if there are too few."""
    pairs = [
        (before, step) for before, step in itertools.pairwise(steps)
        if before.decode_rows == step.decode_rows == rows
        and not before.prefill_tokens and not step.prefill_tokens
    ]  # fmt: skip
    if len(pairs) < _FEWEST_STEADY:
        return None
    periods = np.array([step.at_s - before.at_s for before, step in pairs])
    submits = np.array([step.submit_s for _, step in pairs])
    waits = np.array([step.collect_s for _, step in pairs])
    cpu = np.mean([step.cpu_s - before.cpu_s for before, step in pairs])
    return SteadyStep(
        step=1e3 * float(np.median(periods)),
        dispatch=1e3 * float(np.median(submits)),
        planning=1e3 * float(np.median(periods - submits - waits)),
        cpu=1e3 * float(cpu),
    )
