"""Events into and effects out of the worker core, and its settings.

The core is `serving.cluster.worker_core.WorkerCore(config: WorkerConfig)` with

    handle(event: WorkerEvent, now: float) -> list[WorkerEffect]
    next_due() -> float | None        when a WorkerTick is due, on the clock of `now`

Effects are carried out in order. `now` never goes back. Engines are not in this core: the shell
runs one EngineCore per replica (a thread with a mailbox each), turns PostToReplica into their
events and their effects into ReplicaPublished, ReplicaFailed and ReplicaLoaded.

The shell numbers links to gateways; each number is used once and numbers grow.
"""

from dataclasses import dataclass

from serving.cluster.messages import ReplicaInfo, ToGateway, ToWorker
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import RequestOutput
from serving.policy.snapshot import ReplicaLoad


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Who this worker is and what it serves. Times in seconds.

    incarnation: new at each start of the process.
    replicas: what each replica can take; their numbers are unique, in ascending order.
    report_interval_s: WorkerHello and LoadReport go to every gateway this often.
    gateway_lease_s: a gateway that was silent so long loses its requests: running ones are
        cancelled, kept output is dropped.
    retain_ended_s: output of an ended attempt that nobody acknowledged is kept this long.
    """

    worker_id: str
    incarnation: str
    model_id: str
    model_revision: str
    vocab_size: int
    replicas: tuple[ReplicaInfo, ...]
    report_interval_s: float = 0.5
    gateway_lease_s: float = 60.0
    retain_ended_s: float = 60.0


# Events.


@dataclass(frozen=True, slots=True)
class GatewayConnected:
    """A gateway's link is up; it gets a WorkerHello. Who it is, its messages say."""

    link: int


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """A link is down. Requests of that gateway run on for its lease."""

    link: int


@dataclass(frozen=True, slots=True)
class GatewayMessage:
    """A message arrived over a link."""

    link: int
    message: ToWorker


@dataclass(frozen=True, slots=True)
class ReplicaPublished:
    """The engine of a replica published (its Publish effect): one event per step."""

    replica: int
    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class ReplicaLoaded:
    """The engine's load() after a step, or when a replica became idle."""

    load: ReplicaLoad


@dataclass(frozen=True, slots=True)
class ReplicaFailed:
    """The engine of a replica failed (its Fail effect) or its thread died.

    Everything that ran on it ends FAILED and retriable; nothing is placed on it any more.
    """

    replica: int
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaRestored:
    """A failed replica was built anew and is empty."""

    replica: int


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """Take nothing new; WorkerDrained follows when nothing runs here and all output is
    acknowledged (or its time to be kept is over).
    """


@dataclass(frozen=True, slots=True)
class WorkerTick:
    """Time has passed. Due no later than `WorkerCore.next_due()`; earlier ones do no harm."""


WorkerEvent = (
    GatewayConnected
    | GatewayLost
    | GatewayMessage
    | ReplicaPublished
    | ReplicaLoaded
    | ReplicaFailed
    | ReplicaRestored
    | DrainWorker
    | WorkerTick
)


# Effects.


@dataclass(frozen=True, slots=True)
class SendToGateway:
    """Send a message over a link; if it is down the message is dropped."""

    link: int
    message: ToGateway


@dataclass(frozen=True, slots=True)
class PostToReplica:
    """Put an event into the mailbox of a replica's engine."""

    replica: int
    event: AddRequest | CancelRequest


@dataclass(frozen=True, slots=True)
class WorkerDrained:
    """The worker drains, runs nothing and owes no gateway any output."""


WorkerEffect = SendToGateway | PostToReplica | WorkerDrained
