"""What the gateway offers to its clients' servicers (gRPC and HTTP), whoever implements it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from serving.cluster.messages import WorkerHello
from serving.engine.request import FinishReason, Priority, SamplingParams, TokenLogprobs
from serving.policy.snapshot import FleetSnapshot


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request in tokens.

    stop: stop strings; the text layer matches them, the durable state carries them so that a
        resumed stream stops at the same place.
    resume_lease_s: how long the request lives on without a client stream; 0 aborts it the
        moment its stream breaks, which frees its memory within one step.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    priority: Priority = Priority.HIGH
    deadline_s: float | None = None  # from now
    resume_lease_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens for the client; the last delta of a stream has `finish` set.

    tokens[j] is generated token number start_index + j. Each index is delivered once, in order.
    attempt: the placement that produced the newest of these tokens, or the end.
    """

    start_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    detail: str = ""
    cached_tokens: int = 0
    attempt: int = 0


class TokenStream(Protocol):
    """One client's view of a request.

    Iterate for deltas. `aclose()` before the end means the client went away: the request is
    aborted, or kept for its resume lease. FAILED ends are delivered as a delta, not raised.
    """

    request: GenerationRequest

    def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas until one has `finish`. Raises StreamReplacedError if a newer one took over."""
        ...

    async def aclose(self) -> None:
        """Let go of the stream; safe to call twice and after the end."""
        ...


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """What the gateway knows of itself and its workers. `ready`: a healthy replica is connected."""

    gateway_id: str
    ready: bool
    draining: bool
    queued: int
    running: int
    max_queued_requests: int
    workers: tuple[WorkerHello, ...]
    fleet: FleetSnapshot


class Gateway(Protocol):
    """The gateway's shell as servicers see it. All on one event loop."""

    async def submit(self, request: GenerationRequest) -> TokenStream:
        """Accept a request.

        Raises QueueFullError, DrainingError, RequestExistsError, or InvalidRequestError if no
        replica could ever hold it.
        """
        ...

    async def resume(self, request_id: str, from_index: int) -> TokenStream:
        """Attach to a request again, from token `from_index` on; an older stream is cut off.

        Raises UnknownRequestError (never known, or its lease ran out) or InvalidRequestError.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """Cancel. Raises UnknownRequestError."""
        ...

    async def drain(self) -> None:
        """Refuse new requests and return when none is left."""
        ...

    def info(self) -> GatewayInfo:
        """The current state."""
        ...
