"""A whole deployment in one process, on a tiny model and the real executor, with every core
recorded: gateway and worker shells on one loop, a replica in its thread.
"""

import asyncio
import functools
from pathlib import Path

import numpy as np

from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.gateway_shell import GatewayShell
from serving.cluster.generation import GenerationRequest
from serving.cluster.messages import ReplicaInfo
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import WorkerConfig
from serving.cluster.worker_shell import WorkerShell
from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.loop import LoopPorts, ReplicaThread
from serving.engine.request import FinishReason, SamplingParams
from serving.incident.cores import EngineParts
from serving.incident.recorder import open_recorder

REQUESTS = 6
LONG = "r5"
CANCELLED = "r1"


async def live_run(executor, folder: Path) -> dict[str, FinishReason]:
    """How the requests ended. The arena is too small for all of them at once."""
    limits = executor.limits
    opened = functools.partial(open_recorder, folder, limit_bytes=1 << 30)
    engine = EngineParts(limits, EngineConfig(decode_steps=2))
    info = ReplicaInfo.of(0, limits)
    at_worker = WorkerConfig("w", "one", "tiny", limits.model_revision, limits.vocab_size, (info,))
    at_gateway = GatewayConfig("g", heartbeat_interval_s=0.05)
    recorders = [
        opened("engine", engine, keep_answers=True),
        opened("worker", at_worker, keep_answers=False),
        opened("gateway", at_gateway, keep_answers=True),
    ]
    worker = WorkerShell(WorkerCore(at_worker), recorders[1])
    gateway = GatewayShell(GatewayCore(at_gateway), recorders[2])
    core = EngineCore(engine.limits, engine.config)
    loop = asyncio.get_running_loop()
    ports = LoopPorts(core, executor, functools.partial(worker.stepped, 0), loop.time, recorders[0])
    thread = ReplicaThread(ports, functools.partial(worker.replica_failed, 0))
    worker.attach(0, thread.post)
    worker.stepped(0, (), core.load())
    thread.start()
    _connect(loop, gateway, worker)
    try:
        async with asyncio.timeout(60):
            ends = await asyncio.gather(*(_generate(gateway, index) for index in range(REQUESTS)))
            await gateway.drain()
    finally:
        gateway.close()
        worker.close()
        thread.stop()
        assert await asyncio.to_thread(thread.join, 10.0)
        for recorder in recorders:
            recorder.close()
            assert recorder.lost == 0
    return {f"r{index}": end for index, end in enumerate(ends)}


def _connect(loop, gateway: GatewayShell, worker: WorkerShell) -> None:
    """Two links that deliver in order, at the loop's next turn."""
    links = []
    links.append(
        worker.gateway_connected(
            lambda message: loop.call_soon(lambda: gateway.worker_message(links[1], message))
        )
    )
    links.append(
        gateway.worker_connected(
            lambda message: loop.call_soon(lambda: worker.gateway_message(links[0], message))
        )
    )


async def _generate(gateway: GatewayShell, index: int) -> FinishReason:
    name = f"r{index}"
    while not gateway.info().ready:
        await asyncio.sleep(0.001)
    prompt = np.random.default_rng(index).integers(0, 500, 20 + index).tolist()
    sampling = SamplingParams(
        temperature=float(index % 2),
        seed=index,
        max_tokens=50,
        logprobs=2 if index == 3 else None,
        min_tokens=5 if index == 4 else 0,
        stop_token_ids=(7,) if index == 4 else (),
    )
    stream = await gateway.submit(GenerationRequest(name, tuple(prompt), sampling))
    async for delta in stream:
        if delta.finish is not None:
            return delta.finish
        if name == CANCELLED:
            await gateway.abort(name)
    raise AssertionError(f"{name} got no end")
