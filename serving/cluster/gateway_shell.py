"""The live shell of the gateway core: one asyncio loop, its clock and its timer.

Everything here runs on one event loop and nothing blocks. The core decides; the shell numbers
streams and links, wakes clients and hands messages to whoever carries them. How messages reach a
worker is not known here: a link is a `send` function given to `worker_connected`.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from lumen.errors import LumenError
from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    ClientSubmit,
    Deliver,
    Drain,
    Drained,
    GatewayEffect,
    GatewayEvent,
    GatewayTick,
    Refuse,
    SendToWorker,
    StreamBroken,
    StreamEnded,
    StreamOpened,
    WorkerConnected,
    WorkerLost,
    WorkerMessage,
)
from serving.cluster.generation import Delta, GatewayInfo, GenerationRequest, TokenStream
from serving.cluster.messages import StepOutputs, ToGateway, ToWorker
from serving.engine.event_sink import EventSink, handle_recorded
from serving.engine.request import TokenLogprobs
from serving.errors import InternalError, UnavailableError

_log = logging.getLogger(__name__)

_WHY_CLOSED = "the gateway is shutting down; send the request again"
_WHY_FAILED = "the gateway failed; the server's log has the details"


class GatewayShell:
    """`Gateway` (see `serving.cluster.generation`) on the running event loop.

    Make it inside the loop. All methods are for that loop only. If the core raises, which is a
    defect, every stream fails with InternalError, nothing new is taken and `failed` is set: the
    process should then end and be restarted, since the core's state is not to be trusted. `record`
    is told of every event and answer.
    """

    def __init__(self, core: GatewayCore, record: EventSink | None = None) -> None:
        self.failed = asyncio.Event()
        self._core = core
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._last_number = 0
        self._streams: dict[int, _ClientStream] = {}  # those that have not ended
        self._opened: _ClientStream | None = None  # by the event just handled
        self._refused: dict[int, LumenError] = {}
        self._senders: dict[int, Callable[[ToWorker], None]] = {}
        self._draining: list[asyncio.Future[None]] = []
        self._ready_changed: list[Callable[[bool], None]] = []
        self._was_ready = False
        self._unusable: LumenError | None = None
        self._arm_timer()

    # What servicers call.

    async def submit(self, request: GenerationRequest) -> TokenStream:
        """See `Gateway.submit`. The deltas that are at hand at once are in the stream already."""
        number = self._number()
        return self._open(number, ClientSubmit(number, request))

    async def resume(self, request_id: str, from_index: int) -> TokenStream:
        """See `Gateway.resume`."""
        number = self._number()
        return self._open(number, ClientResume(number, request_id, from_index))

    async def abort(self, request_id: str) -> None:
        """See `Gateway.abort`."""
        number = self._number()
        self._handle(ClientCancel(number, request_id))
        self._raise_refusal(number)

    async def drain(self) -> None:
        """See `Gateway.drain`."""
        drained = self._loop.create_future()
        self._draining.append(drained)
        self._handle(Drain())
        await drained

    def info(self) -> GatewayInfo:
        """See `Gateway.info`."""
        return self._core.info()

    @property
    def core(self) -> GatewayCore:
        """For `/debug/decisions` and metrics, which only read."""
        return self._core

    def on_ready_change(self, callback: Callable[[bool], None]) -> None:
        """Call back now and whenever readiness to take requests changes."""
        self._ready_changed.append(callback)
        callback(self._was_ready)

    # What links call.

    def worker_connected(self, send: Callable[[ToWorker], None]) -> int:
        """A link to a worker is up; its number. `send` must neither block nor call back."""
        link = self._number()
        self._senders[link] = send
        self._handle(WorkerConnected(link))
        return link

    def worker_message(self, link: int, message: ToGateway) -> None:
        """A message came over that link."""
        if link in self._senders:
            self._handle(WorkerMessage(link, message))

    def worker_lost(self, link: int) -> None:
        """The link is down for good. Safe to call twice."""
        if self._senders.pop(link, None) is not None and self._unusable is None:
            self._handle(WorkerLost(link))

    # Life.

    def close(self) -> None:
        """Stop: streams still open fail with UnavailableError. Safe to call twice."""
        if self._unusable is None:
            self._end(UnavailableError(_WHY_CLOSED))

    def _end(self, why: LumenError) -> None:
        self._unusable = why
        if self._timer is not None:
            self._timer.cancel()
        for stream in list(self._streams.values()):
            stream.end(why)
        self._streams.clear()
        for drained in self._draining:
            if not drained.done():
                drained.set_exception(why)
        self._draining.clear()
        self._tell_readiness(ready=False)

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _open(self, number: int, event: ClientSubmit | ClientResume) -> "_ClientStream":
        self._handle(event)
        self._raise_refusal(number)
        stream, self._opened = self._opened, None
        assert stream is not None, "the core answers at once"
        return stream

    def _raise_refusal(self, number: int) -> None:
        error = self._refused.pop(number, None)
        if error is not None:
            raise error

    def _handle(self, event: GatewayEvent) -> None:
        if self._unusable is not None:
            raise self._unusable
        try:
            now = self._loop.time()
            effects = handle_recorded(self._core.handle, event, now, self._record)
        except Exception as error:
            # The core raises for defects only. Going on could deliver wrong tokens.
            _log.exception("gateway core failed at %s", type(event).__name__)
            self._end(InternalError(_WHY_FAILED))
            self.failed.set()
            raise InternalError(_WHY_FAILED) from error
        for effect in effects:
            self._carry_out(effect)
        self._arm_timer()
        self._check_readiness(event)

    def _carry_out(self, effect: GatewayEffect) -> None:
        match effect:
            case Deliver(number, delta):
                if (stream := self._streams.get(number)) is not None:
                    stream.push(delta)
            case SendToWorker(link, message):
                if (send := self._senders.get(link)) is not None:
                    send(message)
            case StreamOpened(number, request):
                self._opened = _ClientStream(request, number, self._let_go)
                self._streams[number] = self._opened
            case StreamEnded(number, error):
                if (stream := self._streams.pop(number, None)) is not None:
                    stream.end(error)
            case Refuse(number, error):
                self._refused[number] = error
            case Drained():
                for drained in self._draining:
                    if not drained.done():
                        drained.set_result(None)
                self._draining.clear()

    def _let_go(self, number: int) -> None:
        if self._streams.pop(number, None) is not None:
            self._handle(StreamBroken(number))

    def _arm_timer(self) -> None:
        due = self._core.next_due()
        if self._timer is not None:
            if due is not None and self._timer.when() <= due and not self._timer.cancelled():
                return  # early ticks do no harm, and re-arming at every message would cost more
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._unusable is None:
            with contextlib.suppress(InternalError):  # logged, and told by `failed`
                self._handle(GatewayTick())

    def _check_readiness(self, event: GatewayEvent) -> None:
        if isinstance(event, WorkerMessage) and isinstance(event.message, StepOutputs):
            return  # the frequent one, and it says nothing of health
        info = self._core.info()
        self._tell_readiness(info.ready and not info.draining)

    def _tell_readiness(self, ready: bool) -> None:
        if ready != self._was_ready:
            self._was_ready = ready
            for callback in self._ready_changed:
                callback(ready)


class _ClientStream:
    """`TokenStream`: whatever arrived since the client last asked is one delta.

    A slow reader therefore costs one delta with at most as many tokens as its request may have,
    which the core keeps anyway.
    """

    def __init__(
        self, request: GenerationRequest, number: int, let_go: Callable[[int], None]
    ) -> None:
        self.request = request
        self._ended = False
        self._number = number
        self._let_go = let_go
        self._news = asyncio.Event()
        self._error: LumenError | None = None
        self._start_index = 0
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cached_tokens = 0
        self._last: Delta | None = None  # the newest delta not yet taken: its end, its attempt

    def push(self, delta: Delta) -> None:
        """Append to what waits for the client."""
        if self._last is None:
            self._start_index = delta.start_index
        self._tokens.extend(delta.tokens)
        self._logprobs.extend(delta.logprobs)
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        self._last = delta
        self._news.set()

    def end(self, error: LumenError | None) -> None:
        """Nothing more comes; `error` is raised once what waits was taken."""
        self._ended = True
        self._error = error
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        await self._news.wait()
        if self._last is not None:
            return self._take(self._last)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `TokenStream.aclose`. What waits is dropped."""
        self._last = None
        self._error = None
        self._news.set()
        self._let_go(self._number)
        self._ended = True

    def _take(self, last: Delta) -> Delta:
        whole = Delta(
            start_index=self._start_index,
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish=last.finish,
            detail=last.detail,
            cached_tokens=self._cached_tokens,
            attempt=last.attempt,
        )
        self._tokens.clear()
        self._logprobs.clear()
        self._last = None
        if not self._ended:
            self._news.clear()
        return whole
