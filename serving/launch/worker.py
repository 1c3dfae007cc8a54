"""lumen-worker: owns this host's devices and runs the replicas on them."""

import asyncio
import functools
import gc
import logging
import sys
import time

from lumen.errors import LumenError
from serving.api.grpc_server import start_worker_server
from serving.cluster.messages import ReplicaInfo
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import WorkerConfig
from serving.cluster.worker_shell import WorkerShell
from serving.engine.core import EngineCore
from serving.engine.executor import Executor, ExecutorLimits
from serving.engine.loop import LoopPorts, ReplicaThread
from serving.incident.cores import EngineParts
from serving.launch.config import ServeConfig
from serving.launch.flags import EXIT_CONFIGURATION, parse
from serving.launch.jax_start import start_jax
from serving.launch.lifeline import Announce, watch_supervisor
from serving.launch.model import ServedModel, check_arena_holds_a_request, served_model
from serving.launch.progress import progress_display
from serving.launch.recording import recorder_of
from serving.launch.replicas import build_replicas
from serving.launch.signals import until_stopped
from serving.launch.supervisor import say

ABOUT = "run replicas of a model on this host's devices, for gateways to dispatch to."
EXAMPLE = "lumen-worker --model=/models/Llama-3.1-8B --listen=0.0.0.0:9000 --worker_id=host-1"

_THREAD_STOP_S = 2.0


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Parse, load, compile, serve. Returns the exit status."""
    try:
        line = parse("lumen-worker", argv, ABOUT, EXAMPLE)
        announce = watch_supervisor(line.supervisor)
        logging.basicConfig(level=line.config.life.verbosity.upper())
        devices = start_jax(line.config)
        with progress_display() as progress:
            model = served_model(line.config.model, progress)
            check_arena_holds_a_request(line.config.batching, model)
            replicas = build_replicas(line.config, model, devices, progress)
        # What is alive now stays alive: collections would walk all of it in vain, and a full one
        # is a pause that every request feels.
        gc.collect()
        gc.freeze()
        return asyncio.run(serve(line.config, model, replicas, announce))
    except LumenError as error:
        say(str(error))
        return EXIT_CONFIGURATION


async def serve(
    config: ServeConfig,
    model: ServedModel,
    replicas: list[tuple[EngineCore, Executor]],
    announce: Announce,
) -> int:
    """Serve gateways until told to stop (0) or until a replica or the core is lost (1)."""
    limits = [executor.limits for _, executor in replicas]
    settings = worker_config(config, model, limits)
    recorders = [recorder_of(config.record, settings.worker_id, settings)]
    shell = WorkerShell(WorkerCore(settings), recorders[0])
    loop = asyncio.get_running_loop()
    lost = asyncio.Event()

    def replica_failed(replica: int, reason: str) -> None:
        shell.replica_failed(replica, reason)
        loop.call_soon_threadsafe(lost.set)

    threads = []
    for number, (core, executor) in enumerate(replicas):
        name = f"{settings.worker_id}-replica-{number}"
        recorder = recorder_of(config.record, name, EngineParts(core.limits, core.config))
        recorders.append(recorder)
        stepped = functools.partial(shell.stepped, number)
        ports = LoopPorts(core, executor, stepped, loop.time, recorder)
        thread = ReplicaThread(ports, functools.partial(replica_failed, number))
        shell.attach(number, thread.post)
        shell.stepped(number, (), core.load())
        threads.append(thread)
        thread.start()
    server = await start_worker_server(shell, config.worker.listen)
    host = config.worker.listen.rpartition(":")[0]
    announce("ready", address=f"{host}:{server.port}")
    in_order = await until_stopped(shell.broken, lost)
    if in_order and config.life.drain_s:
        try:
            async with asyncio.timeout(config.life.drain_s):
                await shell.drain()
        except TimeoutError:
            say("some requests did not end in time; their gateway places them elsewhere.")
    # A failed device is rarely good for anything more: the process ends, is started again, and
    # gateways place its requests anew.
    await server.stop(0.0)
    shell.close()
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join(_THREAD_STOP_S)
    for recorder in recorders:
        if recorder is not None:
            recorder.close()
    return 0 if in_order else 1


def worker_config(
    config: ServeConfig, model: ServedModel, limits: list[ExecutorLimits]
) -> WorkerConfig:
    """Who this worker is: a new incarnation at each start."""
    return WorkerConfig(
        worker_id=config.worker.worker_id,
        incarnation=f"{time.time_ns():x}",
        model_id=model.model_id,
        model_revision=limits[0].model_revision,
        vocab_size=limits[0].vocab_size,
        replicas=tuple(ReplicaInfo.of(number, one) for number, one in enumerate(limits)),
        gateway_lease_s=config.worker.lease_s,
    )


if __name__ == "__main__":
    run()
