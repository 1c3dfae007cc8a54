"""Messages between gateway and worker as protobuf, both ways.

The classes of `serving.cluster.messages` on one side, `lumen.internal.v1` on the other. Nothing is
lost on the way except `EngineRequest.deadline`, which means something on the sender's clock only
(`SubmitRequest.deadline_in_s` travels instead), and log-probabilities are rounded to float32.
"""

from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.wire_outputs import outputs_from_pb, outputs_to_pb
from serving.api.wire_payloads import (
    hello_from_pb,
    hello_to_pb,
    load_from_pb,
    load_to_pb,
    submit_from_pb,
    submit_to_pb,
)
from serving.api.wire_words import unknown_content
from serving.cluster.messages import (
    AbortRequest,
    FetchOutput,
    GatewayHeartbeat,
    LoadReport,
    RequestAccepted,
    RequestUnknown,
    StepOutputs,
    SubmitRequest,
    ToGateway,
    ToWorker,
    WorkerHello,
)


def to_worker_to_pb(message: ToWorker) -> pb.ToWorker:
    """The protobuf form of a message to a worker."""
    match message:
        case SubmitRequest():
            return pb.ToWorker(submit=submit_to_pb(message))
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
            return submit_from_pb(message.submit)
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
            raise unknown_content("message to a worker")


def to_gateway_to_pb(message: ToGateway) -> pb.ToGateway:
    """The protobuf form of a message to a gateway."""
    match message:
        case WorkerHello():
            return pb.ToGateway(hello=hello_to_pb(message))
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
            return pb.ToGateway(outputs=outputs_to_pb(message))
        case LoadReport():
            return pb.ToGateway(
                load=pb.LoadReport(
                    worker_id=message.worker_id,
                    incarnation=message.incarnation,
                    replicas=[load_to_pb(load) for load in message.replicas],
                )
            )


def to_gateway_from_pb(message: pb.ToGateway) -> ToGateway:
    """The message a gateway received.

    Raises InvalidRequestError if it says something not known here (a newer worker's).
    """
    match message.WhichOneof("message"):
        case "hello":
            return hello_from_pb(message.hello)
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
            return outputs_from_pb(message.outputs)
        case "load":
            load = message.load
            return LoadReport(
                load.worker_id,
                load.incarnation,
                tuple(load_from_pb(replica) for replica in load.replicas),
            )
        case _:
            raise unknown_content("message to a gateway")
