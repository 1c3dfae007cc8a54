"""The public messages of lumen.v1 to and from what the gateway and the text layer speak."""

from collections.abc import Iterable

from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.text import TextDelta
from serving.cluster.generation import GatewayInfo
from serving.cluster.messages import WorkerHello
from serving.engine.request import FinishReason, Priority, TokenLogprobs
from serving.errors import InvalidRequestError
from serving.policy.snapshot import FleetSnapshot

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_PRIORITY: dict[int, Priority] = {
    pb.SLO_CLASS_UNSPECIFIED: Priority.HIGH,
    pb.SLO_CLASS_INTERACTIVE: Priority.HIGH,
    pb.SLO_CLASS_BATCH: Priority.LOW,
}
_OPTIONAL_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs", "max_tokens")


def request_fields(request: pb.GenerateRequest) -> dict[str, object]:
    """The fields that `serving.api.validation` understands, without those left out.

    Raises InvalidRequestError for an SLO class that has no name here.
    """
    sampling = request.sampling
    fields: dict[str, object] = {
        name: getattr(sampling, name) for name in _OPTIONAL_SAMPLING if sampling.HasField(name)
    }
    if request.slo_class not in _PRIORITY:
        raise InvalidRequestError(
            f"slo_class is {request.slo_class}; expected SLO_CLASS_INTERACTIVE or SLO_CLASS_BATCH.",
            "slo_class",
        )
    fields |= {
        "min_tokens": sampling.min_tokens,
        "stop_token_ids": tuple(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "stop": tuple(request.stop),
        "slo_class": _PRIORITY[request.slo_class],
        "resume_lease_s": request.resume_lease_s,
    }
    if request.HasField("deadline_s"):
        fields["deadline_s"] = request.deadline_s
    return fields


def chunk(request_id: str, delta: TextDelta, include_text: bool) -> pb.GenerateChunk:
    """One delta for the client; the last one carries the finish reason and the usage."""
    made = pb.GenerateChunk(
        request_id=request_id,
        start_index=delta.start_index,
        token_ids=delta.tokens,
        text=delta.text if include_text else "",
        logprobs=[_logprobs(entry) for entry in delta.logprobs],
        attempt=delta.attempt,
        detail=delta.detail,
    )
    if delta.finish is not None:
        made.finish_reason = _FINISH[delta.finish]
        made.usage.prompt_tokens = delta.usage.prompt_tokens
        made.usage.completion_tokens = delta.usage.completion_tokens
        made.usage.cached_tokens = delta.usage.cached_tokens
    return made


def _logprobs(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprob=entry.logprob,
        top=[pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def replicas(workers: Iterable[WorkerHello]) -> list[pb.Replica]:
    """Every replica of the connected workers."""
    return [
        pb.Replica(
            worker_id=worker.worker_id,
            incarnation=worker.incarnation,
            replica=info.replica,
            num_rows=info.num_rows,
            max_model_len=info.max_model_len,
            max_context_tokens=info.max_context_tokens,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
        )
        for worker in workers
        for info in worker.replicas
    ]


def loads(fleet: FleetSnapshot, now: float) -> list[pb.ReplicaLoad]:
    """The last report of every replica; `now` is on the clock of the reports."""
    return [
        pb.ReplicaLoad(
            worker_id=worker.worker_id,
            replica=load.replica,
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            block_size=load.block_size,
            steps=load.steps,
            healthy=load.healthy,
            draining=load.draining,
            report_age_s=max(now - worker.received_at, 0.0),
        )
        for worker in fleet.workers
        for load in worker.replicas
    ]


def model_revision(info: GatewayInfo) -> str:
    """The revision the connected workers serve; empty while none is connected."""
    return info.workers[0].model_revision if info.workers else ""
