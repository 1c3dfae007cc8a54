"""The larger parts of the messages between gateway and worker, as protobuf and back.

See `serving.api.wire`, which puts them together.
"""

from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.wire_words import known
from serving.cluster.messages import ReplicaInfo, SubmitRequest, WorkerHello
from serving.engine.request import EngineRequest, Priority, SamplingParams
from serving.policy.snapshot import ReplicaLoad

_PRIORITY_TO_PB = {Priority.HIGH: pb.PRIORITY_HIGH, Priority.LOW: pb.PRIORITY_LOW}
_PRIORITY_FROM_PB: dict[int, Priority] = {
    number: priority for priority, number in _PRIORITY_TO_PB.items()
}


def submit_to_pb(message: SubmitRequest) -> pb.SubmitRequest:
    """An attempt on its way to a replica; the sender's deadline stays behind."""
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


def submit_from_pb(message: pb.SubmitRequest) -> SubmitRequest:
    """Raises InvalidRequestError for a priority unknown here."""
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
            priority=known(_PRIORITY_FROM_PB, message.priority, "priority"),
        ),
        deadline_in_s=message.deadline_in_s if message.HasField("deadline_in_s") else None,
    )


def hello_to_pb(message: WorkerHello) -> pb.WorkerHello:
    """What a worker says of itself."""
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


def hello_from_pb(message: pb.WorkerHello) -> WorkerHello:
    """What a worker said of itself."""
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


def load_to_pb(load: ReplicaLoad) -> pb.ReplicaLoad:
    """The load of one replica."""
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


def load_from_pb(load: pb.ReplicaLoad) -> ReplicaLoad:
    """The load of one replica."""
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
