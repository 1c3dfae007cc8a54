"""The gateway core: clients on one side, workers that come and go on the other.

It decides who is heard and what is checked; `durable_requests` keeps the requests themselves and
`scheduler_core` the picture of the fleet.
"""

from collections.abc import Mapping

from serving.cluster.admission import check_fits
from serving.cluster.durable_requests import DurableRequests
from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    ClientSubmit,
    Drain,
    Drained,
    GatewayConfig,
    GatewayEffect,
    GatewayEvent,
    GatewayTick,
    Refuse,
    SendToWorker,
    StreamBroken,
    WorkerConnected,
    WorkerLost,
    WorkerMessage,
)
from serving.cluster.gateway_requests import Phase, RequestRecord
from serving.cluster.generation import GatewayInfo, GenerationRequest
from serving.cluster.messages import (
    GatewayHeartbeat,
    LoadReport,
    RequestAccepted,
    RequestUnknown,
    StepOutputs,
    ToGateway,
    WorkerHello,
)
from serving.cluster.scheduler_core import DispatchRecord, SchedulerCore, WorkerState
from serving.cluster.timers import Timers, earlier
from serving.engine.request import FinishReason
from serving.errors import (
    DrainingError,
    InvalidRequestError,
    QueueFullError,
    RequestExistsError,
    UnknownRequestError,
)
from serving.policy.dispatch import Dispatch, dispatch

type LinkTimer = tuple[str, str]  # ("heartbeat", "") or ("worker", worker_id)

REFUSALS = (
    DrainingError,
    InvalidRequestError,
    QueueFullError,
    RequestExistsError,
    UnknownRequestError,
)


class GatewayCore:
    """Durable requests over a changing fleet. Sans I/O: events and effects in `gateway_events`.

    policy: picks the replica of a request.
    """

    def __init__(self, config: GatewayConfig, policy: Dispatch = dispatch) -> None:
        self._config = config
        self._effects: list[GatewayEffect] = []
        self._scheduler = SchedulerCore(config.decisions_kept, policy)
        self._requests = DurableRequests(config, self._scheduler, self._effects)
        self._timers: Timers[LinkTimer] = Timers()
        self._timers.arm(("heartbeat", ""), 0.0)
        self._links: dict[int, str | None] = {}  # the worker that said hello over it
        self._draining = False
        self._drain_unanswered = False
        self._now = 0.0

    def next_due(self) -> float | None:
        """When the next GatewayTick is due, on the clock of `now`."""
        return earlier(self._timers.next_due(), self._requests.next_due())

    def info(self) -> GatewayInfo:
        """The current state, for clients and metrics."""
        queued = self._requests.admission.queued
        return GatewayInfo(
            gateway_id=self._config.gateway_id,
            ready=self._scheduler.ready(),
            draining=self._draining,
            queued=queued,
            running=self._requests.in_progress - queued,
            max_queued_requests=self._config.max_queued_requests,
            workers=tuple(worker.hello for worker in self._scheduler.connected()),
            fleet=self._scheduler.snapshot(),
        )

    def decisions(self) -> tuple[DispatchRecord, ...]:
        """The last placements with their inputs, oldest first."""
        return self._scheduler.decisions()

    def records(self) -> Mapping[str, RequestRecord]:
        """All requests by id, ended ones included until they are forgotten; to look at."""
        return self._requests.records

    def is_idle(self) -> bool:
        """No request is in progress or remembered and no worker has to be told anything."""
        return not self._requests.records and self._requests.ledger.is_empty()

    def check_invariants(self) -> None:
        """Recount everything. Raises InternalError at the first contradiction.

        For tests and the simulator, after every event; too slow for serving.
        """
        self._requests.check_invariants()

    def handle(self, event: GatewayEvent, now: float) -> list[GatewayEffect]:
        """Take one event; return what is to be done, in order."""
        self._now = self._requests.now = now
        match event:
            case WorkerMessage(link, message):
                self._message(link, message)
            case GatewayTick():
                self._requests.tick()
                self._tick()
            case ClientSubmit() | ClientResume() | ClientCancel():
                self._client(event)
            case StreamBroken(stream):
                self._requests.detach(stream)
            case Drain():
                self._draining = self._drain_unanswered = True
            case WorkerConnected(link):
                self._links[link] = None
                self._heartbeat(link, ())  # tells the worker who is here
            case WorkerLost(link):
                worker = self._worker_of(link)
                self._links.pop(link, None)
                if worker is not None:
                    self._lost(worker)
        if self._drain_unanswered and not self._requests.in_progress:
            self._drain_unanswered = False
            self._effects.append(Drained())
        effects = self._effects.copy()
        self._effects.clear()
        return effects

    # Clients.

    def _client(self, event: ClientSubmit | ClientResume | ClientCancel) -> None:
        try:
            match event:
                case ClientSubmit(stream, request):
                    self._check(request)
                    self._requests.accept(request, stream)
                case ClientResume(stream, request_id, from_index):
                    record = self._find(request_id)
                    check_resume(record, from_index)
                    self._requests.attach(record, stream, from_index)
                case ClientCancel(_, request_id):
                    record = self._find(request_id)
                    if record.phase is not Phase.ENDED:
                        self._requests.end(record, FinishReason.CANCELLED)
        except REFUSALS as error:
            number = event.call if isinstance(event, ClientCancel) else event.stream
            self._effects.append(Refuse(number, error))

    def _check(self, request: GenerationRequest) -> None:
        if self._draining:
            raise DrainingError("This server is about to stop; send the request elsewhere.")
        known = self._requests.records.get(request.request_id)
        if known is not None and known.phase is not Phase.ENDED:
            raise RequestExistsError(
                f"Request {request.request_id!r} is in progress; resume it or choose another id."
            )
        check_fits(request, self._scheduler.largest_context())

    def _find(self, request_id: str) -> RequestRecord:
        record = self._requests.records.get(request_id)
        if record is None:
            raise UnknownRequestError(
                f"No request {request_id!r} is known here: it never was, or it ended and the time "
                "in which it could be resumed is over."
            )
        return record

    # Workers.

    def _message(self, link: int, message: ToGateway) -> None:
        if isinstance(message, WorkerHello):
            self._hello(link, message)
            return
        worker = self._worker_of(link)
        if worker is None or worker.hello.incarnation != message.incarnation:
            return
        worker.heard_at = self._now
        match message:
            case StepOutputs(outputs=outputs):
                for output in outputs:
                    self._requests.output(worker, output)
            case RequestAccepted(request_id=request_id, attempt=attempt):
                self._requests.accepted(worker, request_id, attempt)
            case RequestUnknown(request_id=request_id, attempt=attempt):
                self._requests.unknown(worker, request_id, attempt)
            case LoadReport(replicas=replicas):
                self._scheduler.report(worker, replicas, self._now)
                self._requests.place_waiting()

    def _hello(self, link: int, hello: WorkerHello) -> None:
        if link not in self._links:
            return
        known = self._scheduler.worker(hello.worker_id)
        if known is not None and known.link is not None and known.link > link:
            return  # said over a link that a newer one has replaced
        self._links[link] = hello.worker_id
        earlier = self._scheduler.hello(link, hello, self._now)
        self._timers.arm(("worker", hello.worker_id), self._now + self._config.worker_silent_s)
        if earlier is None:
            pass
        elif earlier.hello.incarnation == hello.incarnation:
            self._requests.worker_back(hello.worker_id)
        else:
            why = "was restarted."
            self._requests.worker_gone(hello.worker_id, earlier.hello.incarnation, why)
        self._requests.place_waiting()

    def _worker_of(self, link: int) -> WorkerState | None:
        """The worker that is connected by this link and no newer one."""
        worker_id = self._links.get(link)
        worker = None if worker_id is None else self._scheduler.worker(worker_id)
        return worker if worker is not None and worker.link == link else None

    def _lost(self, worker: WorkerState) -> None:
        self._scheduler.lost(worker, self._now)
        grace_over = self._now + self._config.reconnect_grace_s
        self._timers.arm(("worker", worker.hello.worker_id), grace_over)

    # Time.

    def _tick(self) -> None:
        for kind, worker_id in self._timers.pop_due(self._now):
            if kind == "worker":
                self._look_at(worker_id)
                continue
            self._timers.arm((kind, worker_id), self._now + self._config.heartbeat_interval_s)
            for link in self._links:
                worker = self._worker_of(link)
                ledger = self._requests.ledger
                acknowledged = (
                    () if worker is None else ledger.take_acknowledgements(worker.hello.worker_id)
                )
                self._heartbeat(link, acknowledged)

    def _look_at(self, worker_id: str) -> None:
        """Whether a worker fell silent, did not come back, or is to be forgotten."""
        worker = self._scheduler.worker(worker_id)
        if worker is None:
            return
        config = self._config
        hello = worker.hello
        if worker.lost_at is None:
            silent_at = worker.heard_at + config.worker_silent_s
            if self._now < silent_at:
                self._timers.arm(("worker", worker_id), silent_at)
            else:
                self._lost(worker)
        elif self._now < worker.lost_at + config.reconnect_grace_s:
            self._timers.arm(("worker", worker_id), worker.lost_at + config.reconnect_grace_s)
        elif self._now < worker.lost_at + config.worker_lease_s:
            self._requests.worker_lost(worker_id, hello.incarnation, "was lost.")
            self._timers.arm(("worker", worker_id), worker.lost_at + config.worker_lease_s)
        else:
            self._scheduler.forget(worker_id)
            self._requests.worker_gone(worker_id, hello.incarnation, "was lost.")

    def _heartbeat(self, link: int, acknowledged: tuple[tuple[str, int], ...]) -> None:
        message = GatewayHeartbeat(self._config.gateway_id, acknowledged)
        self._effects.append(SendToWorker(link, message))


def check_resume(record: RequestRecord, from_index: int) -> None:
    """Raises InvalidRequestError if that token is not the next or one that was generated."""
    if not 0 <= from_index <= len(record.tokens):
        raise InvalidRequestError(
            f"from_index is {from_index}; request {record.request_id!r} has "
            f"{len(record.tokens)} tokens so far, so it must be from 0 to that.",
            parameter="from_index",
        )
