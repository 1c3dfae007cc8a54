"""A client in virtual time: it submits, may cancel, lose its stream and resume, and checks all.

Every token it sees is judged at once.
"""

import enum
from dataclasses import dataclass
from functools import partial

from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    ClientSubmit,
    Deliver,
    Refuse,
    StreamBroken,
    StreamEnded,
    StreamOpened,
)
from serving.cluster.generation import Delta, GenerationRequest
from serving.engine.request import FinishReason
from serving.errors import QueueFullError, StreamReplacedError, UnknownRequestError
from serving.sim.faults.oracle import Oracle
from serving.sim.gateway_node import ClientEffect, GatewayNode
from serving.sim.world import World


class Act(enum.Enum):
    """What a client does besides waiting."""

    CANCEL = "cancel"
    BREAK = "break"  # the connection breaks and the client stays away
    RESUME = "resume"  # from the first token it does not have
    REWIND = "rewind"  # it lost some of what it had and resumes from there


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client's request and its acts: (seconds after it was accepted, what)."""

    submit_at: float
    request: GenerationRequest
    acts: tuple[tuple[float, Act], ...] = ()


class Client:
    """Runs one ClientPlan against the gateway."""

    def __init__(
        self,
        world: World,
        gateway: GatewayNode,
        plan: ClientPlan,
        oracle: Oracle,
    ) -> None:
        self.plan = plan
        self.finish: FinishReason | None = None
        self.accepted_at: float | None = None
        self.received: list[int] = []
        self.attempt = 0  # the newest that it heard of
        self._world = world
        self._gateway = gateway
        self._oracle = oracle
        self._stream = 0
        self._cancelled = False
        self._away = False  # its stream broke and it has not resumed
        self._stayed_away = 0.0  # the longest time it was away
        self._left_at = 0.0
        self._earlier_finish: FinishReason | None = None  # heard before a rewind
        world.time.at(plan.submit_at, self._submit)

    @property
    def name(self) -> str:
        """Its request's id."""
        return self.plan.request.request_id

    @property
    def satisfied(self) -> bool:
        """It heard of its request's end, or went away and did not come back."""
        return self.finish is not None or self._away

    def _submit(self) -> None:
        self._stream = self._world.number()
        self._gateway.client_event(ClientSubmit(self._stream, self.plan.request), self._answer)

    def _answer(self, effect: ClientEffect) -> None:
        match effect:
            case StreamOpened(stream):
                if self.accepted_at is None:
                    self.accepted_at = self._world.now
                    for delay, act in self.plan.acts:
                        self._world.time.after(delay, partial(self._do, act))
                self._require(stream == self._stream, "a stream was opened that nobody asked for")
            case Deliver(stream, delta):
                if stream == self._stream and not self._away:
                    self._take(delta)
            case StreamEnded(stream, error):
                if stream != self._stream:
                    self._require(isinstance(error, StreamReplacedError), "an old stream ended")
                elif not self._away:
                    self._require(self.finish is not None, "the stream ended before the request")
            case Refuse(_, QueueFullError() as error) if self.accepted_at is None:
                self._world.time.after(error.retry_after_s, self._submit)
            case Refuse(_, UnknownRequestError()):
                # It was away for so long that the request ended and was forgotten.
                ended = self._earlier_finish is not None or self._cancelled
                self._require(ended or self._away or self._lease_ran_out(), "it was forgotten")
                self.finish = self._earlier_finish or FinishReason.CANCELLED
            case Refuse(_, refused):
                self._require(False, f"it was refused: {refused}")

    def _do(self, act: Act) -> None:
        if self.finish is not None and act is not Act.REWIND:
            return
        match act:
            case Act.CANCEL:
                self._cancelled = True
                cancel = ClientCancel(self._world.number(), self.name)
                self._gateway.client_event(cancel, self._answer)
            case Act.BREAK:
                self._away = True
                self._left_at = self._world.now
                self._gateway.handle(StreamBroken(self._stream))
                if self.plan.request.resume_lease_s == 0:
                    self._cancelled = True
                    self.finish = FinishReason.CANCELLED
            case Act.RESUME | Act.REWIND:
                if act is Act.REWIND:
                    del self.received[len(self.received) // 2 :]
                    self._earlier_finish, self.finish = self.finish, None
                if self._away:
                    self._stayed_away = max(self._stayed_away, self._world.now - self._left_at)
                self._away = False
                self._stream = self._world.number()
                resume = ClientResume(self._stream, self.name, len(self.received))
                self._gateway.client_event(resume, self._answer)

    def _take(self, delta: Delta) -> None:
        """Invariants 1 and 2: each token once, in order, and the one an undisturbed run gives."""
        self._require(self.finish is None, "something came after the end")
        have = len(self.received)
        self._require(
            delta.start_index == have,
            f"token {have} is next, but the delta starts at {delta.start_index}",
        )
        request = self.plan.request
        wants_logprobs = request.sampling.logprobs is not None
        self._require(
            len(delta.logprobs) == (len(delta.tokens) if wants_logprobs else 0),
            f"{len(delta.logprobs)} logprobs came for {len(delta.tokens)} tokens",
        )
        for place, token in enumerate(delta.tokens):
            self._require(self._natural_end() is None, "tokens came after the last one")
            self.received.append(token)
            logprobs = delta.logprobs[place] if wants_logprobs else None
            explained = self._oracle.explains(
                request.prompt, self.received, have + place, request.sampling, logprobs
            )
            self._require(explained, f"token {have + place} does not follow from those before it")
        self.attempt = delta.attempt
        if delta.finish is not None:
            self.finish = delta.finish
            self._check_end(delta)

    def _natural_end(self) -> FinishReason | None:
        request = self.plan.request
        return self._oracle.end(request.prompt, self.received, request.sampling)

    def _check_end(self, delta: Delta) -> None:
        """Invariant 5: the end is one that the request may have."""
        request = self.plan.request
        match delta.finish:
            case FinishReason.STOP | FinishReason.LENGTH:
                self._require(
                    delta.finish is self._natural_end(), f"it ended with {delta.finish} too early"
                )
                reference = self._oracle.reference(request.prompt, request.sampling)
                self._require(
                    reference is None or tuple(self.received) == reference,
                    f"its tokens are {self.received}, an undisturbed run has {reference}",
                )
            case FinishReason.CANCELLED:
                self._require(self._cancelled or self._lease_ran_out(), "nobody cancelled it")
            case FinishReason.DEADLINE:
                assert self.accepted_at is not None
                passed = (
                    request.deadline_s is not None
                    and self._world.now >= self.accepted_at + request.deadline_s
                )
                self._require(passed, "its deadline had not passed")
            case _:
                self._require(False, f"it failed: {delta.detail}")

    def _lease_ran_out(self) -> bool:
        return self._stayed_away >= self.plan.request.resume_lease_s > 0

    def _require(self, holds: bool, rule: str) -> None:
        self._world.require(holds, f"request {self.name}: {rule}")
