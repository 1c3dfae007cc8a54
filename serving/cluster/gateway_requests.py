"""What the gateway keeps of one request: its durable state, its placement and its client."""

import enum
from dataclasses import dataclass, field

from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.generation import Delta, GenerationRequest
from serving.engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from serving.errors import InternalError


class Phase(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"  # for a replica
    PLACED = "placed"  # on a replica, as its newest attempt
    ENDED = "ended"  # remembered until nobody may resume it any more


_ALLOWED = {
    Phase.WAITING: (Phase.PLACED, Phase.ENDED),
    Phase.PLACED: (Phase.WAITING, Phase.ENDED),
    Phase.ENDED: (),
}


@dataclass(slots=True)
class Placement:
    """The newest attempt: where it is, what it started from and what was heard of it.

    emitted: tokens it got as context. asked_at: when its submit or a fetch was last sent.
    gap: a token between those known and one that arrived is missing.
    """

    worker_id: str
    incarnation: str
    replica: int
    attempt: int
    emitted: tuple[int, ...]
    heard_at: float
    asked_at: float
    accepted: bool = False
    gap: bool = False

    def ask_due(self, config: GatewayConfig) -> float:
        """When to send the submit again, or to ask for output."""
        if not self.accepted:
            return self.asked_at + config.accept_timeout_s
        if self.gap:
            return self.asked_at + config.gap_retry_s
        return max(self.asked_at, self.heard_at) + config.progress_timeout_s


@dataclass(slots=True)
class RequestRecord:
    """One accepted request.

    tokens: all generated so far; their number is the next index. logprobs: as long, or empty.
    attempt: the newest attempt's number, 0 before the first. order: of acceptance.
    not_before: no placement before then. refusals: workers in a row that did not take it.
    fruitless: attempts in a row without a new token.
    stream: the client's, None while nobody listens. lease_until: when a request without a
    stream is given up, or an ended one forgotten.
    """

    request: GenerationRequest
    order: int
    deadline: float | None
    waiting_since: float
    stream: int | None = None
    not_before: float = 0.0
    phase: Phase = Phase.WAITING
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    attempt: int = 0
    placement: Placement | None = None
    fruitless: int = 0
    refusals: int = 0
    lease_until: float | None = None
    finish: FinishReason | None = None
    detail: str = ""
    cached_tokens: int = 0

    @property
    def request_id(self) -> str:
        """The client's name for it."""
        return self.request.request_id

    @property
    def queued(self) -> bool:
        """It waits for its first token (GatewayConfig.max_queued_requests)."""
        return not self.tokens and self.phase is not Phase.ENDED

    @property
    def context_tokens(self) -> int:
        """Tokens to prefill if it were placed now."""
        return len(self.request.prompt) + len(self.tokens)

    def move(self, phase: Phase) -> None:
        """Change the phase. Raises InternalError for a change that must not happen."""
        if phase not in _ALLOWED[self.phase]:
            raise InternalError(
                f"Request {self.request_id} cannot go from {self.phase.value} to {phase.value}."
            )
        self.phase = phase

    def next_attempt(self, worker_id: str, incarnation: str, replica: int, now: float) -> Placement:
        """Place it: a new attempt from everything generated so far."""
        self.move(Phase.PLACED)
        self.attempt += 1
        placement = Placement(
            worker_id, incarnation, replica, self.attempt, tuple(self.tokens), now, now
        )
        self.placement = placement
        return placement

    def engine_request(self, placement: Placement) -> EngineRequest:
        """The attempt as its worker gets it."""
        return EngineRequest(
            request_id=self.request.request_id,
            attempt=placement.attempt,
            prompt=self.request.prompt,
            sampling=self.request.sampling,
            emitted=placement.emitted,
            priority=self.request.priority,
            deadline=self.deadline,
        )

    def append(self, output: RequestOutput) -> bool:
        """Take the tokens of `output` that are new; False if some before them are missing."""
        skip = len(self.tokens) - output.start_index
        if skip < 0:
            return False
        self.tokens.extend(output.tokens[skip:] if skip else output.tokens)
        if output.logprobs:
            self.logprobs.extend(output.logprobs[skip:])
        if output.cached_tokens > self.cached_tokens:
            self.cached_tokens = output.cached_tokens
        return True

    def delta_from(self, index: int) -> Delta:
        """Everything from token `index` on, and the end if it ended."""
        return Delta(
            start_index=index,
            tokens=tuple(self.tokens[index:]),
            logprobs=tuple(self.logprobs[index:]) if self.logprobs else (),
            finish=self.finish,
            detail=self.detail,
            cached_tokens=self.cached_tokens,
            attempt=self.attempt,
        )

    def next_due(self, config: GatewayConfig, now: float) -> float:
        """When something is to be done for it even if nothing happens."""
        if self.phase is Phase.ENDED:
            assert self.lease_until is not None
            return self.lease_until
        due = [time for time in (self.lease_until, self.deadline) if time is not None]
        if self.placement is not None:
            due.append(self.placement.ask_due(config))
        else:
            due.append(self.waiting_since + config.unplaced_timeout_s)
            if self.not_before > now:
                due.append(self.not_before)
        return min(due)
