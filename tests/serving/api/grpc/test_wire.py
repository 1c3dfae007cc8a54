"""Every message between gateway and worker survives the wire."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.api import wire
from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.cluster import messages
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

INT32 = st.integers(-(2**31), 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
BIG = st.integers(0, 2**63 - 1)
TOKENS = st.lists(COUNT, max_size=5).map(tuple)
FLOAT32 = st.floats(width=32, allow_nan=False)
FLOAT = st.floats(allow_nan=False)
TEXT = st.text(max_size=8)

SAMPLING = st.builds(
    SamplingParams,
    temperature=FLOAT,
    top_k=INT32,
    top_p=FLOAT,
    min_p=FLOAT,
    seed=st.integers(0, 2**32 - 1),
    logprobs=st.none() | COUNT,
    max_tokens=COUNT,
    min_tokens=COUNT,
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
)
REQUEST = st.builds(
    EngineRequest,
    request_id=TEXT,
    attempt=COUNT,
    prompt=TOKENS,
    sampling=SAMPLING,
    emitted=TOKENS,
    priority=st.sampled_from(Priority),
    deadline=st.none(),
)
LOGPROBS = st.builds(
    TokenLogprobs,
    logprob=FLOAT32,
    top=st.lists(st.tuples(COUNT, FLOAT32), max_size=3).map(tuple),
)
OUTPUT = st.builds(
    RequestOutput,
    request_id=TEXT,
    attempt=COUNT,
    start_index=COUNT,
    tokens=TOKENS,
    logprobs=st.lists(LOGPROBS, max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
    detail=TEXT,
    cached_tokens=COUNT,
    retriable=st.booleans(),
)
LOAD = st.builds(
    ReplicaLoad,
    replica=COUNT,
    running=COUNT,
    waiting=COUNT,
    waiting_tokens=BIG,
    total_blocks=COUNT,
    free_blocks=COUNT,
    cached_blocks=COUNT,
    block_size=COUNT,
    steps=BIG,
    healthy=st.booleans(),
    draining=st.booleans(),
)
INFO = st.builds(
    messages.ReplicaInfo,
    replica=COUNT,
    num_rows=COUNT,
    max_model_len=COUNT,
    max_context_tokens=COUNT,
    block_size=COUNT,
    num_blocks=COUNT,
)
TO_WORKER = {
    messages.SubmitRequest: st.builds(
        messages.SubmitRequest,
        gateway_id=TEXT,
        replica=COUNT,
        request=REQUEST,
        deadline_in_s=st.none() | FLOAT,
    ),
    messages.AbortRequest: st.builds(
        messages.AbortRequest, gateway_id=TEXT, request_id=TEXT, attempt=COUNT
    ),
    messages.FetchOutput: st.builds(
        messages.FetchOutput, gateway_id=TEXT, request_id=TEXT, attempt=COUNT, from_index=COUNT
    ),
    messages.GatewayHeartbeat: st.builds(
        messages.GatewayHeartbeat,
        gateway_id=TEXT,
        acknowledged=st.lists(st.tuples(TEXT, COUNT), max_size=4).map(tuple),
    ),
}
SENDER = {"worker_id": TEXT, "incarnation": TEXT}
TO_GATEWAY = {
    messages.WorkerHello: st.builds(
        messages.WorkerHello,
        **SENDER,
        model_id=TEXT,
        model_revision=TEXT,
        vocab_size=COUNT,
        replicas=st.lists(INFO, max_size=3).map(tuple),
    ),
    messages.RequestAccepted: st.builds(
        messages.RequestAccepted, **SENDER, request_id=TEXT, attempt=COUNT
    ),
    messages.RequestUnknown: st.builds(
        messages.RequestUnknown, **SENDER, request_id=TEXT, attempt=COUNT
    ),
    messages.StepOutputs: st.builds(
        messages.StepOutputs,
        **SENDER,
        replica=COUNT,
        outputs=st.lists(OUTPUT, max_size=3).map(tuple),
    ),
    messages.LoadReport: st.builds(
        messages.LoadReport, **SENDER, replicas=st.lists(LOAD, max_size=3).map(tuple)
    ),
}


def test_every_message_type_is_tested():
    assert set(TO_WORKER) == set(messages.ToWorker.__args__)
    assert set(TO_GATEWAY) == set(messages.ToGateway.__args__)


@pytest.mark.parametrize(
    "strategy",
    [SAMPLING, REQUEST, LOGPROBS, OUTPUT, LOAD, INFO, *TO_WORKER.values(), *TO_GATEWAY.values()],
    ids=repr,
)
def test_every_field_is_varied(strategy):
    kind, fields = strategy.wrapped_strategy.target, strategy.wrapped_strategy.kwargs
    assert {field.name for field in dataclasses.fields(kind)} == set(fields)


@pytest.mark.parametrize("kind", TO_WORKER)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip_to_worker(kind, data):
    message = data.draw(TO_WORKER[kind])
    received = pb.ToWorker.FromString(wire.to_worker_to_pb(message).SerializeToString())
    assert wire.to_worker_from_pb(received) == message


@pytest.mark.parametrize("kind", TO_GATEWAY)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip_to_gateway(kind, data):
    message = data.draw(TO_GATEWAY[kind])
    received = pb.ToGateway.FromString(wire.to_gateway_to_pb(message).SerializeToString())
    assert wire.to_gateway_from_pb(received) == message


def test_the_senders_deadline_stays_at_home():
    request = EngineRequest("r", 0, (1,), SamplingParams(), deadline=12.5)
    sent = wire.to_worker_to_pb(messages.SubmitRequest("g", 0, request, deadline_in_s=3.0))
    received = wire.to_worker_from_pb(sent)
    assert isinstance(received, messages.SubmitRequest)
    assert received.request.deadline is None
    assert received.deadline_in_s == 3.0


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (wire.to_worker_from_pb, pb.ToWorker()),
        (wire.to_gateway_from_pb, pb.ToGateway()),
        (wire.to_worker_from_pb, pb.ToWorker(submit=pb.SubmitRequest(priority=9))),
        (
            wire.to_gateway_from_pb,
            pb.ToGateway(
                outputs=pb.StepOutputs(
                    request_ids=["r"],
                    attempts=[1],
                    start_indices=[0],
                    token_counts=[0],
                    cached_tokens=[0],
                    details=[pb.OutputDetails(finish=9)],
                )
            ),
        ),
    ],
)
def test_what_a_newer_peer_says_is_refused_by_name(decode, message):
    with pytest.raises(InvalidRequestError, match="of one version"):
        decode(message)


def columns(**others):
    whole = {
        "request_ids": ["r"], "attempts": [1], "start_indices": [0], "token_counts": [2],
        "cached_tokens": [0], "tokens": [5, 6],
    }  # fmt: skip
    return pb.ToGateway(outputs=pb.StepOutputs(**{**whole, **others}))


def test_columns_give_outputs():
    (output,) = wire.to_gateway_from_pb(columns()).outputs
    assert output == RequestOutput("r", 1, 0, (5, 6))


@pytest.mark.parametrize(
    "others",
    [
        {"attempts": [1, 2]},
        {"cached_tokens": []},
        {"tokens": [5]},
        {"tokens": [5, 6, 7]},
        {"details": [pb.OutputDetails(output=1)]},
        {"details": [pb.OutputDetails(output=-1)]},
        {"details": [pb.OutputDetails(logprobs=[pb.TokenLogprobs(top_ids=[1])])]},
    ],
    ids=str,
)
def test_columns_that_contradict_each_other_are_refused(others):
    with pytest.raises(ValueError, match=r"argument|tokens|details"):
        wire.to_gateway_from_pb(columns(**others))
