"""The shell of the worker core in virtual time.

A crash destroys the shell with everything in flight: no `finally`, no goodbye.
"""

from dataclasses import dataclass, replace
from functools import partial

from serving.cluster.messages import ReplicaInfo
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import (
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
    WorkerEvent,
    WorkerTick,
)
from serving.engine.config import EngineConfig
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import RequestOutput
from serving.policy.snapshot import ReplicaLoad
from serving.sim.alarm import Alarm
from serving.sim.faults.oracle import Numerics, Oracle
from serving.sim.modelled_executor import ModelledExecutor
from serving.sim.replica_node import ReplicaNode
from serving.sim.transport import Link, LinkEnd
from serving.sim.world import World


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every incarnation of a worker is built from. Times in seconds."""

    worker_id: str
    numerics: Numerics
    engine: EngineConfig
    replicas: int
    report_interval_s: float
    gateway_lease_s: float
    retain_ended_s: float
    replica_restored_after_s: float


class WorkerNode:
    """Runs a WorkerCore with one ReplicaNode per replica."""

    def __init__(self, world: World, setup: WorkerSetup, incarnation: str, oracle: Oracle) -> None:
        limits = setup.numerics.limits
        config = WorkerConfig(
            worker_id=setup.worker_id,
            incarnation=incarnation,
            model_id="model",
            model_revision=limits.model_revision,
            vocab_size=limits.vocab_size,
            replicas=tuple(ReplicaInfo.of(replica, limits) for replica in range(setup.replicas)),
            report_interval_s=setup.report_interval_s,
            gateway_lease_s=setup.gateway_lease_s,
            retain_ended_s=setup.retain_ended_s,
        )
        self.core = WorkerCore(config)
        self.name = incarnation
        self.destroyed = False
        self._world = world
        self._setup = setup
        self._oracle = oracle
        self._links: dict[int, Link] = {}
        self._builds = 0
        self._newest_started: dict[str, int] = {}
        self.replicas = [self._build(replica) for replica in range(setup.replicas)]
        self._alarm = Alarm(world, self.core.next_due, self._tick)

    def destroy(self) -> None:
        """The process is killed: nothing it had on its way happens any more."""
        self.destroyed = True
        self._alarm.stop()
        for replica in self.replicas:
            replica.destroyed = True
        for link in self._links.values():
            link.sever()

    def attach(self, link: Link) -> None:
        """Be one end of a link to the gateway."""

        def closed() -> None:
            del self._links[link.number]
            self.handle(GatewayLost(link.number))

        self._links[link.number] = link
        link.worker_end = LinkEnd(
            lambda message: self.handle(GatewayMessage(link.number, message)), closed
        )

    def connected(self, link: Link) -> None:
        """The link is up at both ends."""
        self.handle(GatewayConnected(link.number))

    def handle(self, event: WorkerEvent) -> None:
        """Give the core an event and carry out what it answers."""
        if self.destroyed:
            return
        self._world.note(self.name, event)
        if self._world.watch is not None and isinstance(event, ReplicaLoaded):
            node = self.replicas[event.load.replica]
            self._world.watch.engine_stepped(node.name, node.core, event.load)
        effects = self.core.handle(event, self._world.now)
        self.core.check_invariants()
        for effect in effects:
            match effect:
                case SendToGateway(number, message):
                    if number in self._links:
                        self._links[number].send_to_gateway(message)
                case PostToReplica(replica, posted):
                    # Through the heap: a mailbox is never emptied inside the core's own event.
                    self._world.time.after(0.0, partial(self._post, replica, posted))
                case _:
                    self._world.note(self.name, effect)
        self._alarm.set()

    def _post(self, replica: int, event: AddRequest | CancelRequest) -> None:
        if self.destroyed:
            return
        world = self._world
        if isinstance(event, AddRequest):
            name, attempt = event.request.request_id, event.request.attempt
            newest = self._newest_started.get(name, 0)
            world.require(
                attempt > newest,
                f"{self.name} starts attempt {attempt} of {name} after attempt {newest}",
            )
            self._newest_started[name] = attempt
            self.replicas[replica].post(event)
        else:
            self.replicas[replica].post(event)
            gone = (event.request_id, event.attempt) not in self.core.running_on(replica)
            world.require(gone, f"attempt {event.attempt} of {event.request_id} goes on")

    def _build(self, replica: int) -> ReplicaNode:
        setup = self._setup
        self._builds += 1
        revision = self._oracle.started(f"{self.name}/{replica}.{self._builds}")
        executor = ModelledExecutor(
            replace(setup.numerics.limits, model_revision=revision),
            eos_token_ids=setup.engine.eos_token_ids,
            eos_every=setup.numerics.eos_every,
        )

        def stepped(outputs: tuple[RequestOutput, ...], load: ReplicaLoad) -> None:
            if outputs:
                self.handle(ReplicaPublished(replica, outputs))
            self.handle(ReplicaLoaded(load))

        def failed(reason: str) -> None:
            node.destroyed = True
            self.handle(ReplicaFailed(replica, reason))
            self._world.time.after(setup.replica_restored_after_s, restored)

        def restored() -> None:
            if not self.destroyed:
                self.replicas[replica] = self._build(replica)
                self.handle(ReplicaRestored(replica))

        node = ReplicaNode(
            self._world,
            f"{self.name}/{replica}",
            executor,
            replace(setup.engine, replica=replica),
            stepped=stepped,
            failed=failed,
        )
        return node

    def _tick(self) -> None:
        self.handle(WorkerTick())
