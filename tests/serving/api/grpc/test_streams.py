"""Generate, Abort and Resume against a whole deployment."""

import asyncio

import grpc

from serving.api.inference_service import REQUEST_ID
from serving.api.proto import lumen_v1_pb2 as pb
from serving.cluster.generation import GenerationRequest
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import Priority, SamplingParams

SLOTS = 64


def tokens_of(chunks):
    """All tokens, after checking that each index came once and in order."""
    tokens = []
    for chunk in chunks:
        assert chunk.start_index == len(tokens)
        tokens.extend(chunk.token_ids)
    return tuple(tokens)


async def test_a_generation_streams_its_tokens_text_and_usage(deploy, greedy, calls):
    deployment = await deploy()
    request = greedy(max_tokens=20, request_id="mine")
    call = deployment.stub.Generate(request)
    chunks = await calls.read_all(call)
    assert dict(await call.initial_metadata())[REQUEST_ID] == "mine"
    assert tokens_of(chunks) == deployment.reference(request, 20)
    assert "".join(c.text for c in chunks) == deployment.text.decode(tokens_of(chunks))
    assert [c.finish_reason for c in chunks[:-1]] == [0] * (len(chunks) - 1)
    last = chunks[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage == pb.Usage(prompt_tokens=3, completion_tokens=20, cached_tokens=0)
    assert {c.attempt for c in chunks} == {1}
    assert all(c.request_id == "mine" for c in chunks)


async def test_several_requests_at_once_do_not_mix(deploy, greedy, calls):
    deployment = await deploy(replicas=2)
    requests = [greedy(prompt=(n + 1, 7, 9), max_tokens=10) for n in range(12)]
    streams = await asyncio.gather(
        *(calls.read_all(deployment.stub.Generate(request)) for request in requests)
    )
    for request, chunks in zip(requests, streams, strict=True):
        assert tokens_of(chunks) == deployment.reference(request, 10)


async def test_a_text_prompt_and_what_the_prefix_cache_knew(deploy, greedy, calls):
    deployment = await deploy()
    request = pb.GenerateRequest(
        text="twelve bytes", sampling=pb.SamplingParams(temperature=0.0, max_tokens=2)
    )
    first = await calls.read_all(deployment.stub.Generate(request))
    again = await calls.read_all(deployment.stub.Generate(request))
    assert first[-1].usage.prompt_tokens == 13
    assert tokens_of(first) == tokens_of(again)
    assert first[-1].usage.cached_tokens == 0
    assert again[-1].usage.cached_tokens == 12


async def test_logprobs_come_with_every_token(deploy, greedy, calls):
    deployment = await deploy()
    chunks = await calls.read_all(
        deployment.stub.Generate(greedy(max_tokens=5, sampling={"logprobs": 2}))
    )
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert len(entries) == 5
    assert [len(entry.top) for entry in entries] == [2] * 5
    assert all(entry.logprob == entry.top[0].logprob < 0 for entry in entries)
    assert [e.top[0].token_id for e in entries] == list(tokens_of(chunks))


async def test_a_stop_string_ends_text_and_request(deploy, greedy, calls):
    deployment = await deploy()
    request = greedy(max_tokens=30)
    text = "".join(c.text for c in await calls.read_all(deployment.stub.Generate(request)))
    stop = next(one for one in text[3:] if one.isascii() and text.index(one) > 2)
    request.stop.append(stop)
    chunks = await calls.read_all(deployment.stub.Generate(request))
    assert "".join(c.text for c in chunks) == text[: text.index(stop)]
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert len(tokens_of(chunks)) < 30


async def test_stop_tokens_min_tokens_and_seed_reach_the_engine(deploy, greedy, calls):
    deployment = await deploy()
    plain = greedy(max_tokens=8)
    tokens = deployment.reference(plain, 8)
    stopped = greedy(max_tokens=8, sampling={"stop_token_ids": [tokens[2]]})
    assert tokens_of(await calls.read_all(deployment.stub.Generate(stopped))) == tokens[:3]
    stopped.sampling.min_tokens = 5
    longer = tokens_of(await calls.read_all(deployment.stub.Generate(stopped)))
    assert len(longer) >= 5
    assert tokens[2] not in longer[:5]
    drawn = greedy(max_tokens=8, sampling={"temperature": 1.0, "seed": 7})
    seeded = tokens_of(await calls.read_all(deployment.stub.Generate(drawn)))
    assert seeded == deployment.reference(drawn, 8) != tokens


async def test_what_a_request_asks_of_the_engine(deploy, greedy, calls):
    deployment = await deploy()
    request = greedy(
        slo_class=pb.SLO_CLASS_BATCH,
        sampling={
            "temperature": 0.5,
            "top_k": 9,
            "top_p": 0.75,
            "min_p": 0.25,
            "seed": 11,
            "max_tokens": 4,
            "ignore_eos": True,
        },
    )
    await calls.read_all(deployment.stub.Generate(request))
    added = deployment.worker.posted.get_nowait()
    assert isinstance(added, AddRequest)
    assert added.request.priority is Priority.LOW
    sampling = added.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 9, 0.75)
    assert (sampling.min_p, sampling.seed, sampling.ignore_eos) == (0.25, 11, True)
    await calls.read_all(deployment.stub.Generate(greedy()))
    assert deployment.worker.posted.get_nowait().request.priority is Priority.HIGH


async def test_text_can_be_left_out(deploy, greedy, calls):
    deployment = await deploy()
    chunks = await calls.read_all(deployment.stub.Generate(greedy(include_text=False)))
    assert "".join(c.text for c in chunks) == ""
    assert len(tokens_of(chunks)) == 16


async def test_abort_ends_the_stream(deploy, greedy, calls):
    deployment = await deploy()
    deployment.worker.allow(3)
    call = deployment.stub.Generate(greedy(max_tokens=100, request_id="r"))
    read = await calls.read_tokens(call, 2)
    await deployment.stub.Abort(pb.AbortRequest(request_id="r"))
    rest = await calls.read_all(call)
    assert rest[-1].finish_reason == pb.FINISH_REASON_CANCELLED
    assert await call.code() == grpc.StatusCode.OK
    assert 2 <= len(tokens_of([*read, *rest])) <= 3
    deployment.worker.allow(float("inf"))


async def test_a_client_that_leaves_frees_its_slots_within_one_step(deploy, greedy, calls):
    deployment = await deploy()
    worker = deployment.worker
    worker.allow(3)
    call = deployment.stub.Generate(greedy(max_tokens=100))
    await calls.read_tokens(call, 3)
    call.cancel()
    async with asyncio.timeout(20):
        while not isinstance(await worker.posted.get(), CancelRequest):
            pass
        before = worker.executors[0].collected
        worker.allow(1)  # the step in flight, and none after it
        report = await deployment.stub.LoadReport(pb.LoadReportRequest())
        while report.replicas[0].running or used(report.replicas[0]):
            report = await deployment.stub.LoadReport(pb.LoadReportRequest())
    assert worker.executors[0].collected == before + 1
    info = await deployment.stub.ServerInfo(pb.ServerInfoRequest())
    assert (info.running, info.queued) == (0, 0)


def used(load):
    assert load.total_blocks == SLOTS
    return load.total_blocks - load.free_blocks - load.cached_blocks


async def test_resume_after_a_broken_stream_gives_every_index_once(deploy, greedy, calls):
    deployment = await deploy()
    request = greedy(max_tokens=40, request_id="r", resume_lease_s=30.0)
    deployment.worker.allow(9)
    broken = deployment.stub.Generate(request)
    read = await calls.read_tokens(broken, 5)
    seen = sum(len(chunk.token_ids) for chunk in read)
    broken.cancel()
    resumed = deployment.stub.Resume(pb.ResumeRequest(request_id="r", from_index=seen))
    assert dict(await resumed.initial_metadata())[REQUEST_ID] == "r"
    deployment.worker.allow(float("inf"))
    rest = await calls.read_all(resumed)
    assert tokens_of([*read, *rest]) == deployment.reference(request, 40)
    text = "".join(chunk.text for chunk in [*read, *rest])
    assert text == deployment.text.decode(deployment.reference(request, 40))
    # The answer is kept for the lease, also after its end, and from any index.
    again = await calls.read_all(
        deployment.stub.Resume(pb.ResumeRequest(request_id="r", from_index=38))
    )
    assert [token for chunk in again for token in chunk.token_ids] == list(
        deployment.reference(request, 40)[38:]
    )
    assert again[-1].usage.completion_tokens == 40


async def test_a_later_stream_cuts_off_the_earlier_one(deploy, greedy, calls):
    deployment = await deploy()
    deployment.worker.allow(4)
    earlier = deployment.stub.Generate(greedy(request_id="r", resume_lease_s=30.0))
    await calls.read_tokens(earlier, 3)
    later = deployment.stub.Resume(pb.ResumeRequest(request_id="r"))
    _, error = await calls.read_until_error(earlier)
    assert error.code() == grpc.StatusCode.ABORTED
    deployment.worker.allow(float("inf"))
    assert len(tokens_of(await calls.read_all(later))) == 16


async def test_without_a_lease_there_is_nothing_to_resume_into(deploy, greedy, calls):
    deployment = await deploy()
    deployment.worker.allow(3)
    call = deployment.stub.Generate(greedy(max_tokens=100, request_id="r"))
    await calls.read_tokens(call, 2)
    call.cancel()
    async with asyncio.timeout(20):
        while not isinstance(await deployment.worker.posted.get(), CancelRequest):
            pass
    chunks = await calls.read_all(deployment.stub.Resume(pb.ResumeRequest(request_id="r")))
    assert chunks[-1].finish_reason == pb.FINISH_REASON_CANCELLED
    deployment.worker.allow(float("inf"))


async def test_a_deadline_ends_the_stream_with_its_status(deploy, greedy, calls):
    deployment = await deploy()
    deployment.worker.allow(2)
    chunks, error = await calls.read_until_error(
        deployment.stub.Generate(greedy(max_tokens=100, deadline_s=0.2))
    )
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert chunks[-1].finish_reason == pb.FINISH_REASON_DEADLINE
    assert chunks[-1].detail == error.details() != ""
    deployment.worker.allow(float("inf"))


async def test_a_slow_reader_gets_few_large_chunks(deploy, greedy, calls):
    deployment = await deploy()
    worker = deployment.worker
    worker.allow(1)
    stream = await deployment.gateway.submit(
        GenerationRequest("slow", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=60))
    )
    worker.allow(float("inf"))
    async with asyncio.timeout(20):
        while (info := deployment.gateway.info()).queued + info.running:
            await deployment.stub.LoadReport(pb.LoadReportRequest())
    deltas = [delta async for delta in stream]
    assert len(deltas) == 1
    assert len(deltas[0].tokens) == 60
