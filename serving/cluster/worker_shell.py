"""The live shell of the worker core: one asyncio loop beside one thread per replica.

The core and all links live on the loop; engines live in their own threads and reach the loop by
`stepped` and `replica_failed`, one call per step. How messages reach a gateway is not known here:
a link is a `send` function given to `gateway_connected`.
"""

import asyncio
import logging
from collections.abc import Callable

from serving.cluster.messages import ToGateway, ToWorker
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import (
    DrainWorker,
    GatewayConnected,
    GatewayLost,
    GatewayMessage,
    PostToReplica,
    ReplicaFailed,
    ReplicaLoaded,
    ReplicaPublished,
    SendToGateway,
    WorkerDrained,
    WorkerEffect,
    WorkerEvent,
    WorkerTick,
)
from serving.engine.event_sink import EventSink, handle_recorded
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import RequestOutput
from serving.errors import InternalError
from serving.policy.snapshot import ReplicaLoad

_log = logging.getLogger(__name__)


class WorkerShell:
    """Runs a WorkerCore on the running event loop.

    Make it inside the loop, give its `stepped` and `replica_failed` to the replicas' threads
    (`serving.engine.loop`), then `attach` every replica's mailbox. Only those two may be called
    from other threads. If the core raises, which is a defect, nothing is handled any more and
    `broken` is set: the process should end and be restarted. `record` is told of every event and
    answer.
    """

    def __init__(self, core: WorkerCore, record: EventSink | None = None) -> None:
        self.broken = asyncio.Event()
        self._core = core
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._last_link = 0
        self._senders: dict[int, Callable[[ToGateway], None]] = {}
        self._mailboxes: dict[int, Callable[[AddRequest | CancelRequest], None]] = {}
        self._draining: list[asyncio.Future[None]] = []
        self._closed = False
        self._arm_timer()

    # What replicas call.

    def attach(self, replica: int, post: Callable[[AddRequest | CancelRequest], None]) -> None:
        """Give a replica's mailbox; `post` must not block."""
        self._mailboxes[replica] = post

    def stepped(self, replica: int, outputs: tuple[RequestOutput, ...], load: ReplicaLoad) -> None:
        """From any thread: what one step published (perhaps nothing), and the load after it."""
        self._from_thread(self._on_step, replica, outputs, load)

    def replica_failed(self, replica: int, reason: str) -> None:
        """From any thread: the replica's engine failed or its thread died."""
        self._from_thread(self._handle, ReplicaFailed(replica, reason))

    # What links call.

    def gateway_connected(self, send: Callable[[ToGateway], None]) -> int:
        """A link to a gateway is up; its number. `send` must neither block nor call back."""
        self._last_link += 1
        self._senders[self._last_link] = send
        self._handle(GatewayConnected(self._last_link))
        return self._last_link

    def gateway_message(self, link: int, message: ToWorker) -> None:
        """A message came over that link."""
        if link in self._senders:
            self._handle(GatewayMessage(link, message))

    def gateway_lost(self, link: int) -> None:
        """The link is down for good. Safe to call twice."""
        if self._senders.pop(link, None) is not None:
            self._handle(GatewayLost(link))

    # Life.

    async def drain(self) -> None:
        """Take nothing new; returns when nothing runs and all output is acknowledged."""
        drained = self._loop.create_future()
        self._draining.append(drained)
        self._handle(DrainWorker())
        await drained

    def close(self) -> None:
        """Stop handling events. Safe to call twice; calls from replica threads are dropped."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for drained in self._draining:
            drained.cancel()
        self._draining.clear()

    def _from_thread[*Arguments](
        self, function: Callable[[*Arguments], None], *arguments: *Arguments
    ) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop is gone: the process is ending and nobody is left to be told.
            if not self._loop.is_closed():
                raise

    def _on_step(self, replica: int, outputs: tuple[RequestOutput, ...], load: ReplicaLoad) -> None:
        # The load goes first: whoever sees an end in the outputs may ask for the load at once.
        self._handle(ReplicaLoaded(load))
        if outputs:
            self._handle(ReplicaPublished(replica, outputs))

    def _handle(self, event: WorkerEvent) -> None:
        if self._closed:
            return
        try:
            now = self._loop.time()
            effects = handle_recorded(self._core.handle, event, now, self._record)
            for effect in effects:
                self._carry_out(effect)
        except Exception:
            # The core raises for defects only; its books are not to be trusted any more.
            _log.exception("worker core failed at %s", type(event).__name__)
            for drained in self._draining:
                drained.set_exception(InternalError("The worker failed while it drained."))
            self._draining.clear()
            self.close()
            self.broken.set()
            return
        self._arm_timer()

    def _carry_out(self, effect: WorkerEffect) -> None:
        match effect:
            case SendToGateway(link, message):
                if (send := self._senders.get(link)) is not None:
                    send(message)
            case PostToReplica(replica, event):
                self._mailboxes[replica](event)
            case WorkerDrained():
                for drained in self._draining:
                    if not drained.done():
                        drained.set_result(None)
                self._draining.clear()

    def _arm_timer(self) -> None:
        due = self._core.next_due()
        if self._timer is not None:
            if due is not None and self._timer.when() <= due:
                return  # early ticks do no harm, and re-arming at every message would cost more
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._handle(WorkerTick())
