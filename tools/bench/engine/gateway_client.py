"""A process that sends requests to a gateway over gRPC and counts what comes back.

`python -m tools.bench.engine.gateway_client HOST:PORT`, spoken to by `tools.bench.engine.gateway`
in lines of JSON. It is given jobs, says "ready", sends them all at once when told to go, and
answers when the last has ended. Its own process, so that it takes no time from whom it measures.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

from serving.api.proto import lumen_v1_pb2 as pb
from tools.bench.clients import GrpcClient
from tools.bench.load import run_open_loop
from tools.bench.workload import Task

READY = "ready"
ARRIVALS_S = 0.05
"""Tokens are counted by such parts of time: all moments would be as much to tell as the tokens."""

_TIMEOUT_S = 600.0


async def _serve(address: str) -> None:
    client = GrpcClient(address, _TIMEOUT_S, pb.SLO_CLASS_BATCH)
    loop = asyncio.get_running_loop()

    async def heard() -> str:
        return await loop.run_in_executor(None, sys.stdin.readline)

    try:
        while line := await heard():
            tasks = [Task(tuple(prompt), output) for prompt, output in json.loads(line)]
            _say(READY)
            if not await heard():  # go
                return
            _say(await _sent(client, tasks))
    finally:
        await client.aclose()


async def _sent(client: GrpcClient, tasks: list[Task]) -> dict[str, Any]:
    """What became of requests sent all at once. Times are those of `time.perf_counter`, which is
    one clock for all processes of a machine."""
    started = time.perf_counter()
    records = await run_open_loop(client, tasks, lambda: None)
    arrivals: Counter[int] = Counter()
    for record in records:
        for at, count in record.arrivals:
            arrivals[int(at / ARRIVALS_S)] += count
    return {
        "started": started,
        "ended": max(record.ended_at for record in records),
        "tokens": sum(len(record.tokens) for record in records),
        "arrivals": sorted(arrivals.items()),
        "errors": [record.error for record in records if record.error],
    }


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
