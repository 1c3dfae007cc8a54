"""The worker's end of the links to gateways: a servicer of `lumen.internal.v1.WorkerLink`."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lumen.errors import LumenError
from serving.api import wire
from serving.api.outbox import Outbox
from serving.api.proto import lumen_internal_v1_pb2 as pb
from serving.api.proto import lumen_internal_v1_pb2_grpc as pb_grpc
from serving.cluster.messages import ToGateway
from serving.cluster.worker_shell import WorkerShell

_log = logging.getLogger(__name__)


class WorkerLinkService(pb_grpc.WorkerLinkServicer):
    """One gateway per call. Engine code never runs here; see `WorkerShell`."""

    def __init__(self, shell: WorkerShell) -> None:
        self._shell = shell

    async def Connect(self, request_iterator: AsyncIterator[pb.WorkerBatch], context: Any) -> None:
        """Exchange messages until either side goes away; a lost link is told to the core."""
        outbox: Outbox[ToGateway] = Outbox(f"gateway at {context.peer()}")
        link = self._shell.gateway_connected(outbox.put)
        reader = asyncio.create_task(self._read(request_iterator, link, outbox))
        try:
            async for messages in outbox:
                batch = pb.GatewayBatch(messages=map(wire.to_gateway_to_pb, messages))
                await context.write(batch)
            said_goodbye = reader.done() and not reader.cancelled() and reader.result()
        finally:
            self._shell.gateway_lost(link)
            reader.cancel()
        if not said_goodbye:
            await context.abort(grpc.StatusCode.ABORTED, "the worker broke the link; connect again")

    async def _read(
        self, requests: AsyncIterator[pb.WorkerBatch], link: int, outbox: Outbox[ToGateway]
    ) -> bool:
        """Hand on what comes; then end the call. Whether the gateway ended it in good order."""
        try:
            async for batch in requests:
                for message in batch.messages:
                    self._shell.gateway_message(link, wire.to_worker_from_pb(message))
            return True
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            _log.info("the link from a gateway ended: %s", error)
        except LumenError as error:
            _log.warning("the link from a gateway broke: %s", error)
        except Exception:
            _log.exception("the link from a gateway broke")
        finally:
            # The call's task runs after this one has returned: it is woken, not called.
            outbox.close()
        return False
