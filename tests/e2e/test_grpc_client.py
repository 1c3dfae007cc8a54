"""The generated gRPC client against the real processes."""

import asyncio

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from serving.api.proto import lumen_v1_pb2 as pb
from tests.e2e.live import greedy, read, until_idle

PROMPT = "Once upon a time"


async def test_generate_streams_tokens_and_text_that_agree(stub):
    chunks = [chunk async for chunk in stub.Generate(greedy(PROMPT, 24))]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    text = "".join(chunk.text for chunk in chunks)
    assert len(tokens) == 24
    assert len(chunks) > 2
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage.completion_tokens == 24
    decoded = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens))
    assert text == decoded.text


async def test_many_at_once_give_what_each_gives_alone(stub):
    prompts = [f"{PROMPT} {number}" for number in range(10)]
    alone = [await read(stub.Generate(greedy(prompt, 30))) for prompt in prompts]
    together = await asyncio.gather(
        *(read(stub.Generate(greedy(prompt, 30))) for prompt in prompts)
    )
    for one, other in zip(alone, together, strict=True):
        assert one.same_as(other)


async def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks(stub):
    long = "word " * 60  # 300 tokens and more; a step takes 32
    output = await read(stub.Generate(greedy(long, 8)))
    again = await read(stub.Generate(greedy(long, 8)))
    assert output.last.usage.cached_tokens == 0
    assert again.last.usage.cached_tokens > 200
    assert output.same_as(again)


async def test_a_seed_fixes_the_draw(stub):
    def drawn(seed):
        sampling = pb.SamplingParams(temperature=1.0, seed=seed, max_tokens=16, ignore_eos=True)
        return stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling))

    async def tokens(seed):
        return [token async for chunk in drawn(seed) for token in chunk.token_ids]

    first = await tokens(7)
    assert await tokens(7) == first
    assert await tokens(8) != first


async def test_resume_after_a_broken_stream_goes_on_where_it_stopped(stub):
    undisturbed = await read(stub.Generate(greedy(PROMPT, 200)))
    call = stub.Generate(greedy(PROMPT, 200, request_id="resumed", resume_lease_s=30.0))
    seen = []
    async for chunk in call:
        seen.extend(chunk.token_ids)
        if len(seen) >= 5:
            break
    call.cancel()
    rest = await read(stub.Resume(pb.ResumeRequest(request_id="resumed", from_index=len(seen))))
    assert len(seen) < 200
    rest.tokens = seen + rest.tokens
    assert undisturbed.same_as(rest)
    assert rest.last.finish_reason == pb.FINISH_REASON_LENGTH


async def test_abort_ends_the_stream_and_frees_its_memory(stub):
    call = stub.Generate(greedy(PROMPT, 400, request_id="aborted"))
    first = await call.read()
    await stub.Abort(pb.AbortRequest(request_id="aborted"))
    output = await read(call, [first])
    assert output.last.finish_reason == pb.FINISH_REASON_CANCELLED
    assert len(output.tokens) < 400
    await until_idle(stub)


async def test_a_client_gone_mid_stream_frees_its_slots(stub):
    before = await until_idle(stub)
    calls = [stub.Generate(greedy(f"{PROMPT} {number}", 400)) for number in range(4)]
    for call in calls:
        await call.read()
    for call in calls:
        call.cancel()
    after = await until_idle(stub)
    # All rows were taken, and no request ran to its end.
    for one, then in zip(after.replicas, before.replicas, strict=True):
        assert 0 < one.steps - then.steps < 400


async def test_the_server_says_what_it_serves(stub):
    models = await stub.ListModels(pb.ListModelsRequest())
    assert [(m.id, m.max_model_len, m.vocab_size) for m in models.models] == [
        ("random:tiny-llama", 512, 512)
    ]
    info = await stub.ServerInfo(pb.ServerInfoRequest())
    assert info.ready
    assert [one.replica for one in info.replicas] == [0, 1]
    assert {one.num_rows for one in info.replicas} == {2}
    assert "resume" in info.capabilities


async def test_health_and_reflection(channel):
    health = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service="lumen.v1.Inference")
    )
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await reflected.write(
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="lumen.v1.Inference")
    )
    await reflected.done_writing()
    answer = await reflected.read()
    pool = DescriptorPool()
    for file in answer.file_descriptor_response.file_descriptor_proto:
        pool.AddSerializedFile(file)
    service = pool.FindServiceByName("lumen.v1.Inference")
    assert "Generate" in service.methods_by_name


@pytest.mark.parametrize(
    ("request_", "code", "named"),
    [
        (greedy("", 4), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (greedy("a", 4, model="gpt-9"), grpc.StatusCode.NOT_FOUND, "gpt-9"),
        (greedy("a" * 600, 4), grpc.StatusCode.INVALID_ARGUMENT, "512"),
        (
            pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1.0)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[512])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "512",
        ),
    ],
)
async def test_bad_requests_are_refused_with_a_status_and_a_reason(stub, request_, code, named):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await read(stub.Generate(request_))
    assert refusal.value.code() == code
    assert named in refusal.value.details()


async def test_resume_of_an_unknown_request(stub):
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await read(stub.Resume(pb.ResumeRequest(request_id="never")))
    assert refusal.value.code() == grpc.StatusCode.NOT_FOUND
