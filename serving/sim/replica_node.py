"""One replica in virtual time: the real engine core on a modelled executor."""

from collections import deque
from collections.abc import Callable

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import (
    AddRequest,
    CancelRequest,
    EngineEvent,
    Fail,
    Interrupt,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepPlan
from serving.engine.request import RequestOutput
from serving.policy.snapshot import ReplicaLoad
from serving.sim.executor import SimExecutor
from serving.sim.world import World


class ReplicaNode:
    """The shell of an engine: it submits plans and brings results back when they are due.

    stepped(outputs, load) and failed(reason) are what a replica's thread tells its worker.
    """

    def __init__(
        self,
        world: World,
        name: str,
        executor: SimExecutor,
        config: EngineConfig,
        *,
        stepped: Callable[[tuple[RequestOutput, ...], ReplicaLoad], None],
        failed: Callable[[str], None],
    ) -> None:
        self.name = name
        self.core = EngineCore(executor.limits, config)
        self.executor = executor
        self.destroyed = False
        self._world = world
        self._stepped = stepped
        self._failed = failed
        self._submitted: deque[StepPlan] = deque()
        self._started_at = 0.0  # of the oldest submitted plan
        self._completions = 0  # makes outdated completions recognisable

    @property
    def limits(self) -> ExecutorLimits:
        """What its executor can do."""
        return self.executor.limits

    def post(self, event: AddRequest | CancelRequest) -> None:
        """An event for the engine's mailbox, which is emptied at once."""
        if not self.destroyed:
            self._handle(event)
            self._plan()

    def break_down(self, reason: str) -> None:
        """The device fails; the engine learns it from the next result."""
        self.executor.fail(reason)

    def _plan(self) -> None:
        before = -1
        while before != len(self._submitted):
            before = len(self._submitted)
            self._handle(PlanStep())

    def _handle(self, event: EngineEvent) -> None:
        world = self._world
        world.note(self.name, event)
        outputs: list[RequestOutput] = []
        reason: str | None = None
        for effect in self.core.handle(event, world.now):
            match effect:
                case Submit(plan):
                    self.executor.submit(plan)
                    self._submitted.append(plan)
                    if len(self._submitted) == 1:
                        self._start_oldest()
                case Publish(published):
                    outputs.extend(published)
                case Interrupt():
                    self._interrupt()
                case Fail(why, _):
                    reason = why
        self.core.check_invariants()
        violations = self.executor.violations
        world.require(not violations, f"{self.name}: {violations[:1]}")
        if outputs or isinstance(event, StepDone):
            self._stepped(tuple(outputs), self.core.load())
        if reason is not None:
            self._failed(reason)

    def _start_oldest(self) -> None:
        self._started_at = self._world.now
        self._complete_after(self.executor.predicted_duration(self._submitted[0]))

    def _complete_after(self, duration_s: float) -> None:
        self._completions += 1
        number = self._completions
        due = self._started_at + duration_s
        self._world.time.at(due, lambda: self._complete(number))

    def _complete(self, number: int) -> None:
        if self.destroyed or number != self._completions:
            return
        self._submitted.popleft()
        result = self.executor.collect()
        if self._submitted:
            self._start_oldest()
        self._handle(StepDone(result))
        self._plan()

    def _interrupt(self) -> None:
        """The step in flight of the oldest plan is its last."""
        plan = self._submitted[0]
        for taken in range(plan.steps):
            duration = self.executor.predicted_duration(plan, taken + 1)
            if self._started_at + duration >= self._world.now:
                self.executor.interrupt(taken)
                self._complete_after(duration)
                return
