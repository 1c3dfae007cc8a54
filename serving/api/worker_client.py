"""The gateway's end of the link to one worker: connects, and connects again."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import grpc

from lumen.errors import LumenError
from serving.api import wire
from serving.api.channel_options import LINK_OPTIONS
from serving.api.outbox import Outbox
from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.proto import lumen_internal_v1_pb2_grpc as pb_grpc
from serving.cluster.gateway_shell import GatewayShell
from serving.cluster.messages import ToWorker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts to connect, seconds: doubling from `first_s` up to `longest_s`.

    connect_s: an attempt that brought no message by then is given up.
    """

    first_s: float = 0.05
    longest_s: float = 1.0
    connect_s: float = 5.0

    def wait_s(self, failures: int) -> float:
        """The wait after that many failures in a row (at least one)."""
        return min(self.first_s * 2.0 ** min(failures - 1, 30), self.longest_s)


class WorkerClient:
    """Keeps a link to the worker at `address` (host:port) up for as long as `run` runs.

    A killed worker process breaks the stream at once; a silent host is noticed by keepalive.
    """

    def __init__(self, address: str, shell: GatewayShell, backoff: Backoff | None = None) -> None:
        self.address = address
        self._shell = shell
        self._backoff = backoff or Backoff()

    async def run(self) -> None:
        """Connect and read until cancelled. Raises InternalError if the gateway's core fails."""
        failures = 0
        while True:
            if await self._one_link():
                failures = 0
            failures += 1
            if self._shell.failed.is_set():
                return
            await asyncio.sleep(self._backoff.wait_s(failures))

    async def _one_link(self) -> bool:
        """Live through one link; whether it ever was up."""
        # A channel of its own: a shared one would wait out its own, longer backoff.
        async with grpc.aio.insecure_channel(self.address, options=LINK_OPTIONS) as channel:
            call = _stub(channel).Connect()
            outbox: Outbox[ToWorker] = Outbox(f"worker at {self.address}")
            writer = asyncio.create_task(self._write(call, outbox))
            link: int | None = None
            try:
                async with asyncio.timeout(self._backoff.connect_s):
                    batch = await call.read()
                while isinstance(batch, pb.GatewayBatch):  # else the end of the stream
                    if link is None:
                        link = self._shell.worker_connected(outbox.put)
                        _log.info("connected to the worker at %s", self.address)
                    for message in batch.messages:
                        self._shell.worker_message(link, wire.to_gateway_from_pb(message))
                    batch = await call.read()
            except (TimeoutError, grpc.aio.AioRpcError, LumenError) as error:
                self._say_lost(link, _sentence(error))
            except asyncio.CancelledError:
                # Also how a call ends that our writer gave up; only the other kind is for us.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                self._say_lost(link, "it does not read what it is sent")
            except Exception:
                _log.exception("reading from the worker at %s failed", self.address)
            finally:
                if link is not None:
                    self._shell.worker_lost(link)
                writer.cancel()
                call.cancel()
            return link is not None

    def _say_lost(self, link: int | None, why: str) -> None:
        # While a worker starts, every attempt fails; that is worth a line only to the curious.
        level = logging.DEBUG if link is None else logging.WARNING
        _log.log(level, "no link to the worker at %s: %s", self.address, why)

    async def _write(self, call: Any, outbox: Outbox[ToWorker]) -> None:
        try:
            async for messages in outbox:
                await call.write(pb.WorkerBatch(messages=map(wire.to_worker_to_pb, messages)))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            _log.debug("cannot write to the worker at %s: %s", self.address, _sentence(error))
        finally:
            # However writing ended, the link is of no use any more; this wakes the reader.
            call.cancel()


def _stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.WorkerLinkStub(channel)  # type: ignore[no-untyped-call]  # generated code


def _sentence(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
