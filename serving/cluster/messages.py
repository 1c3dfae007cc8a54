"""Typed messages between gateway and worker.

Live they travel on one bidirectional gRPC stream per pair (`serving.api.wire` converts them); in
virtual time they travel through memory and may be delayed, lost, duplicated and reordered. So
every message is idempotent, tokens carry (request, attempt, index), and whoever waits asks again.

A worker's `incarnation` is new at each start of its process: messages of an earlier one are
ignored.
"""

from dataclasses import dataclass

from serving.engine.arrival import max_context_tokens
from serving.engine.executor import ExecutorLimits
from serving.engine.request import EngineRequest, RequestOutput
from serving.policy.snapshot import ReplicaLoad


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """Gateway to worker: run this attempt on that replica.

    `request.deadline` is on the sender's clock; `deadline_in_s` is what is left of it. The
    receiver rebuilds the deadline on its own clock.
    """

    gateway_id: str
    replica: int
    request: EngineRequest
    deadline_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Gateway to worker: stop this attempt. Repeated until its end is known."""

    gateway_id: str
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class FetchOutput:
    """Gateway to worker: send this attempt's tokens again from that index, and its end if any."""

    gateway_id: str
    request_id: str
    attempt: int
    from_index: int


@dataclass(frozen=True, slots=True)
class GatewayHeartbeat:
    """Gateway to worker: I am here. `acknowledged` attempts ended and may be forgotten."""

    gateway_id: str
    acknowledged: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """What one replica can take; see ExecutorLimits."""

    replica: int
    num_rows: int
    max_model_len: int
    max_context_tokens: int  # tokens one request can hold in the arena when alone
    block_size: int
    num_blocks: int

    @classmethod
    def of(cls, replica: int, limits: ExecutorLimits) -> "ReplicaInfo":
        """Of the replica with this number whose executor has these limits."""
        return cls(
            replica=replica,
            num_rows=limits.num_rows,
            max_model_len=limits.max_model_len,
            max_context_tokens=max_context_tokens(limits),
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
        )


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """Worker to gateway: first message on a connection, repeated with each report."""

    worker_id: str
    incarnation: str
    model_id: str
    model_revision: str
    vocab_size: int
    replicas: tuple[ReplicaInfo, ...]


@dataclass(frozen=True, slots=True)
class RequestAccepted:
    """Worker to gateway: the attempt is queued or running here."""

    worker_id: str
    incarnation: str
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestUnknown:
    """Worker to gateway: asked about an attempt this incarnation does not hold."""

    worker_id: str
    incarnation: str
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Worker to gateway: what one step of one replica gave the requests of that gateway."""

    worker_id: str
    incarnation: str
    replica: int
    outputs: tuple[RequestOutput, ...]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Worker to gateway, at a fixed interval and after steps that changed much."""

    worker_id: str
    incarnation: str
    replicas: tuple[ReplicaLoad, ...]


ToWorker = SubmitRequest | AbortRequest | FetchOutput | GatewayHeartbeat
ToGateway = WorkerHello | RequestAccepted | RequestUnknown | StepOutputs | LoadReport
