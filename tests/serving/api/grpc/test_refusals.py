"""Bad input is refused with a precise status, names its field and loses nothing."""

import math

import grpc
import pytest

from serving.api.proto import lumen_v1_pb2 as pb
from serving.api.status_interceptor import PARAMETER, RETRY_AFTER
from serving.engine.events import AddRequest

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def of_tokens(*ids, **fields):
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), **fields)


def sampled(**fields):
    return of_tokens(1, sampling=pb.SamplingParams(**fields))


REFUSED = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (pb.GenerateRequest(text=""), "prompt"),
    "no tokens": (of_tokens(), "prompt"),
    "token beyond the vocabulary": (of_tokens(1, 320), "prompt"),
    "negative token": (of_tokens(-1), "prompt"),
    "prompt too long": (of_tokens(*[1] * 128), "prompt"),
    "text too long": (pb.GenerateRequest(text="x" * 200), "prompt"),
    "temperature NaN": (sampled(temperature=math.nan), "temperature"),
    "temperature negative": (sampled(temperature=-0.5), "temperature"),
    "temperature infinite": (sampled(temperature=math.inf), "temperature"),
    "top_p zero": (sampled(top_p=0.0), "top_p"),
    "top_p above one": (sampled(top_p=1.5), "top_p"),
    "min_p NaN": (sampled(min_p=math.nan), "min_p"),
    "top_k below": (sampled(top_k=-5), "top_k"),
    "logprobs above": (sampled(logprobs=4), "logprobs"),
    "max_tokens zero": (sampled(max_tokens=0), "max_tokens"),
    "max_tokens beyond the model": (sampled(max_tokens=128), "max_tokens"),
    "min above max": (sampled(max_tokens=3, min_tokens=4), "min_tokens"),
    "min_tokens negative": (sampled(min_tokens=-1), "min_tokens"),
    "stop token beyond": (sampled(stop_token_ids=[400]), "stop_token_ids"),
    "empty stop": (of_tokens(1, stop=[""]), "stop"),
    "too many stops": (of_tokens(1, stop=list("abcde")), "stop"),
    "deadline zero": (of_tokens(1, deadline_s=0.0), "deadline_s"),
    "deadline NaN": (of_tokens(1, deadline_s=math.nan), "deadline_s"),
    "lease negative": (of_tokens(1, resume_lease_s=-1.0), "resume_lease_s"),
    "lease too long": (of_tokens(1, resume_lease_s=1e6), "resume_lease_s"),
    "request id with a space": (of_tokens(1, request_id="a b"), "request_id"),
    "SLO class of the future": (of_tokens(1, slo_class=7), "slo_class"),
}


async def test_bad_requests_are_invalid_arguments(deploy, greedy, calls):
    deployment = await deploy()
    for name, (request, parameter) in REFUSED.items():
        error = await calls.refusal(deployment.stub.Generate(request))
        assert error.code() == INVALID, name
        assert dict(error.trailing_metadata())[PARAMETER] == parameter, name
        assert len(error.details()) > 20, name
    # None of them reached an engine, and the server is as good as before.
    assert deployment.worker.posted.empty()
    chunks = await calls.read_all(deployment.stub.Generate(greedy()))
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("Generate", pb.GenerateRequest(model="gpt", text="x"), grpc.StatusCode.NOT_FOUND),
        ("Tokenize", pb.TokenizeRequest(model="gpt", text="x"), grpc.StatusCode.NOT_FOUND),
        ("Detokenize", pb.DetokenizeRequest(model="gpt"), grpc.StatusCode.NOT_FOUND),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[320]), INVALID),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[-1]), INVALID),
        ("Resume", pb.ResumeRequest(request_id="nobody"), grpc.StatusCode.NOT_FOUND),
        ("Resume", pb.ResumeRequest(request_id=""), INVALID),
        ("Resume", pb.ResumeRequest(request_id="x", from_index=-1), INVALID),
        ("Abort", pb.AbortRequest(request_id="nobody"), grpc.StatusCode.NOT_FOUND),
        ("Abort", pb.AbortRequest(request_id=" "), INVALID),
    ],
)
async def test_other_methods_refuse_precisely(deploy, calls, method, request_, code):
    deployment = await deploy(worker=False)
    error = await calls.refusal(getattr(deployment.stub, method)(request_))
    assert error.code() == code
    assert error.details()


async def test_an_unknown_model_is_named(deploy, calls):
    deployment = await deploy(worker=False)
    error = await calls.refusal(deployment.stub.Generate(pb.GenerateRequest(model="gpt", text="x")))
    assert "'gpt'" in error.details()
    assert "'modelled'" in error.details()


async def test_a_full_queue_says_when_to_come_back(deploy, greedy, calls):
    deployment = await deploy(max_queued_requests=2)
    deployment.worker.allow(0)
    accepted = [deployment.stub.Generate(greedy(prompt=(n + 1,))) for n in range(2)]
    for call in accepted:
        await call.initial_metadata()
    error = await calls.refusal(deployment.stub.Generate(greedy()))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert float(dict(error.trailing_metadata())[RETRY_AFTER]) > 0
    deployment.worker.allow(math.inf)
    for call in accepted:
        assert (await calls.read_all(call))[-1].finish_reason == pb.FINISH_REASON_LENGTH
    await calls.read_all(deployment.stub.Generate(greedy()))


async def test_an_id_in_use_is_refused_and_the_first_goes_on(deploy, greedy, calls):
    deployment = await deploy()
    deployment.worker.allow(0)
    first = deployment.stub.Generate(greedy(request_id="r"))
    await first.initial_metadata()
    error = await calls.refusal(deployment.stub.Generate(greedy(request_id="r")))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    deployment.worker.allow(math.inf)
    assert (await calls.read_all(first))[-1].finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_message_beyond_the_limit_is_refused(deploy, calls):
    deployment = await deploy(worker=False, max_message_bytes=1000)
    error = await calls.refusal(deployment.stub.Generate(pb.GenerateRequest(text="x" * 1100)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    info = await deployment.stub.ServerInfo(pb.ServerInfoRequest())
    assert info.limits.max_message_bytes == 1000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x12\x02\xff\xfe", id="invalid UTF-8 in text"),
        pytest.param(b"\x12\x7f", id="cut off"),
    ],
)
async def test_what_cannot_be_parsed_is_an_invalid_argument(deploy, calls, data):
    deployment = await deploy(worker=False)
    raw = deployment.channel.unary_stream("/lumen.v1.Inference/Generate")
    error = await calls.refusal(raw(data))
    assert error.code() == INVALID
    assert "UTF-8" in error.details()


async def test_a_defect_is_internal_and_logged_not_told(deploy, calls, monkeypatch, caplog):
    deployment = await deploy(worker=False)

    def broken(tokens, skip_special_tokens=True):
        raise KeyError("a secret")

    monkeypatch.setattr(deployment.text, "decode", broken)
    error = await calls.refusal(deployment.stub.Detokenize(pb.DetokenizeRequest(token_ids=[65])))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    assert "a secret" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_failing_core_ends_streams_and_is_told_to_the_process(
    deploy, greedy, calls, monkeypatch, caplog
):
    deployment = await deploy()
    deployment.worker.allow(0)
    call = deployment.stub.Generate(greedy())
    await call.initial_metadata()
    while not isinstance(await deployment.worker.posted.get(), AddRequest):
        pass

    def broken(event, now):
        raise AssertionError("a defect")

    monkeypatch.setattr(deployment.gateway.core, "handle", broken)
    error = await calls.refusal(deployment.stub.Abort(pb.AbortRequest(request_id="x")))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert (await calls.refusal(call)).code() == grpc.StatusCode.INTERNAL
    assert deployment.gateway.failed.is_set()
    assert not deployment.ready.is_set()
    assert "a defect" in caplog.text
