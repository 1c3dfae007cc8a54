"""lumen-gateway: the process clients talk to, over gRPC and HTTP."""

import asyncio
import logging
import secrets
import sys
import time
import uuid

from lumen.errors import LumenError
from serving.api.grpc_server import start_inference_server
from serving.api.http import FrontDoor, HttpServer
from serving.api.metrics import ServingMetrics
from serving.api.text import TextService
from serving.api.validation import ModelLimits
from serving.api.worker_client import WorkerClient
from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import GatewayConfig
from serving.cluster.gateway_shell import GatewayShell
from serving.errors import ConfigurationError
from serving.launch.config import ServeConfig
from serving.launch.flags import EXIT_CONFIGURATION, parse
from serving.launch.lifeline import Announce, watch_supervisor
from serving.launch.model import ServedModel, served_model
from serving.launch.recording import recorder_of
from serving.launch.signals import until_stopped
from serving.launch.supervisor import say

ABOUT = "the process clients talk to: dispatches to workers and keeps streams alive."
EXAMPLE = "lumen-gateway --model=/models/Llama-3.1-8B --workers=host-1:9000,host-2:9000"

_CLOSING_S = 1.0  # for connections that are still open when all requests have ended


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Parse, read the tokenizer, serve. Returns the exit status."""
    try:
        line = parse("lumen-gateway", argv, ABOUT, EXAMPLE)
        announce = watch_supervisor(line.supervisor)
        logging.basicConfig(level=line.config.life.verbosity.upper())
        return asyncio.run(serve(line.config, served_model(line.config.model), announce))
    except LumenError as error:
        say(str(error))
        return EXIT_CONFIGURATION


async def serve(config: ServeConfig, model: ServedModel, announce: Announce) -> int:
    """Serve clients until told to stop (0) or until the core is lost (1)."""
    door = config.front_door
    settings = gateway_config(config)
    recorder = recorder_of(config.record, settings.gateway_id, settings)
    gateway = GatewayShell(GatewayCore(settings), recorder)
    text = text_service(config, model)
    metrics = ServingMetrics(text.model_id, gateway.info)
    server = await start_inference_server(
        gateway,
        text,
        metrics,
        f"{_spelled(door.host)}:{door.grpc_port}",
        _body_bytes(config),
    )
    http = HttpServer(http_door(config, gateway, text, metrics))
    await http.start(door.host, door.http_port)
    links = [
        asyncio.create_task(WorkerClient(address, gateway).run())
        for address in worker_addresses(config)
    ]
    announce("ready")

    def tell(ready: bool) -> None:
        if ready:
            announce("serving", model=model.model_id)

    gateway.on_ready_change(tell)
    in_order = await until_stopped(gateway.failed)
    if in_order:
        try:
            async with asyncio.timeout(config.life.drain_s):
                await gateway.drain()
        except TimeoutError:
            say("some requests did not end in time; they are cut off.")
    gateway.close()
    await asyncio.gather(server.stop(_CLOSING_S), http.stop())
    for link in links:
        link.cancel()
    await asyncio.wait(links)
    if recorder is not None:
        recorder.close()
    return 0 if in_order else 1


def http_door(
    config: ServeConfig, gateway: GatewayShell, text: TextService, metrics: ServingMetrics
) -> FrontDoor:
    """What the HTTP handlers work with. Ids and seeds that nobody gave are drawn here."""
    return FrontDoor(
        gateway=gateway,
        text=text,
        metrics=metrics,
        draw_seed=lambda: secrets.randbits(32),
        new_id=lambda: uuid.uuid4().hex,
        clock=time.monotonic,
        wall_clock=time.time,
        started=int(time.time()),
        decisions=gateway.core.decisions,
        max_body_bytes=_body_bytes(config),
    )


def gateway_config(config: ServeConfig) -> GatewayConfig:
    """Settings of the core. The id is new at each start: what an earlier process submitted is
    not this one's.
    """
    return GatewayConfig(
        gateway_id=f"{config.gateway.gateway_id}-{time.time_ns():x}",
        max_queued_requests=config.front_door.max_queued_requests,
    )


def worker_addresses(config: ServeConfig) -> list[str]:
    """The addresses of --workers. Raises ConfigurationError if there are none."""
    addresses = [part.strip() for part in config.gateway.workers.split(",") if part.strip()]
    if not addresses:
        raise ConfigurationError(
            "--workers is empty; name the workers' addresses, for example "
            "--workers=127.0.0.1:9000 (lumen-serve starts a worker by itself)."
        )
    return addresses


def text_service(config: ServeConfig, model: ServedModel) -> TextService:
    """The text layer of the model. Raises ConfigurationError if the model has no tokenizer."""
    if model.resolved.tokenizer is None:
        raise ConfigurationError(
            f"--model: {model.resolved.origin} has no tokenizer, and clients send text; put its "
            "tokenizer.json into the folder."
        )
    limits = ModelLimits(
        vocab_size=model.resolved.source.config.vocab_size,
        max_model_len=model.max_model_len,
        max_resume_lease_s=config.front_door.max_resume_lease_s,
    )
    return TextService(
        model.model_id, model.resolved.tokenizer, limits, model.resolved.eos_token_ids
    )


def _body_bytes(config: ServeConfig) -> int:
    return int(config.front_door.max_body_mib * 2**20)


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    run()
