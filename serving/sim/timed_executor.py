"""An executor that knows how long plans take and next to nothing else: fast, for large fleets.

A token is its own position in the request, whatever the request is, so it depends neither on the
batch nor on how steps are put together. Nothing is stored and no stop token is looked at: lengths
are forced. Whether plans are right is for ModelledExecutor to find out.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from serving.engine.executor import ExecutorLimits
from serving.engine.plan import NO_ROWS, Int32, StepPlan, StepResult
from serving.errors import ExecutorError
from serving.sim.cost_model import DecodeTimes, Float64
from serving.sim.plan_work import PlanWork
from serving.sim.profile import Profile


@dataclass(slots=True)
class _InFlight:
    """A submitted plan. tokens: int32 [decode rows], what each draws first. context: KV tokens
    that its first step reads. owners: int64 [decode rows], whose rows they are.
    """

    plan: StepPlan
    tokens: Int32
    context: int
    duration: float
    owners: npt.NDArray[np.int64]


class TimedExecutor:
    """Implements SimExecutor from a profile."""

    def __init__(self, profile: Profile, limits: ExecutorLimits) -> None:
        config = profile.executor.config()
        self.violations: list[str] = []
        self._limits = limits
        self._cost = profile.cost
        self._times = DecodeTimes(profile.cost, config.decode_buckets)
        self._work = PlanWork(config)
        self._kv_len: npt.NDArray[np.int64] = np.zeros(limits.num_rows, np.int64)
        # A number for each assignment: a row that was given away is not whose it was.
        self._owner: npt.NDArray[np.int64] = np.zeros(limits.num_rows, np.int64)
        self._owners = 0
        self._in_flight: deque[_InFlight] = deque()
        self._end_after: int | None = None
        self._failure: str | None = None

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        return self._limits

    def submit(self, plan: StepPlan) -> None:
        """Take a plan."""
        kv_len = self._kv_len
        for assignment in plan.assignments:
            kv_len[assignment.row] = assignment.kv_len
            self._owners += 1
            self._owner[assignment.row] = self._owners
        rows = plan.decode_rows
        lengths = kv_len[rows]
        context = int(lengths.sum())
        tokens = (lengths + 1).astype(np.int32)
        duration = self._seconds(plan, context)
        self._in_flight.append(_InFlight(plan, tokens, context, duration, self._owner[rows]))
        kv_len[rows] += plan.steps
        for chunk in plan.prefills:
            kv_len[chunk.row] += chunk.tokens.size

    def predicted_duration(self, plan: StepPlan, steps: int | None = None) -> float:
        """Seconds that a submitted, not yet collected plan takes on the device.

        steps: decode steps it takes before it ends early; None for all planned. Raises
        ExecutorError if the plan is not in flight.
        """
        for flight in self._in_flight:
            if flight.plan.step_id == plan.step_id:
                if steps is None or steps == plan.steps:
                    return flight.duration
                rows = plan.decode_rows.size
                return float(self._times.series(rows, flight.context, steps).sum())
        raise ExecutorError(f"Step {plan.step_id} is not in flight; submit it first.")

    def collect(self) -> StepResult:
        """What the oldest plan sampled. Raises ExecutorError if there is no plan."""
        if not self._in_flight:
            raise ExecutorError("There is no plan to collect; submit one first.")
        flight = self._in_flight.popleft()
        plan = flight.plan
        if self._failure is not None:
            nothing = np.zeros((0, 0), np.int32)
            return StepResult(plan.step_id, NO_ROWS, nothing, error=self._failure)
        taken = plan.steps
        if self._end_after is not None:
            taken = min(taken, self._end_after)
            self._end_after = None
            self._take_back(flight, plan.steps - taken)
        if plan.steps > 1:
            return StepResult(plan.step_id, plan.decode_rows, _runs(flight.tokens, taken))
        if not plan.prefills:
            return StepResult(plan.step_id, plan.decode_rows, flight.tokens[:, None])
        drawn = [c.start + c.tokens.size for c in plan.prefills if c.samples]
        tokens: Int32 = np.concatenate([flight.tokens, np.array(drawn, np.int32)])
        if not tokens.size:
            return StepResult(plan.step_id, NO_ROWS, np.zeros((0, 0), np.int32))
        return StepResult(plan.step_id, plan.drawing_rows(), tokens[:, None])

    def interrupt(self, steps_taken: int = 0) -> None:
        """End the oldest plan after the step in flight, the one after so many."""
        if self._in_flight:
            self._end_after = steps_taken + 1

    def fail(self, reason: str) -> None:
        """From now on every result is this error, as after a device fault."""
        self._failure = reason

    def oldest_duration(self) -> float:
        """Seconds that the oldest plan takes."""
        return self._in_flight[0].duration

    def coming_durations(self, steps: int) -> Float64:
        """Seconds of the oldest plan's decode step and of those to come, float64 [steps].

        If nothing changes: the same rows decode in every one of them.
        """
        flight = self._in_flight[0]
        return self._times.series(flight.plan.decode_rows.size, flight.context, steps)

    def coast(self, steps: int) -> Int32:
        """Take so many decode steps at once; the plans in flight are then as many steps later.

        Returns their tokens, int32 [rows, steps].
        """
        oldest = self._in_flight[0]
        rows = oldest.plan.decode_rows
        tokens = _runs(oldest.tokens, steps)
        self._kv_len[rows] += steps
        for flight in self._in_flight:
            flight.plan = replace(flight.plan, step_id=flight.plan.step_id + steps)
            flight.tokens += np.int32(steps)
            flight.context += steps * rows.size
            flight.duration = self._times.step(rows.size, flight.context)
        return tokens

    def _seconds(self, plan: StepPlan, context: int) -> float:
        if plan.prefills:
            return self._cost.seconds(self._work(plan, context))
        rows = plan.decode_rows.size
        if plan.steps == 1:
            return self._times.step(rows, context)
        return float(self._times.series(rows, context, plan.steps).sum())

    def _take_back(self, ended: _InFlight, steps: int) -> None:
        """A plan ended so many steps early: what comes later of its rows comes earlier."""
        rows = ended.plan.decode_rows
        theirs = rows[self._owner[rows] == ended.owners]
        self._kv_len[theirs] -= steps
        for flight in self._in_flight:
            shorter = np.isin(flight.plan.decode_rows, theirs)
            flight.tokens[shorter] -= np.int32(steps)
            flight.context -= steps * int(shorter.sum())
            flight.duration = self._seconds(flight.plan, flight.context)


def _runs(first: Int32, count: int) -> Int32:
    """Consecutive tokens from each first one on, int32 [rows, count]."""
    runs: Int32 = np.add(first[:, None], np.arange(count, dtype=np.int32))
    return runs
