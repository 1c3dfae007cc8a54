"""The clients of a fleet run: they send a workload's requests when they are due and take the time.

Prompts are made when they are sent, of tokens that mean nothing: a piece of a prefix is told by its
number, the rest by the request's, so that the prefix cache finds what is shared and no more.
"""

from functools import partial

from serving.cluster.gateway_events import ClientSubmit, Deliver, Refuse
from serving.cluster.generation import GenerationRequest
from serving.engine.request import SamplingParams
from serving.errors import QueueFullError
from serving.sim.fleet.records import RequestTimes
from serving.sim.gateway_node import ClientEffect, GatewayNode
from serving.sim.workload.requests import Workload, WorkloadRequest
from serving.sim.world import World

_DIGITS = 16  # bits of a number in one token
_FILLER = 1


class FleetClients:
    """One client per request. `done`: all have ended."""

    def __init__(
        self, world: World, gateway: GatewayNode, workload: Workload, times: RequestTimes
    ) -> None:
        self._world = world
        self._gateway = gateway
        self._workload = workload
        self._times = times
        self._left = len(workload.requests)
        self._next = 0

    @property
    def done(self) -> bool:
        """Every request has ended."""
        return not self._left

    def start(self, at: float) -> None:
        """The workload begins at that time."""
        self._begins = at
        self._await_next()

    def _await_next(self) -> None:
        if self._next < len(self._workload.requests):
            due = self._begins + self._workload.requests[self._next].at_s
            self._world.time.at(due, self._arrive)

    def _arrive(self) -> None:
        index = self._next
        self._next += 1
        self._times.arrived[index] = self._world.now
        self._submit(index)
        self._await_next()

    def _submit(self, index: int) -> None:
        asked = self._workload.requests[index]
        request = GenerationRequest(
            request_id=str(index),
            prompt=prompt_of(index, asked, self._workload.prefix_tokens),
            sampling=SamplingParams(temperature=0.0, max_tokens=asked.output, ignore_eos=True),
            priority=asked.service.priority,
        )
        event = ClientSubmit(self._world.number(), request)
        self._gateway.client_event(event, partial(self._answer, index))

    def _answer(self, index: int, effect: ClientEffect) -> None:
        times, now = self._times, self._world.now
        if isinstance(effect, Deliver):
            delta = effect.delta
            if not times.tokens[index] and delta.tokens:
                times.first[index] = now
            times.tokens[index] += len(delta.tokens)
            times.cached[index] = delta.cached_tokens
            if delta.finish is not None:
                times.finished[index] = now
                times.ended(delta.finish)
                self._left -= 1
        elif isinstance(effect, Refuse):
            times.refused += 1
            if isinstance(effect.error, QueueFullError):
                again = partial(self._submit, index)
                self._world.time.after(effect.error.retry_after_s, again)
            else:
                self._left -= 1


def prompt_of(index: int, asked: WorkloadRequest, prefix_tokens: int) -> tuple[int, ...]:
    """The tokens of a prompt: those of its prefix, and behind them its own."""
    tokens: list[int] = []
    for piece in asked.prefix:
        tokens += _numbered(2, piece, prefix_tokens)
    own = asked.prompt - len(tokens)
    tokens += _numbered(3, index, own)
    return tuple(tokens[: asked.prompt])


def _numbered(kind: int, number: int, length: int) -> list[int]:
    """At least so many tokens that begin with the digits of a number, least first."""
    digits = [kind]
    while number:
        digits.append(number & ((1 << _DIGITS) - 1))
        number >>= _DIGITS
    return digits + [_FILLER] * (length - len(digits)) if length > 0 else []
