"""Events into and effects out of the gateway core, and its settings.

The core is `serving.cluster.gateway_core.GatewayCore(config: GatewayConfig)` with

    handle(event: GatewayEvent, now: float) -> list[GatewayEffect]
    next_due() -> float | None        when a GatewayTick is due, on the clock of `now`
    info() -> GatewayInfo
    decisions() -> tuple[DispatchRecord, ...]      the last placements, for /debug/decisions

Effects are carried out in order. `now` never goes back.

The shell that runs the core numbers client streams, calls and worker links. Each number is used
once and numbers grow; a broken link that is built again is a new link.
"""

from dataclasses import dataclass

from lumen.errors import LumenError
from serving.cluster.generation import Delta, GenerationRequest
from serving.cluster.messages import ToGateway, ToWorker


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of one gateway. Times in seconds.

    gateway_id: new at each start of the process: workers keep what they run per gateway.
    max_queued_requests: accepted requests that may wait for their first token. A request counts
        from acceptance until its first token arrives or it ends; one that had a token and moved
        to another worker never counts again.
    accept_timeout_s: a submit is repeated when its worker has not accepted it by then.
    progress_timeout_s: output is asked for again when a placed request was silent that long.
    gap_retry_s: the same, while tokens are known to be missing.
    abort_retry_s: an abort is repeated until the attempt's end is known.
    reconnect_grace_s: a lost worker that comes back within it (same incarnation) keeps its
        requests; afterwards they are placed elsewhere.
    worker_silent_s: a connected worker that says nothing for so long counts as lost.
    unplaced_timeout_s: a request that no replica could be found for fails after waiting so long.
    max_fruitless_attempts: a request fails after so many attempts in a row that were lost or
        failed without giving a single new token.
    remember_finished_s: ended requests can be resumed for their lease, but at least this long.
    worker_lease_s: how long workers keep the requests of a silent gateway; never shorter than
        the workers' own `gateway_lease_s`.
    """

    gateway_id: str
    max_queued_requests: int = 1024
    accept_timeout_s: float = 1.0
    progress_timeout_s: float = 5.0
    gap_retry_s: float = 0.25
    abort_retry_s: float = 0.5
    heartbeat_interval_s: float = 1.0
    reconnect_grace_s: float = 0.5
    worker_silent_s: float = 10.0
    unplaced_timeout_s: float = 60.0
    max_fruitless_attempts: int = 5
    remember_finished_s: float = 10.0
    worker_lease_s: float = 60.0
    decisions_kept: int = 256


# Events.


@dataclass(frozen=True, slots=True)
class ClientSubmit:
    """A client asks for a generation. Answered at once by StreamOpened or Refuse."""

    stream: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class ClientResume:
    """A client attaches from token `from_index` on. Answered by StreamOpened or Refuse."""

    stream: int
    request_id: str
    from_index: int


@dataclass(frozen=True, slots=True)
class ClientCancel:
    """A client cancels by id. Refused with UnknownRequestError, else without answer: the
    request's stream, if any, gets its end. Cancelling an ended request does nothing.

    `call` comes back in Refuse; it is numbered like a stream.
    """

    call: int
    request_id: str


@dataclass(frozen=True, slots=True)
class StreamBroken:
    """The client of this stream went away. Unknown, ended and cut-off streams are ignored."""

    stream: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Refuse new requests from now on; Drained follows when none is left (again per event)."""


@dataclass(frozen=True, slots=True)
class WorkerConnected:
    """A link to a worker is up. Which worker it is, its WorkerHello says."""

    link: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A link is down. Nothing more comes from it."""

    link: int


@dataclass(frozen=True, slots=True)
class WorkerMessage:
    """A message arrived over a link."""

    link: int
    message: ToGateway


@dataclass(frozen=True, slots=True)
class GatewayTick:
    """Time has passed. Due no later than `GatewayCore.next_due()`; earlier ones do no harm."""


GatewayEvent = (
    ClientSubmit
    | ClientResume
    | ClientCancel
    | StreamBroken
    | Drain
    | WorkerConnected
    | WorkerLost
    | WorkerMessage
    | GatewayTick
)


# Effects.


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The submit or resume was taken; deltas for this stream follow."""

    stream: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class Refuse:
    """The submit, resume or cancel was refused; `stream` is its stream or call number."""

    stream: int
    error: LumenError


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand this delta to the stream's client."""

    stream: int
    delta: Delta


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing more comes for this stream: after the delta that has `finish` (error is None), or
    because a later resume took over (error is StreamReplacedError).
    """

    stream: int
    error: LumenError | None = None


@dataclass(frozen=True, slots=True)
class SendToWorker:
    """Send a message over a link; if it is down the message is dropped."""

    link: int
    message: ToWorker


@dataclass(frozen=True, slots=True)
class Drained:
    """The gateway drains and no request is left."""


GatewayEffect = StreamOpened | Refuse | Deliver | StreamEnded | SendToWorker | Drained
