"""The worker core: which attempts run on this host's replicas, and their output until it is safe.

It stands between the gateways' messages, which may be repeated, late or lost, and the engines,
which see every attempt once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from serving.cluster.fences import FenceKey, Fences
from serving.cluster.messages import (
    AbortRequest,
    FetchOutput,
    GatewayHeartbeat,
    SubmitRequest,
    ToGateway,
    ToWorker,
)
from serving.cluster.timers import Timers, earlier
from serving.cluster.worker_attempts import Attempt, AttemptKey
from serving.cluster.worker_events import (
    DrainWorker,
    GatewayConnected,
    GatewayLost,
    GatewayMessage,
    PostToReplica,
    ReplicaFailed,
    ReplicaLoaded,
    ReplicaPublished,
    ReplicaRestored,
    SendToGateway,
    WorkerConfig,
    WorkerDrained,
    WorkerEffect,
    WorkerEvent,
    WorkerTick,
)
from serving.cluster.worker_messages import (
    accepted,
    hello,
    idle_load,
    load_report,
    step_outputs,
    unknown,
)
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import FinishReason, RequestOutput
from serving.errors import InternalError

type TimerKey = tuple[str, str, int]  # (kind, gateway or request id, attempt or 0)


@dataclass(slots=True)
class Peer:
    """A gateway that spoke to this worker. `link` is None while it is not connected."""

    link: int | None
    last_heard: float


class WorkerCore:
    """Accepts attempts, starts them on replicas and keeps their output. Sans I/O."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._replicas = {info.replica: info for info in config.replicas}
        self._loads = {info.replica: idle_load(info) for info in config.replicas}
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._fences = Fences(config.retain_ended_s)
        self._links: dict[int, None] = {}
        self._peers: dict[str, Peer] = {}
        self._timers: Timers[TimerKey] = Timers()
        self._timers.arm(("report", "", 0), 0.0)
        self._draining = False
        self._drain_unanswered = False
        self._effects: list[WorkerEffect] = []

    def next_due(self) -> float | None:
        """When the next WorkerTick is due, on the clock of `now`."""
        return earlier(self._timers.next_due(), self._fences.next_due())

    def report_due(self) -> float:
        """When the loads of the replicas are reported next."""
        due = self._timers.due(("report", "", 0))
        assert due is not None
        return due

    def is_idle(self) -> bool:
        """Nothing runs here and no output is kept."""
        return not self._attempts

    def attempts(self) -> Mapping[AttemptKey, Attempt]:
        """Everything held here, ended attempts included until acknowledged; to look at."""
        return self._attempts

    def running_on(self, replica: int) -> list[AttemptKey]:
        """Attempts that were started on a replica and have not ended."""
        return [
            attempt.key
            for attempt in self._attempts.values()
            if attempt.replica == replica and attempt.finish is None
        ]

    def check_invariants(self) -> None:
        """Raises InternalError at the first contradiction; for tests and the simulator."""
        newest: dict[FenceKey, Attempt] = {}
        for (request_id, number), attempt in self._attempts.items():
            fence = (attempt.gateway_id, request_id)
            if number > self._fences.newest(fence):
                raise InternalError(f"Attempt {number} of {request_id} is not fenced.")
            if (attempt.finish is not None) != self._timers.is_armed(("ended", *attempt.key)):
                raise InternalError(f"Attempt {number} of {request_id} may be kept for ever.")
            if attempt.finish is None and not attempt.cancelling:
                if fence in newest:
                    raise InternalError(f"Two attempts of {request_id} run on one worker.")
                newest[fence] = attempt
        self._fences.check_invariants()

    def handle(self, event: WorkerEvent, now: float) -> list[WorkerEffect]:
        """Take one event; return what is to be done, in order."""
        match event:
            case ReplicaPublished(replica, outputs):
                self._published(replica, outputs, now)
            case GatewayMessage(link, message):
                self._message(link, message, now)
            case ReplicaLoaded(load):
                healthy = self._loads[load.replica].healthy and load.healthy
                self._loads[load.replica] = replace(load, healthy=healthy)
            case GatewayConnected(link):
                self._links[link] = None
                self._report([link])
            case GatewayLost(link):
                self._links.pop(link, None)
                for peer in self._peers.values():
                    if peer.link == link:
                        peer.link = None
            case ReplicaFailed(replica, reason):
                self._replica_failed(replica, reason, now)
            case ReplicaRestored(replica):
                self._loads[replica] = idle_load(self._replicas[replica])
                self._report(list(self._links))
            case DrainWorker():
                self._draining = True
                self._drain_unanswered = True
                self._report(list(self._links))
            case WorkerTick():
                self._tick(now)
        if self._drain_unanswered and not self._attempts:
            self._drain_unanswered = False
            self._effects.append(WorkerDrained())
        effects, self._effects = self._effects, []
        return effects

    def _message(self, link: int, message: ToWorker, now: float) -> None:
        if link not in self._links:
            return
        peer = self._peers.get(message.gateway_id)
        if peer is None:
            peer = self._peers[message.gateway_id] = Peer(link, now)
            self._timers.arm(("gateway", message.gateway_id, 0), now + self._config.gateway_lease_s)
        peer.last_heard = now
        # Link numbers grow: the newest one is the one the gateway listens to.
        peer.link = link if peer.link is None else max(link, peer.link)
        match message:
            case SubmitRequest():
                self._submit(message, now)
            case AbortRequest(gateway_id, request_id, number):
                self._fences.touch((gateway_id, request_id), number, now)
                attempt = self._owned(gateway_id, request_id, number)
                if attempt is None:
                    self._send(gateway_id, unknown(self._config, (request_id, number)))
                elif attempt.finish is None:
                    self._cancel(attempt)
                else:
                    self._send_output(attempt, attempt.next_index)
            case FetchOutput(gateway_id, request_id, number, from_index):
                attempt = self._owned(gateway_id, request_id, number)
                if attempt is None:
                    self._send(gateway_id, unknown(self._config, (request_id, number)))
                elif attempt.finish is None and from_index >= attempt.next_index:
                    self._send(gateway_id, accepted(self._config, attempt.key))
                else:
                    self._send_output(attempt, from_index)
            case GatewayHeartbeat(gateway_id, acknowledged):
                for request_id, number in acknowledged:
                    attempt = self._owned(gateway_id, request_id, number)
                    if attempt is not None and attempt.finish is not None:
                        self._forget(attempt, now)

    # Attempts.

    def _submit(self, message: SubmitRequest, now: float) -> None:
        request = message.request
        key = (request.request_id, request.attempt)
        known = self._attempts.get(key)
        if (
            known is not None
            and known.gateway_id == message.gateway_id
            and known.is_repeated_by(request)
        ):
            self._send(message.gateway_id, accepted(self._config, known.key))
            return
        fence = (message.gateway_id, request.request_id)
        load = self._loads.get(message.replica)
        # `known`: two requests are named alike. A higher attempt number is free.
        if (
            known is not None
            or self._fences.blocks(fence, request.attempt)
            or self._draining
            or load is None
            or not load.healthy
        ):
            self._send(message.gateway_id, unknown(self._config, key))
            return
        self._fence_older(fence, request.attempt)
        self._fences.touch(fence, request.attempt, now)
        attempt = Attempt(message.gateway_id, message.replica, request)
        self._attempts[key] = attempt
        left = message.deadline_in_s
        rebased = replace(request, deadline=None if left is None else now + left)
        self._effects.append(PostToReplica(message.replica, AddRequest(rebased)))
        self._send(message.gateway_id, accepted(self._config, attempt.key))

    def _fence_older(self, fence: FenceKey, number: int) -> None:
        """A newer attempt of a request arrived: stop the older ones."""
        for attempt in self._held(fence):
            if attempt.request.attempt < number:
                self._cancel(attempt)

    def _held(self, fence: FenceKey) -> list[Attempt]:
        """All attempts of a request that are here, newest first."""
        numbers = range(self._fences.newest(fence), 0, -1)
        held = [self._owned(*fence, number) for number in numbers]
        return [attempt for attempt in held if attempt is not None]

    def _owned(self, gateway_id: str, request_id: str, number: int) -> Attempt | None:
        attempt = self._attempts.get((request_id, number))
        return attempt if attempt is not None and attempt.gateway_id == gateway_id else None

    def _cancel(self, attempt: Attempt) -> None:
        """Stop it, once; the engine publishes the end."""
        if attempt.finish is None and not attempt.cancelling:
            attempt.cancelling = True
            self._effects.append(PostToReplica(attempt.replica, CancelRequest(*attempt.key)))

    def _forget(self, attempt: Attempt, now: float) -> None:
        fence = (attempt.gateway_id, attempt.request.request_id)
        self._fences.touch(fence, attempt.request.attempt, now)
        del self._attempts[attempt.key]
        self._timers.disarm(("ended", *attempt.key))

    # Replicas.

    def _published(self, replica: int, outputs: tuple[RequestOutput, ...], now: float) -> None:
        by_gateway: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            attempt = self._attempts.get((output.request_id, output.attempt))
            if attempt is None or attempt.replica != replica or attempt.finish is not None:
                continue  # ended here already: its replica failed while this was on its way
            if attempt.append(output):
                self._timers.arm(("ended", *attempt.key), now + self._config.retain_ended_s)
            by_gateway.setdefault(attempt.gateway_id, []).append(output)
        for gateway_id, mine in by_gateway.items():
            self._send(gateway_id, step_outputs(self._config, replica, tuple(mine)))

    def _replica_failed(self, replica: int, reason: str, now: float) -> None:
        self._loads[replica] = replace(self._loads[replica], healthy=False)
        lost = tuple(
            RequestOutput(
                request_id=attempt.request.request_id,
                attempt=attempt.request.attempt,
                start_index=attempt.next_index,
                tokens=(),
                finish=FinishReason.FAILED,
                detail=f"Replica {replica} of worker {self._config.worker_id} failed: {reason}",
                retriable=True,
            )
            for attempt in self._attempts.values()
            if attempt.replica == replica and attempt.finish is None
        )
        self._published(replica, lost, now)
        self._report(list(self._links))

    # Time.

    def _tick(self, now: float) -> None:
        self._fences.expire(now, lambda fence: bool(self._held(fence)))
        for kind, name, number in self._timers.pop_due(now):
            match kind:
                case "report":
                    self._timers.arm((kind, name, number), now + self._config.report_interval_s)
                    self._report(list(self._links))
                case "ended":
                    self._forget(self._attempts[name, number], now)
                case "gateway":
                    self._gateway_due(name, now)

    def _gateway_due(self, gateway_id: str, now: float) -> None:
        """The lease of a gateway is over, unless it spoke meanwhile."""
        due = self._peers[gateway_id].last_heard + self._config.gateway_lease_s
        if now < due:
            self._timers.arm(("gateway", gateway_id, 0), due)
            return
        del self._peers[gateway_id]
        for attempt in list(self._attempts.values()):
            if attempt.gateway_id != gateway_id:
                continue
            if attempt.finish is None:
                self._cancel(attempt)
            else:
                self._forget(attempt, now)

    # Messages out.

    def _report(self, links: list[int]) -> None:
        loads = tuple(
            replace(load, draining=load.draining or self._draining) for load in self._loads.values()
        )
        for link in links:
            self._effects.append(SendToGateway(link, hello(self._config)))
            self._effects.append(SendToGateway(link, load_report(self._config, loads)))

    def _send(self, gateway_id: str, message: ToGateway) -> None:
        peer = self._peers.get(gateway_id)
        if peer is not None and peer.link is not None:
            self._effects.append(SendToGateway(peer.link, message))

    def _send_output(self, attempt: Attempt, from_index: int) -> None:
        outputs = (attempt.since(from_index),)
        self._send(attempt.gateway_id, step_outputs(self._config, attempt.replica, outputs))
