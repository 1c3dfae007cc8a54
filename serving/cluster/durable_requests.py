"""The gateway's requests: placed as attempts, placed again when one is lost, ended once.

An attempt gets the prompt and all tokens so far. Whatever an older attempt still says is ignored:
two attempts may differ in the last bits, so tokens of both must not mix.
"""

from serving.cluster.admission import Admission
from serving.cluster.attempt_ledger import AttemptLedger
from serving.cluster.client_streams import ClientStreams
from serving.cluster.gateway_events import (
    GatewayConfig,
    GatewayEffect,
    SendToWorker,
)
from serving.cluster.gateway_requests import Phase, Placement, RequestRecord
from serving.cluster.generation import GenerationRequest
from serving.cluster.messages import FetchOutput, SubmitRequest, ToWorker
from serving.cluster.scheduler_core import SchedulerCore, WorkerState
from serving.cluster.timers import Timers, earlier
from serving.engine.request import FinishReason, RequestOutput
from serving.errors import InternalError

_FIRST_BACKOFF_S = 0.05  # after a worker did not take the request; doubles up to
_LONGEST_BACKOFF_S = 1.0


class DurableRequests:
    """All requests of one gateway. `now` is set by the gateway core before it calls anything.

    records: by id, ended ones included until they are forgotten. in_progress: the others.
    """

    def __init__(
        self, config: GatewayConfig, scheduler: SchedulerCore, effects: list[GatewayEffect]
    ) -> None:
        self.now = 0.0
        self.records: dict[str, RequestRecord] = {}
        self.in_progress = 0
        self.admission = Admission(config.max_queued_requests)
        self.ledger = AttemptLedger(config.gateway_id, config.abort_retry_s, self._send)
        self._timers: Timers[str] = Timers()  # by request id
        self._config = config
        self._scheduler = scheduler
        self._effects = effects
        self._waiting: dict[str, RequestRecord] = {}  # those in Phase.WAITING
        self._streams = ClientStreams(effects)
        self._accepted = 0

    # Clients.

    def accept(self, request: GenerationRequest, stream: int) -> None:
        """Take a request that was checked. Raises QueueFullError."""
        self.admission.enter(self.now)
        older = self.records.get(request.request_id)
        deadline = None if request.deadline_s is None else self.now + request.deadline_s
        self._accepted += 1
        self.in_progress += 1
        record = RequestRecord(request, self._accepted, deadline, waiting_since=self.now)
        if older is not None:
            # Workers fence by attempt numbers, so they go on where that request ended.
            record.attempt = older.attempt
            self._forget(older)
        self.records[record.request_id] = record
        self._waiting[record.request_id] = record
        self._streams.open(record, stream)
        self.place_waiting()
        self._arm(record)

    def attach(self, record: RequestRecord, stream: int, from_index: int) -> None:
        """Another stream takes over, from that token on."""
        self._streams.open(record, stream)
        if record.phase is not Phase.ENDED:
            record.lease_until = None
        self._streams.deliver(record, from_index)

    def detach(self, stream: int) -> None:
        """The client of that stream is gone."""
        record = self._streams.broken(stream)
        if record is None:
            return
        if record.request.resume_lease_s <= 0:
            self.end(record, FinishReason.CANCELLED)
        else:
            record.lease_until = self.now + record.request.resume_lease_s
            self._arm(record)

    # Placing and ending.

    def place_waiting(self) -> None:
        """Place whatever waits: higher classes first, then in order of acceptance."""
        if not self._waiting or not self._scheduler.ready():
            return
        ready = [record for record in self._waiting.values() if record.not_before <= self.now]
        for record in sorted(ready, key=lambda r: (r.request.priority, r.order)):
            self._place(record)

    def _place(self, record: RequestRecord) -> None:
        chosen = self._scheduler.place(
            record.request_id,
            record.attempt + 1,
            record.context_tokens,
            int(record.request.priority),
            self.now,
        )
        if chosen is None:
            return
        worker, replica = chosen
        del self._waiting[record.request_id]
        hello = worker.hello
        placement = record.next_attempt(hello.worker_id, hello.incarnation, replica, self.now)
        self.ask(record, placement)

    def place_again(self, record: RequestRecord, why: str, *, backoff: bool = False) -> None:
        """The newest attempt is lost: wait for another replica, or give up.

        backoff: the worker did not take it, so the same choice at once would end the same way.
        """
        placement, record.placement = record.placement, None
        assert placement is not None
        self._scheduler.released(placement.worker_id, record.request_id, placement.attempt)
        if len(record.tokens) > len(placement.emitted):
            record.fruitless = 0
        elif placement.accepted:
            record.fruitless += 1
        record.move(Phase.WAITING)
        record.waiting_since = self.now
        record.refusals = record.refusals + 1 if backoff else 0
        if backoff:
            delay = _FIRST_BACKOFF_S * 2 ** min(record.refusals - 1, 8)
            record.not_before = self.now + min(delay, _LONGEST_BACKOFF_S)
        if record.fruitless >= self._config.max_fruitless_attempts:
            attempts = f"{record.fruitless} attempts in a row ended without a new token"
            self.end(record, FinishReason.FAILED, f"{attempts}; the last one: {why}")
            return
        self._waiting[record.request_id] = record
        self.place_waiting()
        self._arm(record)

    def end(
        self,
        record: RequestRecord,
        finish: FinishReason,
        detail: str = "",
        *,
        delivered: int | None = None,
    ) -> None:
        """The one end of a request. Its client gets it and its attempt is stopped.

        delivered: tokens the client has, if not all.
        """
        if record.queued:
            self.admission.leave(self.now)
        record.move(Phase.ENDED)
        self._waiting.pop(record.request_id, None)
        self.in_progress -= 1
        record.finish = finish
        record.detail = detail
        remembered = max(record.request.resume_lease_s, self._config.remember_finished_s)
        record.lease_until = self.now + remembered
        self._streams.deliver(record, len(record.tokens) if delivered is None else delivered)
        placement, record.placement = record.placement, None
        if placement is not None:
            self.close_attempt(placement.worker_id, record.request_id, placement.attempt)
        # Its old timer may be later than this one or be about what no longer matters.
        self._timers.disarm(record.request_id)
        self._arm(record)

    def _forget(self, record: RequestRecord) -> None:
        del self.records[record.request_id]
        self._timers.disarm(record.request_id)

    # What workers say.

    def accepted(self, worker: WorkerState, request_id: str, attempt: int) -> None:
        """The worker has that attempt."""
        record = self._current(worker, request_id, attempt)
        if record is None:
            self.close_attempt(worker.hello.worker_id, request_id, attempt)
        else:
            self._heard(worker, record)

    def unknown(self, worker: WorkerState, request_id: str, attempt: int) -> None:
        """The worker does not have that attempt."""
        worker_id = worker.hello.worker_id
        self.ledger.unknown(request_id, attempt)
        record = self._current(worker, request_id, attempt)
        if record is not None:
            self.place_again(record, f"worker {worker_id} did not hold it", backoff=True)

    def output(self, worker: WorkerState, output: RequestOutput) -> None:
        """New or repeated tokens of an attempt, and perhaps its end."""
        record = self._current(worker, output.request_id, output.attempt)
        if record is None:
            key = (worker.hello.worker_id, output.request_id, output.attempt)
            if output.finish is not None:
                self.ledger.ended(*key)
            else:
                self.close_attempt(*key)
            return
        delivered = len(record.tokens)
        placement = self._heard(worker, record)
        if not record.append(output):
            if not placement.gap:
                placement.gap = True
                self.ask(record, placement)
            return
        placement.gap = False
        if not delivered and record.tokens:
            self.admission.leave(self.now)
        if output.finish is None:
            self._streams.deliver(record, delivered)
            return
        worker_id = worker.hello.worker_id
        key = (worker_id, output.request_id, output.attempt)
        self.ledger.ended(*key)
        # A client's cancellation ends the record at once, so here it is the worker's own.
        if output.retriable or output.finish is FinishReason.CANCELLED:
            self._streams.deliver(record, delivered)
            self.place_again(record, output.detail or f"worker {worker_id} gave it up")
        else:
            self._scheduler.released(*key)
            record.placement = None
            self.end(record, output.finish, output.detail, delivered=delivered)

    def _current(self, worker: WorkerState, request_id: str, attempt: int) -> RequestRecord | None:
        """The request whose newest attempt this is, there and then; None fences everything else."""
        record = self.records.get(request_id)
        if record is None or record.placement is None:
            return None
        at, hello = record.placement, worker.hello
        if (
            at.attempt != attempt
            or at.worker_id != hello.worker_id
            or at.incarnation != hello.incarnation
        ):
            return None
        return record

    def _heard(self, worker: WorkerState, record: RequestRecord) -> Placement:
        placement = record.placement
        assert placement is not None
        placement.heard_at = self.now
        if not placement.accepted:
            placement.accepted = True
            record.refusals = 0
            self._scheduler.accepted(worker, record.request_id, placement.attempt)
        return placement

    # What becomes of workers.

    def worker_back(self, worker_id: str) -> None:
        """It is connected again and may have missed, or said, anything meanwhile."""
        for record, placement in self._placed_on(worker_id):
            self.ask(record, placement)
        self.ledger.abort_again(worker_id, self.now)

    def worker_lost(self, worker_id: str, incarnation: str, why: str) -> None:
        """Its requests go elsewhere. It may still run them, so their attempts are aborted."""
        for record, placement in self._placed_on(worker_id):
            if placement.incarnation == incarnation:
                self.close_attempt(worker_id, record.request_id, placement.attempt)
                self.place_again(record, f"worker {worker_id} {why}")

    def worker_gone(self, worker_id: str, incarnation: str, why: str) -> None:
        """That incarnation is over, and everything that ran there."""
        self.worker_lost(worker_id, incarnation, why)
        self.ledger.worker_gone(worker_id)

    def _placed_on(self, worker_id: str) -> list[tuple[RequestRecord, Placement]]:
        return [
            (record, record.placement)
            for record in self.records.values()
            if record.placement is not None and record.placement.worker_id == worker_id
        ]

    # Saying things until they are answered.

    def ask(self, record: RequestRecord, placement: Placement) -> None:
        """Send the submit, or once it was accepted ask for what came after the last token."""
        placement.asked_at = self.now
        gateway_id = self._config.gateway_id
        message: ToWorker
        if placement.accepted:
            message = FetchOutput(
                gateway_id, record.request_id, placement.attempt, len(record.tokens)
            )
        else:
            left = None if record.deadline is None else record.deadline - self.now
            request = record.engine_request(placement)
            message = SubmitRequest(gateway_id, placement.replica, request, left)
        self._send(placement.worker_id, message)
        self._arm(record)

    def close_attempt(self, worker_id: str, request_id: str, attempt: int) -> None:
        """Nobody wants this attempt any more: abort it until its end is known."""
        self._scheduler.released(worker_id, request_id, attempt)
        self.ledger.close(worker_id, request_id, attempt, self.now)

    def _send(self, worker_id: str, message: ToWorker) -> None:
        worker = self._scheduler.worker(worker_id)
        if worker is not None and worker.link is not None:
            self._effects.append(SendToWorker(worker.link, message))

    # Time.

    def next_due(self) -> float | None:
        """When `tick` is due."""
        return earlier(self._timers.next_due(), self.ledger.next_due())

    def tick(self) -> None:
        """Do what is due."""
        self.ledger.tick(self.now)
        for request_id in self._timers.pop_due(self.now):
            self._look_at(self.records[request_id])

    def _look_at(self, record: RequestRecord) -> None:
        if record.lease_until is not None and self.now >= record.lease_until:
            if record.phase is not Phase.ENDED:
                self.end(record, FinishReason.CANCELLED, "Nobody resumed it within its lease.")
            elif self.ledger.is_closing(record.request_id):
                # A new request of that name would number its attempts like the one still open.
                record.lease_until = self.now + self._config.remember_finished_s
                self._arm(record)
            else:
                self._forget(record)
            return
        if record.deadline is not None and self.now >= record.deadline:
            detail = f"The deadline passed after {len(record.tokens)} tokens."
            self.end(record, FinishReason.DEADLINE, detail)
            return
        if record.phase is Phase.WAITING:
            waited = self._config.unplaced_timeout_s
            if self.now >= record.waiting_since + waited:
                detail = f"No worker could take the request within {waited:g} s; try again later."
                self.end(record, FinishReason.FAILED, detail)
                return
            self.place_waiting()
        elif record.placement is not None and self.now >= record.placement.ask_due(self._config):
            self.ask(record, record.placement)
        self._arm(record)

    def _arm(self, record: RequestRecord) -> None:
        self._timers.arm(record.request_id, record.next_due(self._config, self.now))

    def check_invariants(self) -> None:
        """Recount. Raises InternalError at the first contradiction; for tests and the simulator."""
        self._streams.check_invariants(self.records)
        in_progress = queued = 0
        for request_id, record in self.records.items():
            in_progress += record.phase is not Phase.ENDED
            queued += record.queued
            if (record.phase is Phase.WAITING) != (request_id in self._waiting):
                raise InternalError(
                    f"Request {request_id} waits, or is in the queue, but not both."
                )
            if (record.phase is Phase.PLACED) != (record.placement is not None):
                raise InternalError(f"Request {request_id} is placed nowhere, or placed in vain.")
            if (record.phase is Phase.ENDED) != (record.finish is not None):
                raise InternalError(f"Request {request_id} has an end and goes on, or has none.")
            if not self._timers.is_armed(request_id):
                raise InternalError(f"Nothing will ever look at request {request_id} again.")
        if in_progress != self.in_progress:
            raise InternalError(f"{in_progress} requests are open, {self.in_progress} are counted.")
        if queued != self.admission.queued:
            raise InternalError("The count of queued requests is wrong.")
