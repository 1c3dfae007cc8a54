"""Sends a workload: open loop at given times, or with a fixed number of streams."""

import asyncio
import time
from collections.abc import Callable, Sequence

from tools.bench.clients import Client
from tools.bench.record import RequestRecord
from tools.bench.workload import Task


async def run_open_loop(
    client: Client, tasks: Sequence[Task], ended: Callable[[], None]
) -> list[RequestRecord]:
    """Send each request when it is due, however many are still running."""
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        running = []
        for task in tasks:
            due = start + task.at_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            running.append(group.create_task(_send(client, task, due, ended)))
    return [one.result() for one in running]


async def run_streams(
    client: Client, tasks: Sequence[Task], streams: int, ended: Callable[[], None]
) -> list[RequestRecord]:
    """Keep `streams` requests running until all are done."""
    waiting = iter(tasks)

    async def stream() -> list[RequestRecord]:
        return [await _send(client, task, time.perf_counter(), ended) for task in waiting]

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(stream()) for _ in range(min(streams, len(tasks)))]
    return [record for one in running for record in one.result()]


async def _send(client: Client, task: Task, due: float, ended: Callable[[], None]) -> RequestRecord:
    record = RequestRecord(task, due)
    await client.send(task, record)
    ended()
    return record
