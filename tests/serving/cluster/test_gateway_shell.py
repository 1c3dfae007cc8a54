"""The gateway's shell: streams, timer, readiness and its end, with a worker played by hand."""

import asyncio

import pytest

from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.gateway_shell import GatewayShell
from serving.cluster.generation import GenerationRequest
from serving.cluster.messages import (
    AbortRequest,
    GatewayHeartbeat,
    LoadReport,
    ReplicaInfo,
    RequestAccepted,
    StepOutputs,
    SubmitRequest,
    WorkerHello,
)
from serving.engine.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from serving.errors import (
    DrainingError,
    InternalError,
    StreamReplacedError,
    UnavailableError,
    UnknownRequestError,
)
from serving.policy.snapshot import ReplicaLoad

SELF = ("worker", "one")


class PlayedWorker:
    """Says what a worker with one replica would say."""

    def __init__(self, shell):
        self.shell = shell
        self.received = []
        self.link = shell.worker_connected(self.received.append)
        info = ReplicaInfo(0, 8, 1024, 1024, 16, 64)
        self.say(WorkerHello(*SELF, "model", "revision", 100, (info,)))
        self.say(LoadReport(*SELF, (ReplicaLoad(0, 0, 0, 0, 64, 64, 0, 16),)))

    def say(self, message):
        self.shell.worker_message(self.link, message)

    def submitted(self):
        request = self.of(SubmitRequest)[-1].request
        self.say(RequestAccepted(*SELF, request.request_id, request.attempt))
        return request

    def give(self, request, start, *tokens, logprobs=(), finish=None, cached=0):
        output = RequestOutput(
            request.request_id,
            request.attempt,
            start,
            tokens,
            logprobs,
            finish,
            cached_tokens=cached,
        )
        self.say(StepOutputs(*SELF, 0, (output,)))

    def of(self, kind):
        return [message for message in self.received if isinstance(message, kind)]


def request(request_id="r", **fields):
    return GenerationRequest(request_id, (1, 2, 3), SamplingParams(max_tokens=50), **fields)


@pytest.fixture
async def shell():
    made = GatewayShell(GatewayCore(GatewayConfig("gateway", heartbeat_interval_s=0.02)))
    yield made
    made.close()


async def next_of(stream):
    return await asyncio.wait_for(anext(stream), 10)


async def test_what_arrives_between_two_reads_is_one_delta(shell):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())
    attempt = worker.submitted()
    for index in range(5):
        entry = TokenLogprobs(-float(index), ())
        worker.give(attempt, index, 10 + index, logprobs=(entry,), cached=2)
    delta = await next_of(stream)
    assert (delta.start_index, delta.tokens, delta.finish) == (0, (10, 11, 12, 13, 14), None)
    assert [entry.logprob for entry in delta.logprobs] == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert (delta.cached_tokens, delta.attempt) == (2, 1)
    waiting = asyncio.create_task(next_of(stream))
    await asyncio.sleep(0)
    assert not waiting.done()
    worker.give(attempt, 5, 15)
    worker.give(attempt, 6, 16, finish=FinishReason.STOP)
    delta = await waiting
    assert (delta.start_index, delta.tokens, delta.finish) == (5, (15, 16), FinishReason.STOP)
    with pytest.raises(StopAsyncIteration):
        await next_of(stream)


async def test_letting_go_aborts_at_once_and_only_once(shell):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())
    attempt = worker.submitted()
    worker.give(attempt, 0, 10)
    await stream.aclose()
    await stream.aclose()
    assert worker.of(AbortRequest) == [AbortRequest("gateway", "r", attempt.attempt)]
    with pytest.raises(StopAsyncIteration):
        await next_of(stream)
    assert shell.info().running == 0


async def test_letting_go_wakes_a_reader(shell):
    PlayedWorker(shell)
    stream = await shell.submit(request())
    reader = asyncio.create_task(next_of(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await reader


async def test_a_later_stream_takes_over_what_the_earlier_had_not_read(shell):
    worker = PlayedWorker(shell)
    earlier = await shell.submit(request(resume_lease_s=60.0))
    attempt = worker.submitted()
    worker.give(attempt, 0, 10, 11)
    later = await shell.resume("r", 1)
    assert (await next_of(later)).tokens == (11,)
    assert (await next_of(earlier)).tokens == (10, 11)
    with pytest.raises(StreamReplacedError):
        await next_of(earlier)
    await earlier.aclose()  # of no consequence for the later one
    worker.give(attempt, 2, 12, finish=FinishReason.LENGTH)
    assert (await next_of(later)).finish is FinishReason.LENGTH


async def test_the_timer_ticks_without_any_other_event(shell):
    worker = PlayedWorker(shell)
    beats = len(worker.of(GatewayHeartbeat))
    async with asyncio.timeout(10):
        while len(worker.of(GatewayHeartbeat)) < beats + 3:
            await asyncio.sleep(0)


async def test_messages_of_a_lost_link_are_dropped(shell):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())
    attempt = worker.submitted()
    shell.worker_lost(worker.link)
    shell.worker_lost(worker.link)
    worker.give(attempt, 0, 10)
    again = PlayedWorker(shell)
    again.give(attempt, 0, 20)
    assert (await next_of(stream)).tokens == (20,)


async def test_readiness_is_told_when_it_changes(shell):
    told = []
    shell.on_ready_change(told.append)
    worker = PlayedWorker(shell)
    assert told == [False, True]
    shell.worker_lost(worker.link)
    assert told == [False, True, False]


async def test_drain_returns_when_the_last_request_ended(shell):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())
    attempt = worker.submitted()
    draining = asyncio.create_task(shell.drain())
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await shell.submit(request("other"))
    assert not draining.done()
    worker.give(attempt, 0, 10, finish=FinishReason.LENGTH)
    await asyncio.wait_for(draining, 10)
    assert (await next_of(stream)).tokens == (10,)
    await asyncio.wait_for(shell.drain(), 10)


async def test_refusals_are_raised(shell):
    with pytest.raises(UnknownRequestError):
        await shell.abort("nobody")
    with pytest.raises(UnknownRequestError):
        await shell.resume("nobody", 0)


async def test_close_ends_streams_and_refuses_what_follows(shell):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())
    worker.give(worker.submitted(), 0, 10)
    shell.close()
    shell.close()
    assert (await next_of(stream)).tokens == (10,)
    with pytest.raises(UnavailableError):
        await next_of(stream)
    with pytest.raises(UnavailableError):
        await shell.submit(request("other"))
    await stream.aclose()
    shell.worker_lost(worker.link)


async def test_a_defect_of_the_core_at_a_tick_is_told(shell, monkeypatch, caplog):
    worker = PlayedWorker(shell)
    stream = await shell.submit(request())

    def broken(event, now):
        raise ValueError("a defect")

    monkeypatch.setattr(shell.core, "handle", broken)
    await asyncio.wait_for(shell.failed.wait(), 10)
    with pytest.raises(InternalError):
        await next_of(stream)
    with pytest.raises(InternalError):
        await shell.drain()
    with pytest.raises(InternalError):
        worker.say(LoadReport(*SELF, ()))
    assert "a defect" in caplog.text
