"""Messages between gateway and worker as protobuf, both ways.

The classes of `serving.cluster.messages` on one side, `lumen.internal.v1` on the other. Nothing is
lost on the way except `EngineRequest.deadline`, which means something on the sender's clock only
(`SubmitRequest.deadline_in_s` travels instead), and log-probabilities are rounded to float32.
"""

from collections.abc import Mapping

from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.cluster.messages import (
    AbortRequest,
    FetchOutput,
    GatewayHeartbeat,
    LoadReport,
    ReplicaInfo,
    RequestAccepted,
    RequestUnknown,
    StepOutputs,
    SubmitRequest,
    ToGateway,
    ToWorker,
    WorkerHello,
)
from serving.engine.request import (
    EngineRequest,
    FinishReason,
    Priority,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from serving.errors import InvalidRequestError
from serving.policy.snapshot import ReplicaLoad

_FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.FAILED: pb.FINISH_REASON_FAILED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_FINISH_FROM_PB: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_NONE: None,
    **{number: reason for reason, number in _FINISH_TO_PB.items()},
}
_PRIORITY_TO_PB = {Priority.HIGH: pb.PRIORITY_HIGH, Priority.LOW: pb.PRIORITY_LOW}
_PRIORITY_FROM_PB: dict[int, Priority] = {
    number: priority for priority, number in _PRIORITY_TO_PB.items()
}


def to_worker_to_pb(message: ToWorker) -> pb.ToWorker:
    """The protobuf form of a message to a worker."""
    match message:
        case SubmitRequest():
            return pb.ToWorker(submit=_submit_to_pb(message))
        case AbortRequest():
            return pb.ToWorker(
                abort=pb.AbortRequest(
                    gateway_id=message.gateway_id,
                    request_id=message.request_id,
                    attempt=message.attempt,
                )
            )
        case FetchOutput():
            return pb.ToWorker(
                fetch=pb.FetchOutput(
                    gateway_id=message.gateway_id,
                    request_id=message.request_id,
                    attempt=message.attempt,
                    from_index=message.from_index,
                )
            )
        case GatewayHeartbeat():
            return pb.ToWorker(
                heartbeat=pb.GatewayHeartbeat(
                    gateway_id=message.gateway_id,
                    acknowledged=[
                        pb.Attempt(request_id=request_id, attempt=attempt)
                        for request_id, attempt in message.acknowledged
                    ],
                )
            )


def to_worker_from_pb(message: pb.ToWorker) -> ToWorker:
    """The message a worker received.

    Raises InvalidRequestError if it says something not known here (a newer gateway's).
    """
    match message.WhichOneof("message"):
        case "submit":
            return _submit_from_pb(message.submit)
        case "abort":
            abort = message.abort
            return AbortRequest(abort.gateway_id, abort.request_id, abort.attempt)
        case "fetch":
            fetch = message.fetch
            return FetchOutput(fetch.gateway_id, fetch.request_id, fetch.attempt, fetch.from_index)
        case "heartbeat":
            beat = message.heartbeat
            return GatewayHeartbeat(
                beat.gateway_id, tuple((ack.request_id, ack.attempt) for ack in beat.acknowledged)
            )
        case _:
            raise _unknown("message to a worker")


def to_gateway_to_pb(message: ToGateway) -> pb.ToGateway:
    """The protobuf form of a message to a gateway."""
    match message:
        case WorkerHello():
            return pb.ToGateway(hello=_hello_to_pb(message))
        case RequestAccepted():
            return pb.ToGateway(
                accepted=pb.RequestAccepted(
                    worker_id=message.worker_id,
                    incarnation=message.incarnation,
                    request_id=message.request_id,
                    attempt=message.attempt,
                )
            )
        case RequestUnknown():
            return pb.ToGateway(
                unknown=pb.RequestUnknown(
                    worker_id=message.worker_id,
                    incarnation=message.incarnation,
                    request_id=message.request_id,
                    attempt=message.attempt,
                )
            )
        case StepOutputs():
            return pb.ToGateway(
                outputs=pb.StepOutputs(
                    worker_id=message.worker_id,
                    incarnation=message.incarnation,
                    replica=message.replica,
                    outputs=[_output_to_pb(output) for output in message.outputs],
                )
            )
        case LoadReport():
            return pb.ToGateway(
                load=pb.LoadReport(
                    worker_id=message.worker_id,
                    incarnation=message.incarnation,
                    replicas=[_load_to_pb(load) for load in message.replicas],
                )
            )


def to_gateway_from_pb(message: pb.ToGateway) -> ToGateway:
    """The message a gateway received.

    Raises InvalidRequestError if it says something not known here (a newer worker's).
    """
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_pb(message.hello)
        case "accepted":
            accepted = message.accepted
            return RequestAccepted(
                accepted.worker_id, accepted.incarnation, accepted.request_id, accepted.attempt
            )
        case "unknown":
            unknown = message.unknown
            return RequestUnknown(
                unknown.worker_id, unknown.incarnation, unknown.request_id, unknown.attempt
            )
        case "outputs":
            outputs = message.outputs
            return StepOutputs(
                outputs.worker_id,
                outputs.incarnation,
                outputs.replica,
                tuple(_output_from_pb(output) for output in outputs.outputs),
            )
        case "load":
            load = message.load
            return LoadReport(
                load.worker_id,
                load.incarnation,
                tuple(_load_from_pb(replica) for replica in load.replicas),
            )
        case _:
            raise _unknown("message to a gateway")


def _unknown(what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"a {what} says something unknown here; run gateway and worker of one version"
    )


def _known[T](table: Mapping[int, T], number: int, what: str) -> T:
    if number not in table:
        raise _unknown(what)
    return table[number]


def _submit_to_pb(message: SubmitRequest) -> pb.SubmitRequest:
    request, sampling = message.request, message.request.sampling
    return pb.SubmitRequest(
        gateway_id=message.gateway_id,
        replica=message.replica,
        request_id=request.request_id,
        attempt=request.attempt,
        prompt=request.prompt,
        sampling=pb.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
        ),
        emitted=request.emitted,
        priority=_PRIORITY_TO_PB[request.priority],
        deadline_in_s=message.deadline_in_s,
    )


def _submit_from_pb(message: pb.SubmitRequest) -> SubmitRequest:
    sampling = message.sampling
    return SubmitRequest(
        gateway_id=message.gateway_id,
        replica=message.replica,
        request=EngineRequest(
            request_id=message.request_id,
            attempt=message.attempt,
            prompt=tuple(message.prompt),
            sampling=SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=sampling.seed,
                logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
                max_tokens=sampling.max_tokens,
                min_tokens=sampling.min_tokens,
                stop_token_ids=tuple(sampling.stop_token_ids),
                ignore_eos=sampling.ignore_eos,
            ),
            emitted=tuple(message.emitted),
            priority=_known(_PRIORITY_FROM_PB, message.priority, "priority"),
        ),
        deadline_in_s=message.deadline_in_s if message.HasField("deadline_in_s") else None,
    )


def _hello_to_pb(message: WorkerHello) -> pb.WorkerHello:
    return pb.WorkerHello(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        model_id=message.model_id,
        model_revision=message.model_revision,
        vocab_size=message.vocab_size,
        replicas=[
            pb.ReplicaInfo(
                replica=info.replica,
                num_rows=info.num_rows,
                max_model_len=info.max_model_len,
                max_context_tokens=info.max_context_tokens,
                block_size=info.block_size,
                num_blocks=info.num_blocks,
            )
            for info in message.replicas
        ],
    )


def _hello_from_pb(message: pb.WorkerHello) -> WorkerHello:
    return WorkerHello(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        model_id=message.model_id,
        model_revision=message.model_revision,
        vocab_size=message.vocab_size,
        replicas=tuple(
            ReplicaInfo(
                replica=info.replica,
                num_rows=info.num_rows,
                max_model_len=info.max_model_len,
                max_context_tokens=info.max_context_tokens,
                block_size=info.block_size,
                num_blocks=info.num_blocks,
            )
            for info in message.replicas
        ),
    )


def _output_to_pb(output: RequestOutput) -> pb.RequestOutput:
    return pb.RequestOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        start_index=output.start_index,
        tokens=output.tokens,
        logprobs=[
            pb.TokenLogprobs(
                logprob=entry.logprob,
                top_ids=[token for token, _ in entry.top],
                top_logprobs=[logprob for _, logprob in entry.top],
            )
            for entry in output.logprobs
        ],
        finish=pb.FINISH_REASON_NONE if output.finish is None else _FINISH_TO_PB[output.finish],
        detail=output.detail,
        cached_tokens=output.cached_tokens,
        retriable=output.retriable,
    )


def _output_from_pb(output: pb.RequestOutput) -> RequestOutput:
    return RequestOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        start_index=output.start_index,
        tokens=tuple(output.tokens),
        logprobs=tuple(
            TokenLogprobs(entry.logprob, tuple(zip(entry.top_ids, entry.top_logprobs, strict=True)))
            for entry in output.logprobs
        ),
        finish=_known(_FINISH_FROM_PB, output.finish, "finish reason"),
        detail=output.detail,
        cached_tokens=output.cached_tokens,
        retriable=output.retriable,
    )


def _load_to_pb(load: ReplicaLoad) -> pb.ReplicaLoad:
    return pb.ReplicaLoad(
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
    )


def _load_from_pb(load: pb.ReplicaLoad) -> ReplicaLoad:
    return ReplicaLoad(
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
    )
