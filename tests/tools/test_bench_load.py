"""The load loops with a client whose requests end when the test says so."""

import asyncio

from tools.bench.load import run_open_loop, run_streams
from tools.bench.workload import Task

TASKS = [Task((number,), 1) for number in range(6)]


class FakeClient:
    def __init__(self):
        self.gates = [asyncio.Event() for _ in TASKS]
        self.begun = asyncio.Queue()

    async def send(self, task, record):
        number = task.prompt[0]
        self.begun.put_nowait(number)
        await self.gates[number].wait()
        record.arrived(1)
        record.output_tokens = 1
        record.finish()


async def test_streams_start_a_request_only_when_one_ended():
    client = FakeClient()
    ended = []
    run = asyncio.create_task(run_streams(client, TASKS, 2, lambda: ended.append(1)))
    assert [await client.begun.get(), await client.begun.get()] == [0, 1]
    for number in range(4):
        assert client.begun.empty()
        client.gates[number].set()
        assert await client.begun.get() == number + 2
    client.gates[4].set()
    client.gates[5].set()
    records = await run
    assert sorted(record.task.prompt[0] for record in records) == list(range(6))
    assert len(ended) == 6


async def test_open_loop_does_not_wait_for_answers():
    client = FakeClient()
    run = asyncio.create_task(run_open_loop(client, TASKS, lambda: None))
    assert [await client.begun.get() for _ in TASKS] == list(range(6))
    for gate in reversed(client.gates):
        gate.set()
    records = await run
    assert [record.task for record in records] == TASKS
    assert not any(record.error for record in records)
