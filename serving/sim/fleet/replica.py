"""One replica of a large fleet: the real engine core, its time foretold, its steps in stretches.

A stretch of decode steps in which nothing is decided is one event of the heap and one of the core.
When something comes in between, the core first takes the steps that are over by then; so all times
and states are those of single steps, to the last bit.
"""

from collections.abc import Callable

import numpy as np

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import (
    AddRequest,
    CancelRequest,
    Coast,
    EngineEvent,
    Fail,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.request import RequestOutput
from serving.errors import InternalError
from serving.sim.fleet.records import Float64, GapHistogram
from serving.sim.timed_executor import TimedExecutor
from serving.sim.world import World

_LONGEST_STRETCH = 1024  # steps foretold at once; an arrival may make it in vain


class FleetReplica:
    """The shell of an engine without faults.

    publish: gets what the engine publishes. ended: gets requests some time after their last token.
    gaps: times between tokens go there. stretches: False: every step by itself.
    """

    def __init__(
        self,
        world: World,
        name: str,
        executor: TimedExecutor,
        config: EngineConfig,
        *,
        publish: Callable[[tuple[RequestOutput, ...]], None],
        ended: Callable[[ActiveRequest], None],
        gaps: GapHistogram,
        stretches: bool = True,
    ) -> None:
        self.name = name
        self.core = EngineCore(executor.limits, config)
        self._world = world
        self._executor = executor
        self._publish = publish
        self._ended = ended
        self._gaps = gaps
        self._stretches = stretches
        self._in_flight = 0
        self._started_at = 0.0  # of the oldest plan
        self._due = 0  # number of the completion that counts; older ones are outdated
        self._ends: Float64 | None = None  # of the steps of a stretch, while one lasts
        self._taken = 0  # of those, what the core knows of
        self._sampled: list[ActiveRequest] = []  # by the last step, at `_sampled_at`
        self._sampled_at = 0.0
        self._left_at: dict[ActiveRequest, float] = {}  # those that wait for their next token

    def post(self, event: AddRequest | CancelRequest) -> None:
        """An event for the engine's mailbox, which is emptied at once."""
        self.catch_up()
        self._handle(event)
        idle = not self._in_flight
        self._plan()
        if idle or self._ends is not None:
            self._foretell(stretch=False)

    def catch_up(self) -> None:
        """Have the core know of every step that is over by now."""
        if self._ends is None:
            return
        over = int(np.searchsorted(self._ends[:-1], self._world.now, side="right"))
        if over == self._taken:
            return
        ends = self._ends[self._taken : over]
        sampling = self.core.oldest_sampling()
        self._sample(float(ends[0]), sampling)
        self._gaps.add_all(np.diff(ends), len(sampling))
        self._sampled, self._sampled_at = sampling, float(ends[-1])
        self._handle(Coast(self._executor.coast(over - self._taken)))
        self._taken = over
        self._started_at = float(ends[-1])

    def settle(self) -> None:
        """The run is over: tell of the last requests that ended."""
        self._sample(self._world.now, [])

    def _handle(self, event: EngineEvent) -> bool:
        """Give the core an event and carry out what it answers; whether a plan was submitted."""
        world = self._world
        world.note(self.name, event)
        submitted = False
        for effect in self.core.handle(event, world.now):
            if isinstance(effect, Submit):
                self._executor.submit(effect.plan)
                submitted = True
            elif isinstance(effect, Publish):
                self._publish(effect.outputs)
            elif isinstance(effect, Fail):
                raise InternalError(f"{self.name} failed: {effect.reason}")
        if world.checked:
            self.core.check_invariants()
        return submitted

    def _plan(self) -> None:
        while self._handle(PlanStep()):
            if not self._in_flight:
                self._started_at = self._world.now
            self._in_flight += 1

    def _foretell(self, *, stretch: bool) -> None:
        """When the core has to be told something next, if nothing comes in between."""
        self._due += 1
        self._ends = None
        if not self._in_flight:
            return
        quiet = min(self.core.quiet_steps(), _LONGEST_STRETCH) if stretch else 0
        if quiet > 1:
            durations = self._executor.coming_durations(quiet + 1)
            # Added up one by one, as single steps are.
            ends: Float64 = np.cumsum(np.concatenate([[self._started_at], durations]))[1:]
            self._ends, self._taken = ends, 0
            due = float(ends[-1])
        else:
            due = self._started_at + self._executor.oldest_duration()
        number = self._due
        self._world.time.at(due, lambda: self._complete(number))

    def _complete(self, number: int) -> None:
        if number != self._due:
            return
        self.catch_up()
        self._sample(self._world.now, self.core.oldest_sampling())
        result = self._executor.collect()
        self._in_flight -= 1
        self._started_at = self._world.now
        self._handle(StepDone(result))
        self._plan()
        self._foretell(stretch=self._stretches)

    def _sample(self, at: float, sampling: list[ActiveRequest]) -> None:
        """A step brings these requests a token each."""
        before, before_at = self._sampled, self._sampled_at
        self._sampled, self._sampled_at = sampling, at
        if sampling is before:
            self._gaps.add(at - before_at, len(sampling))
            return
        now, earlier = set(sampling), set(before)
        for request in earlier - now:
            if request.state is RequestState.ENDED:
                self._ended(request)
            else:
                self._left_at[request] = before_at
        fresh = now - earlier
        if len(now) > len(fresh):
            self._gaps.add(at - before_at, len(now) - len(fresh))
        for request in fresh:
            left_at = self._left_at.pop(request, None)
            if left_at is not None:
                self._gaps.add(at - left_at)
