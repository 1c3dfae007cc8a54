"""The same arrivals under other engine settings: a recorded engine's requests in virtual time.

The log gives when requests came and were cancelled, how many tokens each made, and how long the
device took for its plans; a cost model is fitted to the latter. Tokens are made up, so lengths are
forced to what was made live.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from serving.engine.config import EngineConfig
from serving.engine.events import AddRequest, CancelRequest, Publish, StepDone, Submit
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import StepPlan
from serving.engine.request import EngineRequest, FinishReason, RequestOutput
from serving.errors import ConfigurationError, ExecutorError
from serving.incident.cores import EngineParts
from serving.incident.log_file import Entry
from serving.incident.replay import replay
from serving.policy.snapshot import ReplicaLoad
from serving.sim.cost_fit import non_negative_least_squares
from serving.sim.modelled_executor import ModelledExecutor, StepCost
from serving.sim.replica_node import ReplicaNode
from serving.sim.world import World

type Key = tuple[str, int]

_SPELLED = {bool: "true or false", int: "a whole number", float: "a number"}
_OWN_END = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)
class Timings:
    """What clients of one engine saw. Seconds.

    ttft_s: of each request that got a token. itl_s: from one output to the next, per token of it.
    placed: rows given to requests; each beyond the first of a request is a preemption. ended:
    requests by the word for their end. last_s: when the last output came.
    """

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    placed: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    last_s: float = 0.0
    made: dict[Key, int] = field(default_factory=dict)  # tokens of each, over all attempts
    finish: dict[Key, FinishReason] = field(default_factory=dict)
    _newest: dict[Key, float] = field(default_factory=dict)
    _started: set[Key] = field(default_factory=set)

    def arrived(self, request: EngineRequest, now: float) -> None:
        """A request came in."""
        self._newest[request.request_id, request.attempt] = now

    def published(self, outputs: Sequence[RequestOutput], now: float) -> None:
        """What one step gave."""
        for output in outputs:
            key = (output.request_id, output.attempt)
            if output.tokens:
                waited = now - self._newest[key]
                if key in self._started:
                    self.itl_s.append(waited / len(output.tokens))
                else:
                    self._started.add(key)
                    self.ttft_s.append(waited)
                self._newest[key] = self.last_s = now
                self.made[key] = output.start_index + len(output.tokens)
            if output.finish is not None:
                self.finish[key] = output.finish
                word = output.finish.value
                self.ended[word] = self.ended.get(word, 0) + 1


@dataclass(frozen=True, slots=True)
class EngineRun:
    """What a log says of a live run, times from its first event on. notice: see Replay."""

    parts: EngineParts
    arrivals: tuple[tuple[float, AddRequest | CancelRequest], ...]
    timings: Timings
    cost: StepCost
    notice: str = ""


def read_run(path: Path) -> EngineRun:
    """Take a log apart by replaying it. Raises EventLogError if it is malformed.

    Raises ConfigurationError if it is of another core than an engine, if this code answers
    otherwise than was recorded, or if no step in it ended.
    """
    arrivals: list[tuple[float, AddRequest | CancelRequest]] = []
    timings, steps, first = Timings(), _Steps(), list[float]()

    def see(entry: Entry, answer: Sequence[object] | Exception) -> None:
        if not first:
            first.append(entry.now)
        now, event = entry.now - first[0], entry.event
        if isinstance(event, AddRequest):
            arrivals.append((now, _shifted(event, first[0])))
            timings.arrived(event.request, now)
        elif isinstance(event, CancelRequest):
            arrivals.append((now, event))
        elif isinstance(answer, Exception):
            pass  # the core refused the event
        elif isinstance(event, StepDone) and event.result.error is None:
            steps.done(event.result.tokens.shape[1], now)
        for effect in () if isinstance(answer, Exception) else answer:
            if isinstance(effect, Submit):
                steps.submitted(effect.plan, now)
                timings.placed += len(effect.plan.assignments)
            elif isinstance(effect, Publish):
                timings.published(effect.outputs, now)

    outcome = replay(path, seen=see)
    parts = outcome.header.parts
    if not isinstance(parts, EngineParts):
        raise ConfigurationError(f"--what_if: {path} is of {outcome.header.name}, not an engine.")
    if outcome.difference is not None:
        raise ConfigurationError(f"--what_if: {path} does not replay; see what differs without it.")
    return EngineRun(parts, tuple(arrivals), timings, steps.cost(path), outcome.notice)


def run_again(run: EngineRun, config: EngineConfig) -> Timings:
    """The run's arrivals in virtual time under these settings."""
    world, timings = World(0), Timings()
    executor = _Counting(run.parts.limits, run.cost, timings)

    def stepped(outputs: tuple[RequestOutput, ...], _: ReplicaLoad) -> None:
        timings.published(outputs, world.now)

    def failed(reason: str) -> None:
        raise ExecutorError(reason)

    node = ReplicaNode(world, "replica", executor, config, stepped=stepped, failed=failed)

    def post(event: AddRequest | CancelRequest) -> None:
        if isinstance(event, AddRequest):
            timings.arrived(event.request, world.now)
        node.post(event)

    for time, event in run.arrivals:
        if isinstance(event, AddRequest):
            event = AddRequest(_forced(event.request, run.timings))
        world.time.at(time, lambda event=event: post(event))  # type: ignore[misc]
    while world.time.step():
        pass
    return timings


def changed(config: EngineConfig, settings: Sequence[str]) -> EngineConfig:
    """The settings with these `name=value` in place. Raises ConfigurationError naming the wrong."""
    kinds: dict[str, type] = {
        one.name: type(getattr(config, one.name)) for one in dataclasses.fields(config)
    }
    kinds["max_step_tokens"] = int  # None unless set
    values: dict[str, bool | int | float] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        kind = kinds.get(name)
        try:
            if kind is bool:
                values[name] = {"true": True, "false": False}[text.lower()]
            elif kind is int or kind is float:
                values[name] = kind(text)
            else:
                raise KeyError
        except (KeyError, ValueError) as error:
            able = ", ".join(one for one, kind in kinds.items() if kind in _SPELLED)
            value = f"; the value of {name} is {_SPELLED[kind]}" if kind in _SPELLED else ""
            raise ConfigurationError(
                f"--what_if is {setting!r}; it must be name=value, the name one of {able}{value}."
            ) from error
    return replace(config, **values)  # type: ignore[arg-type]


class _Counting(ModelledExecutor):
    """Counts the rows that are given to requests."""

    def __init__(self, limits: ExecutorLimits, cost: StepCost, timings: Timings) -> None:
        super().__init__(limits, cost)
        self._timings = timings

    def submit(self, plan: StepPlan) -> None:
        self._timings.placed += len(plan.assignments)
        super().submit(plan)


class _Steps:
    """How long plans took, and of how much work."""

    def __init__(self) -> None:
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._kv_len: dict[int, int] = {}
        self._last = 0.0
        self._work: list[tuple[int, int, int]] = []  # steps, tokens, context
        self._seconds: list[float] = []

    def submitted(self, plan: StepPlan, now: float) -> None:
        self._in_flight.append((plan, now))

    def done(self, taken: int, now: float) -> None:
        plan, submitted = self._in_flight.popleft()
        for assignment in plan.assignments:
            self._kv_len[assignment.row] = assignment.kv_len
        context = tokens = 0
        steps = max(taken, 1)
        for chunk in plan.prefills:
            context += self._kv_len[chunk.row]
            tokens += chunk.tokens.size
            self._kv_len[chunk.row] += chunk.tokens.size
        for row in plan.decode_rows.tolist():
            context += steps * self._kv_len[row] + steps * (steps - 1) // 2
            tokens += steps
            self._kv_len[row] += steps
        self._work.append((steps, tokens, context))
        self._seconds.append(now - max(submitted, self._last))
        self._last = now

    def cost(self, path: Path) -> StepCost:
        """The least squares of it, no part of it negative."""
        if not self._seconds:
            raise ConfigurationError(f"--what_if: no step ended in {path}.")
        work, seconds = np.array(self._work, np.float64), np.array(self._seconds)
        return StepCost(*non_negative_least_squares(work, seconds).tolist())


def _shifted(event: AddRequest, first: float) -> AddRequest:
    deadline = event.request.deadline
    if deadline is None:
        return event
    return AddRequest(replace(event.request, deadline=deadline - first))


def _forced(request: EngineRequest, live: Timings) -> EngineRequest:
    """The request as one that makes as many tokens as it made live, if it came to its own end."""
    key = (request.request_id, request.attempt)
    most = request.sampling.max_tokens
    if live.finish.get(key) in _OWN_END:
        most = live.made[key]
    sampling = replace(
        request.sampling, max_tokens=most, min_tokens=0, stop_token_ids=(), ignore_eos=True,
        logprobs=None,
    )  # fmt: skip
    return replace(request, sampling=sampling)
