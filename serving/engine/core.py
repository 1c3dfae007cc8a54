"""The engine of one replica as a synchronous state machine: events in, effects out.

It has no clock, thread or executor. A shell (`loop.py` live, the event heap in virtual time)
tells it what happened and carries out what it answers.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.arrival import end_on_arrival, receive
from serving.engine.batch import Batch
from serving.engine.coasting import Coasting
from serving.engine.config import EngineConfig
from serving.engine.events import (
    AddRequest,
    Coast,
    Coasted,
    EngineEffect,
    EngineEvent,
    Fail,
    Interrupt,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.executor import ExecutorLimits
from serving.engine.memory import KVMemory
from serving.engine.plan import StepResult
from serving.engine.planner import Planner, SubmittedPlan
from serving.engine.request import EngineRequest, FinishReason, RequestOutput
from serving.engine.token_intake import TokenIntake, mismatch
from serving.engine.waiting import WaitingQueues
from serving.errors import InternalError
from serving.kv.blocks import BlockAccounting
from serving.policy.snapshot import ReplicaLoad


class EngineCore:
    """Continuous batching with chunked prefill, classes, preemption and a prefix cache.

    Raises ConfigurationError if the settings do not fit the executor. The stop token that ends a
    request is its last token. After `Fail` the core is dead: it answers every new request with
    another `Fail`.
    """

    def __init__(self, limits: ExecutorLimits, config: EngineConfig) -> None:
        self.limits = limits
        self.config = config
        self._memory = KVMemory(limits, prefix_caching=config.prefix_caching)
        self._batch = Batch(limits, self._memory)
        self._waiting = WaitingQueues()
        self._planner = Planner(limits, config, self._batch, self._waiting, self._memory)
        self._intake = TokenIntake(self._memory, self._remove, config.publish_every)
        self._coasting = Coasting(config, self._batch, self._planner, self._memory, self._intake)
        self._requests: dict[tuple[str, int], ActiveRequest] = {}  # in order of arrival
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, ActiveRequest]] = []  # a heap
        self._in_flight: deque[SubmittedPlan] = deque()
        self._interrupted_step = 0
        self._steps = 0
        self._failure: str | None = None

    def handle(self, event: EngineEvent, now: float) -> Sequence[EngineEffect]:
        """Take in one event; `now` is the shell's clock in seconds, the one of deadlines."""
        if self._failure is not None:
            return self._handle_dead(event)
        outputs: list[RequestOutput] = []
        effects: list[EngineEffect] = []
        if self._deadlines:
            self._expire(now, outputs)
        if isinstance(event, StepDone):
            fail = self._step_done(event.result, outputs)
            if fail is not None:
                effects.append(fail)
        elif isinstance(event, PlanStep):
            self._plan_step(effects)
        elif isinstance(event, AddRequest):
            self._add(event.request, now, outputs)
        elif isinstance(event, Coast):
            self._coast(event, outputs, effects)
        else:
            request = self._requests.get((event.request_id, event.attempt))
            if request is not None:
                self._end(request, FinishReason.CANCELLED, "", outputs)
        if outputs:
            effects.append(Publish(tuple(outputs)))
        if self._should_interrupt():
            effects.append(Interrupt())
        return effects

    def is_idle(self) -> bool:
        """No request is left and no plan is on its way."""
        return not self._requests and not self._in_flight

    def quiet_steps(self) -> int:
        """How many steps `Coast` may take: nothing is decided in them unless an event comes."""
        if self._failure is not None or self._deadlines or not self._in_flight:
            return 0
        return self._coasting.quiet_steps(self._in_flight)

    def oldest_sampling(self) -> list[ActiveRequest]:
        """Whose tokens the oldest plan in flight brings, in order; empty if there is none."""
        return self._in_flight[0].sampling if self._in_flight else []

    def load(self) -> ReplicaLoad:
        """What dispatch needs to know of this replica."""
        books = self._memory.accounting()
        return ReplicaLoad(
            replica=self.config.replica,
            running=self._batch.running,
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens,
            total_blocks=books.total,
            free_blocks=books.free,
            cached_blocks=books.cached,
            block_size=self.limits.block_size,
            steps=self._steps,
            healthy=self._failure is None,
        )

    def state(self, request_id: str, attempt: int) -> RequestState | None:
        """Where one request stands; None if it is not here."""
        request = self._requests.get((request_id, attempt))
        return None if request is None else request.state

    def states(self) -> dict[tuple[str, int], RequestState]:
        """Where every request here stands, by request id and attempt."""
        return {key: request.state for key, request in self._requests.items()}

    def accounting(self) -> BlockAccounting:
        """All blocks by state (invariant 3)."""
        return self._memory.accounting()

    def check_invariants(self) -> None:
        """Recount everything. Raises InternalError at the first contradiction.

        For tests and the simulator, after every event; too slow for serving.
        """
        running = [request for request in self._batch.requests if request is not None]
        self._waiting.check()
        self._batch.check()
        self._memory.check(running)
        known = sorted(request.arrival for request in self._requests.values())
        placed = sorted(request.arrival for request in [*running, *self._waiting])
        if known != placed:
            raise InternalError("A request is neither running nor waiting, or it is both.")
        if len(self._in_flight) > self.config.pipeline_depth:
            raise InternalError("More plans are in flight than the pipeline is deep.")
        if self.is_idle():
            self._memory.check_idle()

    def _add(self, request: EngineRequest, now: float, outputs: list[RequestOutput]) -> None:
        if (request.request_id, request.attempt) in self._requests:
            return  # a repeated message: the attempt is here already
        self._arrivals += 1
        active = receive(request, self._arrivals, self.limits, self.config)
        self._requests[active.key] = active
        self._intake.arrived(active)
        self._waiting.add(active)
        end = end_on_arrival(active, self.limits, now)
        if end is not None:
            self._end(active, *end, outputs)
        elif active.deadline is not None:
            heapq.heappush(self._deadlines, (active.deadline, active.arrival, active))

    def _end(
        self,
        request: ActiveRequest,
        reason: FinishReason,
        detail: str,
        outputs: list[RequestOutput],
    ) -> None:
        """End a request in whatever state it is, with an output that has no new tokens."""
        self._remove(request)
        start, tokens = self._intake.unpublished(request)
        outputs.append(
            RequestOutput(
                request.request_id,
                request.attempt,
                start,
                tokens,
                (),
                reason,
                detail,
                max(request.cached_tokens, 0),
            )
        )

    def _remove(self, request: ActiveRequest) -> None:
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._batch.remove(request)
        request.move(RequestState.ENDED)
        del self._requests[request.key]

    def _expire(self, now: float, outputs: list[RequestOutput]) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            if request.state is not RequestState.ENDED:
                detail = f"The deadline passed after {request.generated} tokens."
                self._end(request, FinishReason.DEADLINE, detail, outputs)

    def _plan_step(self, effects: list[EngineEffect]) -> None:
        if len(self._in_flight) >= self.config.pipeline_depth:
            return
        submitted = self._planner.plan(self._steps + 1)
        if submitted is None:
            if self._requests and not self._in_flight:
                raise InternalError("Requests are left, nothing runs and nothing can be planned.")
            return
        self._steps += 1
        self._in_flight.append(submitted)
        effects.append(Submit(submitted.plan))

    def _step_done(self, result: StepResult, outputs: list[RequestOutput]) -> Fail | None:
        if not self._in_flight:
            raise InternalError(f"Step {result.step_id} came back, but none is in flight.")
        submitted = self._in_flight[0]
        fault = result.error or mismatch(submitted, result)
        if fault is not None:
            return self._fail(fault)
        self._in_flight.popleft()
        for request, computed in submitted.chunks:
            self._intake.computed(request, computed)
        taken = result.tokens.shape[1]
        early = submitted.plan.steps - taken
        if early and submitted.plan.decode_rows.size:
            for request in submitted.sampling:
                if request.state is RequestState.DECODING:
                    self._batch.give_back(request, early)
        if taken == 1:
            outputs.extend(self._intake.tokens(submitted.sampling, result))
        elif taken:
            outputs.extend(self._intake.runs(submitted.sampling, result))
        self._memory.step_collected(submitted.plan.step_id)
        if self.is_idle():
            self._memory.check_idle()
        return None

    def _coast(
        self, event: Coast, outputs: list[RequestOutput], effects: list[EngineEffect]
    ) -> None:
        steps = event.tokens.shape[1]
        quiet = self.quiet_steps()
        if not 0 < steps <= quiet:
            raise InternalError(f"The engine was to coast {steps} steps; it can {quiet}.")
        self._in_flight, published = self._coasting.take(self._in_flight, event.tokens)
        self._steps += steps
        outputs.extend(published)
        effects.append(Coasted(tuple(it.plan for it in self._in_flight)))

    def _should_interrupt(self) -> bool:
        """Something new waits, or for blocks, while the oldest plan takes several steps."""
        if not self._in_flight:
            return False
        plan = self._in_flight[0].plan
        if plan.steps == 1 or plan.step_id == self._interrupted_step:
            return False
        if not len(self._waiting) and not self._memory.any_held():
            return False
        self._interrupted_step = plan.step_id
        return True

    def _fail(self, reason: str) -> Fail:
        """The executor is gone, and with it everything that ran on it."""
        self._failure = reason
        lost = tuple(self._requests)
        for request in list(self._requests.values()):
            self._remove(request)
        while self._in_flight:
            self._memory.step_collected(self._in_flight.popleft().plan.step_id)
        self._deadlines.clear()
        return Fail(reason, lost)

    def _handle_dead(self, event: EngineEvent) -> Sequence[EngineEffect]:
        if isinstance(event, AddRequest) and self._failure is not None:
            request = event.request
            return (Fail(self._failure, ((request.request_id, request.attempt),)),)
        return ()
