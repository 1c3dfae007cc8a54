"""The worker's shell: replica threads on one side, links on the other."""

import asyncio
import threading

import pytest

from serving.cluster.messages import (
    GatewayHeartbeat,
    LoadReport,
    ReplicaInfo,
    RequestAccepted,
    StepOutputs,
    SubmitRequest,
    WorkerHello,
)
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import WorkerConfig
from serving.cluster.worker_shell import WorkerShell
from serving.engine.events import AddRequest
from serving.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from serving.errors import InternalError
from serving.policy.snapshot import ReplicaLoad

LOAD = ReplicaLoad(0, 1, 0, 0, 64, 60, 0, 16, steps=7)


@pytest.fixture
async def worker():
    info = ReplicaInfo(0, 8, 1024, 1024, 16, 64)
    config = WorkerConfig("w", "one", "model", "revision", 100, (info,), report_interval_s=0.02)
    shell = WorkerShell(WorkerCore(config))
    yield shell
    shell.close()


class Gateway:
    def __init__(self, shell):
        self.shell = shell
        self.received = []
        self.link = shell.gateway_connected(self.received.append)

    def submit(self, request_id):
        request = EngineRequest(request_id, 1, (1, 2), SamplingParams())
        self.shell.gateway_message(self.link, SubmitRequest("g", 0, request))

    def of(self, kind):
        return [message for message in self.received if isinstance(message, kind)]

    async def until(self, kind, count=1):
        async with asyncio.timeout(10):
            while len(self.of(kind)) < count:
                await asyncio.sleep(0)
        return self.of(kind)


def output(request_id, start, *tokens, finish=None):
    return RequestOutput(request_id, 1, start, tokens, finish=finish)


def in_thread(function, *arguments):
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join(10)


async def test_one_step_is_one_message_and_its_load_is_known_by_then(worker):
    posted = []
    worker.attach(0, posted.append)
    gateway = Gateway(worker)
    assert isinstance(gateway.received[0], WorkerHello)
    gateway.submit("a")
    gateway.submit("b")
    assert [event.request.request_id for event in posted if isinstance(event, AddRequest)] == [
        "a",
        "b",
    ]
    assert len(gateway.of(RequestAccepted)) == 2
    in_thread(worker.stepped, 0, (output("a", 0, 5), output("b", 0, 6)), LOAD)
    messages = await gateway.until(StepOutputs)
    assert [[o.tokens for o in message.outputs] for message in messages] == [[(5,), (6,)]]
    reports = await gateway.until(LoadReport, len(gateway.of(LoadReport)) + 1)
    assert reports[-1].replicas == (LOAD,)


async def test_reports_come_by_the_timer(worker):
    gateway = Gateway(worker)
    await gateway.until(LoadReport, 4)


async def test_a_failed_replica_ends_its_requests_retriable(worker):
    worker.attach(0, lambda event: None)
    gateway = Gateway(worker)
    gateway.submit("a")
    in_thread(worker.replica_failed, 0, "a device fault")
    (message,) = await gateway.until(StepOutputs)
    (lost,) = message.outputs
    assert (lost.finish, lost.retriable) == (FinishReason.FAILED, True)
    assert "a device fault" in lost.detail


async def test_a_lost_gateway_gets_nothing_more(worker):
    worker.attach(0, lambda event: None)
    gateway = Gateway(worker)
    gateway.submit("a")
    worker.gateway_lost(gateway.link)
    worker.gateway_lost(gateway.link)
    before = len(gateway.received)
    gateway.submit("b")
    other = Gateway(worker)
    await other.until(LoadReport, 3)
    assert len(gateway.received) == before


async def test_drain_waits_for_what_runs_and_for_its_acknowledgement(worker):
    worker.attach(0, lambda event: None)
    gateway = Gateway(worker)
    gateway.submit("a")
    draining = asyncio.create_task(worker.drain())
    in_thread(worker.stepped, 0, (output("a", 0, 5, finish=FinishReason.STOP),), LOAD)
    await gateway.until(StepOutputs)
    assert not draining.done()
    worker.gateway_message(gateway.link, GatewayHeartbeat("g", (("a", 1),)))
    await asyncio.wait_for(draining, 10)


async def test_a_defect_of_the_core_is_told_and_ends_the_drain(worker, monkeypatch, caplog):
    worker.attach(0, lambda event: None)
    gateway = Gateway(worker)
    gateway.submit("a")
    draining = asyncio.create_task(worker.drain())
    await asyncio.sleep(0)
    monkeypatch.setattr(WorkerCore, "handle", None)
    await asyncio.wait_for(worker.broken.wait(), 10)
    with pytest.raises(InternalError):
        await draining
    in_thread(worker.stepped, 0, (), LOAD)
    assert "worker core failed" in caplog.text


def test_a_replica_that_outlives_the_loop_is_harmless():
    async def make():
        return WorkerShell(WorkerCore(WorkerConfig("w", "one", "m", "r", 100, ())))

    shell = asyncio.run(make())
    shell.close()
    shell.stepped(0, (), LOAD)
    shell.replica_failed(0, "too late")
