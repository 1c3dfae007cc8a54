"""kill -9 of the worker and of the gateway, with streams running."""

import asyncio

import grpc
import pytest

from tests.e2e.live import greedy, read, until_healthy, until_idle

PROMPT = "Once upon a time"


async def test_streams_go_on_when_the_worker_is_killed(live, channel, stub):
    requests = [greedy(f"{PROMPT} {number}", 300) for number in range(3)]
    undisturbed = [await read(stub.Generate(request)) for request in requests]
    calls = [stub.Generate(request) for request in requests]
    firsts = [await call.read() for call in calls]
    live.kill("worker")
    async with asyncio.timeout(60):
        disturbed = await asyncio.gather(
            *(read(call, [first]) for call, first in zip(calls, firsts, strict=True))
        )
    # The kill came in the middle: some tokens are of a later attempt.
    assert all(len(output.attempts) > 1 for output in disturbed)
    for expected, output in zip(undisturbed, disturbed, strict=True):
        assert len(output.tokens) == 300
        assert expected.same_as(output)
    await until_healthy(channel)
    await until_idle(stub)


async def test_a_killed_gateway_comes_back_on_its_ports(live, channel, stub):
    call = stub.Generate(greedy(PROMPT, 400))
    await call.read()
    live.kill("gateway")
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        await read(call)
    assert broken.value.code() == grpc.StatusCode.UNAVAILABLE
    await until_healthy(channel)
    assert len((await read(stub.Generate(greedy(PROMPT, 4)))).tokens) == 4
