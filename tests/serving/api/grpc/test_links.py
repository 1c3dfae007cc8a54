"""Broken links and dead workers: the client's stream goes on with the same tokens."""

import asyncio
import math

import grpc
import pytest

from serving.api.outbox import Outbox
from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.proto import lumen_internal_v1_pb2_grpc as pb_grpc
from serving.api.worker_client import Backoff, WorkerClient
from serving.cluster.messages import GatewayHeartbeat


def tokens_of(chunks):
    tokens = []
    for chunk in chunks:
        assert chunk.start_index == len(tokens)
        tokens.extend(chunk.token_ids)
    return tuple(tokens)


async def test_a_stream_survives_a_broken_link(deploy, greedy, calls):
    deployment = await deploy(reconnect_grace_s=20.0)
    worker = deployment.worker
    worker.allow(6)
    request = greedy(max_tokens=40)
    call = deployment.stub.Generate(request)
    before = await calls.read_tokens(call, 3)
    await worker.hang_up()
    worker.allow(10)  # the worker goes on alone; what it makes meanwhile must not be lost
    await asyncio.wait_for(deployment.not_ready.wait(), 20)
    await worker.listen(deployment.port)
    await asyncio.wait_for(deployment.ready.wait(), 20)
    worker.allow(math.inf)
    chunks = [*before, *await calls.read_all(call)]
    assert tokens_of(chunks) == deployment.reference(request, 40)
    assert {chunk.attempt for chunk in chunks} == {1}


async def test_a_stream_survives_the_death_of_its_worker(deploy, greedy, calls):
    deployment = await deploy(reconnect_grace_s=0.05)
    dead = deployment.worker
    dead.allow(6)
    request = greedy(max_tokens=40, sampling={"temperature": 0.7, "seed": 3})
    call = deployment.stub.Generate(request)
    before = await calls.read_tokens(call, 3)
    await dead.stop()
    await asyncio.wait_for(deployment.not_ready.wait(), 20)
    await deployment.start_worker()
    chunks = [*before, *await calls.read_all(call)]
    assert tokens_of(chunks) == deployment.reference(request, 40)
    assert chunks[-1].attempt == 2
    assert chunks[-1].usage.prompt_tokens == 3
    assert chunks[-1].usage.completion_tokens == 40


async def test_a_failed_replica_hands_its_requests_to_the_other(deploy, greedy, calls):
    deployment = await deploy(replicas=2)
    worker = deployment.worker
    worker.allow(4)
    request = greedy(max_tokens=30)
    call = deployment.stub.Generate(request)
    before = await calls.read_tokens(call, 2)
    used = [executor.collected > 0 for executor in worker.executors].index(True)
    worker.executors[used].inner.fail("a device fault")
    worker.allow(math.inf)
    chunks = [*before, *await calls.read_all(call)]
    assert tokens_of(chunks) == deployment.reference(request, 30)
    assert chunks[-1].attempt >= 2


async def test_without_a_worker_a_request_waits_and_then_fails(deploy, greedy, calls):
    deployment = await deploy(worker=False, unplaced_timeout_s=0.05)
    chunks, error = await calls.read_until_error(deployment.stub.Generate(greedy()))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert chunks[-1].detail == error.details() != ""


async def test_a_gateway_that_talks_nonsense_loses_its_link_only(deploy, greedy, calls, caplog):
    deployment = await deploy()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{deployment.port}") as channel:
        call = pb_grpc.WorkerLinkStub(channel).Connect()
        batch = await call.read()
        assert batch.messages[0].hello.worker_id == "worker-0"
        await call.write(pb.WorkerBatch(messages=[pb.ToWorker()]))
        _, error = await calls.read_until_error(call)
    assert error.code() == grpc.StatusCode.ABORTED
    assert "of one version" in caplog.text
    await calls.read_all(deployment.stub.Generate(greedy()))


class FakeWorker(pb_grpc.WorkerLinkServicer):
    """Says one thing per link and then reads nothing."""

    def __init__(self, says):
        self.says = says
        self.links = 0
        self.linked_twice = asyncio.Event()

    async def Connect(self, request_iterator, context):
        self.links += 1
        await context.write(pb.GatewayBatch(messages=[self.says]))
        if self.links == 2:
            self.linked_twice.set()
        await asyncio.Event().wait()


class FakeGateway:
    """Floods each link with more than fits into its outbox at once."""

    def __init__(self, flood=0):
        self.failed = asyncio.Event()
        self.flood = flood
        self.lost = 0

    def worker_connected(self, send):
        for _ in range(self.flood):
            send(GatewayHeartbeat("g"))
        return 1

    def worker_message(self, link, message):
        pass

    def worker_lost(self, link):
        self.lost += 1


@pytest.mark.parametrize(
    ("says", "flood"),
    [
        pytest.param(pb.ToGateway(), 0, id="nothing known here"),
        pytest.param(
            pb.ToGateway(outputs=pb.StepOutputs(request_ids=["r"], attempts=[1, 2])),
            0,
            id="contradictions",
        ),
        pytest.param(pb.ToGateway(load=pb.LoadReport()), 5000, id="and does not read"),
    ],
)
async def test_a_worker_that_misbehaves_is_linked_again(says, flood, caplog):
    worker, gateway = FakeWorker(says), FakeGateway(flood)
    server = grpc.aio.server()
    pb_grpc.add_WorkerLinkServicer_to_server(worker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = WorkerClient(f"127.0.0.1:{port}", gateway, Backoff(first_s=0.01))
    running = asyncio.create_task(client.run())
    await asyncio.wait_for(worker.linked_twice.wait(), 20)
    assert gateway.lost >= 1
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    await server.stop(0)
    assert f"127.0.0.1:{port}" in caplog.text


async def test_an_outbox_gives_messages_in_order_and_ends():
    outbox = Outbox("a peer")
    reading = asyncio.create_task(collect(outbox))
    outbox.put(1)
    await asyncio.sleep(0)
    outbox.put(2)
    outbox.put(3)
    await asyncio.sleep(0)
    outbox.close()
    outbox.put(4)
    assert await reading == [[1], [2, 3]]


async def collect(outbox):
    return [messages async for messages in outbox]


async def test_what_waits_travels_together_up_to_a_limit():
    outbox = Outbox("a peer")
    for number in range(150):
        outbox.put(number)
    batches = [await anext(outbox) for _ in range(3)]
    assert [len(batch) for batch in batches] == [64, 64, 22]
    assert [number for batch in batches for number in batch] == list(range(150))
    outbox.put(150)
    assert await anext(outbox) == [150]


async def test_a_peer_that_does_not_read_breaks_its_outbox(caplog):
    outbox = Outbox("the lazy one", capacity=3)
    for number in range(5):
        outbox.put(number)
    assert await collect(outbox) == []
    assert "the lazy one" in caplog.text


def test_backoff_doubles_up_to_its_longest():
    backoff = Backoff(first_s=0.1, longest_s=1.0)
    assert [backoff.wait_s(n) for n in (1, 2, 3, 4, 5, 5000)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
