"""Which mishaps met requests in which stage of the protocol, counted while runs go on.

A seed that passes proves little if nothing happened in it at an awkward moment. So every mishap
is entered under the stage of each request that it concerns, as the cores have it at that moment.
"""

import enum
from collections import Counter
from collections.abc import Iterable, Sequence

from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    GatewayEvent,
    GatewayTick,
    StreamBroken,
)
from serving.cluster.gateway_requests import Phase, RequestRecord
from serving.cluster.messages import (
    GatewayHeartbeat,
    LoadReport,
    StepOutputs,
    SubmitRequest,
    ToGateway,
    ToWorker,
    WorkerHello,
)
from serving.cluster.worker_attempts import Attempt, AttemptKey
from serving.engine.active import RequestState
from serving.engine.core import EngineCore
from serving.policy.snapshot import ReplicaLoad
from serving.sim.faults.scenario import Fault, FaultPlan
from serving.sim.faults.worker_node import WorkerNode
from serving.sim.faults.worker_site import WorkerSite
from serving.sim.gateway_node import GatewayNode
from serving.sim.watch import Mishap


class Stage(enum.Enum):
    """Where a request stands, in the order in which it gets there.

    A request is in one of them, but CONTINUED and AWAY are counted beside another.
    """

    QUEUED = "queued at gateway"
    SENT = "sent, not accepted"
    WAITING = "waiting in engine"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    UNDELIVERED = "ended, not delivered"
    GONE = "gone with its worker"  # and the gateway does not know yet
    AGAIN = "to be placed again"
    KEPT = "ended, worker keeps it"  # until the gateway's acknowledgement arrives
    ENDED = "ended, remembered"
    OLDER = "older attempt"  # of a request that has a newer one
    CONTINUED = "resumed from tokens"  # of an earlier attempt
    AWAY = "client away"


_STAGES = {
    RequestState.WAITING: Stage.WAITING,
    RequestState.PREFILLING: Stage.PREFILLING,
    RequestState.DECODING: Stage.DECODING,
}
_FAULTS = {
    Fault.CRASH: Mishap.CRASH,
    Fault.CUT: Mishap.CUT,
    Fault.PARTITION: Mishap.PARTITION,
    Fault.STALL: Mishap.STALL,
    Fault.REPLICA: Mishap.REPLICA,
}
_ON_AN_ENGINE = frozenset({Stage.WAITING, Stage.PREFILLING, Stage.DECODING})
_WITHOUT_MESSAGE = frozenset({Stage.QUEUED, Stage.AGAIN})
_PER_MESSAGE = frozenset({Mishap.LOSS, Mishap.DUPLICATION, Mishap.REORDER})
_OF_CLIENTS = frozenset({Mishap.CANCEL, Mishap.BREAK, Mishap.RESUME, Mishap.DEADLINE})
_OF_ENGINES = frozenset({Mishap.PREEMPTION, Mishap.NO_BLOCKS})


def possible(stage: Stage, mishap: Mishap) -> bool:
    """Whether the two can meet at all; the other cells of the table are blank."""
    if stage is Stage.CONTINUED:
        return True
    if mishap in _OF_ENGINES:
        allowed = _ON_AN_ENGINE - {Stage.WAITING} if mishap is Mishap.PREEMPTION else _ON_AN_ENGINE
        return stage in allowed
    if stage is Stage.OLDER:
        return mishap not in _OF_CLIENTS
    if mishap in _PER_MESSAGE:
        return stage not in _WITHOUT_MESSAGE
    if mishap in (Mishap.CANCEL, Mishap.BREAK, Mishap.DEADLINE):
        over = stage in (Stage.KEPT, Stage.ENDED)
        return not over and (stage, mishap) != (Stage.AWAY, Mishap.BREAK)
    return mishap in _OF_CLIENTS or stage is not Stage.ENDED


class Coverage:
    """Hits of every (stage, mishap), over as many runs as are added."""

    def __init__(self) -> None:
        self.hits: Counter[tuple[Stage, Mishap]] = Counter()

    def add(self, other: "Coverage") -> None:
        """Take over the hits of other runs."""
        self.hits.update(other.hits)

    def missed(self) -> list[tuple[Stage, Mishap]]:
        """Cells that can be hit and never were."""
        cells = ((stage, mishap) for stage in Stage for mishap in Mishap)
        return [cell for cell in cells if possible(*cell) and not self.hits[cell]]

    def table(self) -> str:
        """One line per stage and one column per mishap; "." means never hit."""
        heads = [mishap.value.split()[-1][:11] for mishap in Mishap]
        width = max(len(stage.value) for stage in Stage)
        lines = [" " * width + "".join(f" {head:>11}" for head in heads)]
        for stage in Stage:
            cells = "".join(f" {self._cell(stage, mishap):>11}" for mishap in Mishap)
            lines.append(f"{stage.value:<{width}}{cells}".rstrip())
        return "\n".join(lines)

    def _cell(self, stage: Stage, mishap: Mishap) -> str:
        hits = self.hits[stage, mishap]
        if hits:
            return str(hits)
        return "." if possible(stage, mishap) else ""


class CoverageWatch:
    """Implements Watch for one run: looks at its cores and enters hits into a Coverage."""

    def __init__(
        self, coverage: Coverage, gateway: GatewayNode, sites: Sequence[WorkerSite]
    ) -> None:
        self._hits = coverage.hits
        self._gateway = gateway
        self._sites = sites
        self._states: dict[str, dict[AttemptKey, RequestState]] = {}  # at the last look
        self._dry: set[str] = set()  # replicas without a block to give at the last look

    def struck(self, plan: FaultPlan) -> None:
        """A fault of the scenario is about to strike: all that wait are hit, and all there."""
        site = self._sites[plan.worker]
        node = site.node
        if node is None or not (site.connected or plan.fault in (Fault.CRASH, Fault.REPLICA)):
            return  # it changes nothing
        only = plan.replica if plan.fault is Fault.REPLICA else None
        current = set()
        for record in self._gateway.core.records().values():
            at = record.placement
            if at is not None:
                current.add((record.request_id, at.attempt))
            there = at is not None and at.worker_id == site.setup.worker_id
            if record.phase is Phase.WAITING or (
                at is not None and there and only in (None, at.replica)
            ):
                self._hit(self._stages(record), _FAULTS[plan.fault])
        for key, attempt in node.core.attempts().items():
            if key not in current and only in (None, attempt.replica):
                self._hit(self._attempt_stages(key), _FAULTS[plan.fault])

    def gateway_event(self, event: GatewayEvent, now: float) -> None:
        """Acts of clients, and deadlines that pass."""
        records = self._gateway.core.records()
        match event:
            case ClientCancel(_, request_id) | ClientResume(_, request_id):
                cancel = isinstance(event, ClientCancel)
                if request_id in records:
                    mishap = Mishap.CANCEL if cancel else Mishap.RESUME
                    self._hit(self._stages(records[request_id]), mishap)
            case StreamBroken(stream):
                for record in records.values():
                    if record.stream == stream:
                        self._hit(self._stages(record), Mishap.BREAK)
            case GatewayTick():
                for record in records.values():
                    due = record.deadline is not None and record.deadline <= now
                    if due and record.phase is not Phase.ENDED:
                        self._hit(self._stages(record), Mishap.DEADLINE)

    def message(self, message: ToGateway | ToWorker, mishap: Mishap) -> None:
        """A message is lost, doubled or overtakes another."""
        for key in _attempts_of(message):
            self._hit(self._attempt_stages(key), mishap)

    def engine_stepped(self, name: str, engine: EngineCore, load: ReplicaLoad) -> None:
        """Look for requests that lost their blocks, and for an arena that has none left."""
        before = self._states.get(name, {})
        states = self._states[name] = engine.states()
        for key, state in states.items():
            was = before.get(key, state)
            if was is not state and state is RequestState.WAITING:
                self._hit_engine(key, was, Mishap.PREEMPTION)
        if load.free_blocks or load.cached_blocks:
            self._dry.discard(name)
        elif name not in self._dry:
            self._dry.add(name)
            for key, state in states.items():
                self._hit_engine(key, state, Mishap.NO_BLOCKS)

    def _hit(self, stages: Iterable[Stage], mishap: Mishap) -> None:
        for stage in stages:
            self._hits[stage, mishap] += 1

    def _hit_engine(self, key: AttemptKey, state: RequestState, mishap: Mishap) -> None:
        attempt = self._held(key)
        continued = attempt is not None and attempt.start_index > 0
        self._hit((_STAGES[state], *([Stage.CONTINUED] if continued else [])), mishap)

    def _attempt_stages(self, key: AttemptKey) -> tuple[Stage, ...]:
        """The stages of what a message or a worker says it is about."""
        request_id, number = key
        record = self._gateway.core.records().get(request_id)
        if record is None:
            return ()  # long over
        if number != record.attempt or (
            record.phase is Phase.WAITING  # this attempt was given up, the next is not there yet
        ):
            return (Stage.OLDER,)
        return self._stages(record)

    def _stages(self, record: RequestRecord) -> tuple[Stage, ...]:
        stages = [self._stage(record)]
        placement = record.placement
        if placement is not None and placement.emitted:
            stages.append(Stage.CONTINUED)
        if record.stream is None and record.phase is not Phase.ENDED:
            stages.append(Stage.AWAY)
        return tuple(stages)

    def _stage(self, record: RequestRecord) -> Stage:
        key = (record.request_id, record.attempt)
        if record.phase is Phase.ENDED:
            return Stage.ENDED if self._held(key) is None else Stage.KEPT
        placement = record.placement
        if placement is None:
            return Stage.AGAIN if record.attempt else Stage.QUEUED
        node = self._node(placement.incarnation)
        attempt = None if node is None else node.core.attempts().get(key)
        if node is None or (attempt is None and placement.accepted):
            return Stage.GONE
        if attempt is None or not placement.accepted:
            return Stage.SENT
        if attempt.finish is not None:
            return Stage.UNDELIVERED
        state = node.replicas[attempt.replica].core.state(*key)
        return Stage.WAITING if state is None else _STAGES[state]

    def _node(self, incarnation: str) -> WorkerNode | None:
        for site in self._sites:
            if site.node is not None and site.node.name == incarnation:
                return site.node
        return None

    def _held(self, key: AttemptKey) -> Attempt | None:
        for site in self._sites:
            if site.node is not None and key in site.node.core.attempts():
                return site.node.core.attempts()[key]
        return None


def _attempts_of(message: ToGateway | ToWorker) -> tuple[AttemptKey, ...]:
    """The attempts that a message is about."""
    match message:
        case SubmitRequest(request=request):
            return ((request.request_id, request.attempt),)
        case StepOutputs(outputs=outputs):
            return tuple((output.request_id, output.attempt) for output in outputs)
        case GatewayHeartbeat(acknowledged=acknowledged):
            return acknowledged
        case WorkerHello() | LoadReport():
            return ()
        case _:
            return ((message.request_id, message.attempt),)
