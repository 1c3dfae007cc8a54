"""gRPC servers: the gateway's public one with health and reflection, and the worker's."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]  # no stub
from grpc_reflection.v1alpha import reflection

from serving.api.channel_options import LINK_SERVER_OPTIONS, public_server_options
from serving.api.inference_service import InferenceService
from serving.api.metrics import ServingMetrics
from serving.api.proto import lumen_internal_v1_pb2_grpc as internal_grpc
from serving.api.proto import lumen_v1_pb2
from serving.api.proto import lumen_v1_pb2_grpc as public_grpc
from serving.api.status_interceptor import StatusInterceptor
from serving.api.text import TextService
from serving.api.worker_service import WorkerLinkService
from serving.cluster.gateway_shell import GatewayShell
from serving.cluster.worker_shell import WorkerShell
from serving.errors import ConfigurationError

INFERENCE_SERVICE = lumen_v1_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

_HEALTH_OF = ("", INFERENCE_SERVICE)  # "" is the whole server


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server and the port it listens on."""

    server: grpc.aio.Server
    port: int

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; cut those that still run after `grace_s`."""
        await self.server.stop(grace_s)


async def start_inference_server(
    gateway: GatewayShell,
    text: TextService,
    metrics: ServingMetrics,
    address: str,
    max_message_bytes: int = 4 * 1024 * 1024,
) -> RunningServer:
    """Serve lumen.v1.Inference, grpc.health.v1.Health and reflection at `address` (host:port).

    Health is SERVING while a healthy replica is connected and the gateway is not draining. Port
    0 takes a free one. Raises ConfigurationError if the port is taken.
    """
    server = grpc.aio.server(
        interceptors=[StatusInterceptor(INFERENCE_SERVICE)],
        options=public_server_options(max_message_bytes),
    )
    service = InferenceService(gateway, text, metrics, max_message_bytes)
    public_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (INFERENCE_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    running = await _started(server, address)
    gateway.on_ready_change(_HealthTeller(health).tell)
    return running


async def start_worker_server(shell: WorkerShell, address: str) -> RunningServer:
    """Serve lumen.internal.v1.WorkerLink at `address` (host:port).

    Port 0 takes a free one. Raises ConfigurationError if the port is taken.
    """
    server = grpc.aio.server(options=LINK_SERVER_OPTIONS)
    service = WorkerLinkService(shell)
    internal_grpc.add_WorkerLinkServicer_to_server(service, server)  # type: ignore[no-untyped-call]  # generated
    return await _started(server, address)


async def _started(server: grpc.aio.Server, address: str) -> RunningServer:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigurationError(
            f"Cannot listen on {address}: the port is taken or the address is not this "
            "machine's. Choose another one, or port 0 for any free port."
        ) from error
    await server.start()
    return RunningServer(server, port)


class _HealthTeller:
    """Carries readiness, which changes in plain calls, to the health servicer, which awaits."""

    def __init__(self, health: health_aio.HealthServicer) -> None:
        self._health = health
        self._ready = False
        self._telling: asyncio.Task[None] | None = None

    def tell(self, ready: bool) -> None:
        """Readiness is now this."""
        self._ready = ready
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        told: bool | None = None
        while told != self._ready:
            told = self._ready
            status = health_pb2.HealthCheckResponse.ServingStatus.Value(
                "SERVING" if told else "NOT_SERVING"
            )
            await _set_all(self._health, _HEALTH_OF, status)


async def _set_all(health: health_aio.HealthServicer, services: Sequence[str], status: int) -> None:
    for service in services:
        await health.set(service, status)
