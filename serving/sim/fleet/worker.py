"""A worker of a large fleet: the real worker core over replicas that take steps in stretches."""

from functools import partial

from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import (
    GatewayConnected,
    GatewayMessage,
    PostToReplica,
    ReplicaLoaded,
    ReplicaPublished,
    SendToGateway,
    WorkerConfig,
    WorkerEvent,
    WorkerTick,
)
from serving.engine.request import RequestOutput
from serving.sim.alarm import Alarm
from serving.sim.fleet.replica import FleetReplica
from serving.sim.gateway_node import GatewayNode
from serving.sim.transport import Link, LinkEnd
from serving.sim.world import World


class FleetWorker:
    """Runs a WorkerCore that never fails. Give it its replicas and connect it, once each.

    The core hears of its replicas' loads when it is about to report them, not after each step.
    """

    def __init__(self, world: World, config: WorkerConfig) -> None:
        self.core = WorkerCore(config)
        self.name = config.worker_id
        self.replicas: list[FleetReplica] = []
        self._world = world
        self._link: Link | None = None
        self._alarm = Alarm(world, self.core.next_due, self._tick)

    def connect(self, gateway: GatewayNode, link: Link) -> None:
        """Be connected to the gateway, for good."""
        self._link = link
        link.worker_end = LinkEnd(
            lambda message: self._handle(GatewayMessage(link.number, message)), lambda: None
        )
        gateway.attach(link)
        gateway.connected(link)
        self._handle(GatewayConnected(link.number))

    def publish(self, replica: int, outputs: tuple[RequestOutput, ...]) -> None:
        """What a replica's engine publishes."""
        self._handle(ReplicaPublished(replica, outputs))

    def _handle(self, event: WorkerEvent) -> None:
        world = self._world
        world.note(self.name, event)
        effects = self.core.handle(event, world.now)
        if world.checked:
            self.core.check_invariants()
        for effect in effects:
            if isinstance(effect, SendToGateway):
                assert self._link is not None
                self._link.send_to_gateway(effect.message)
            elif isinstance(effect, PostToReplica):
                # Through the heap: a mailbox is never emptied inside the core's own event.
                post = partial(self.replicas[effect.replica].post, effect.event)
                world.time.after(0.0, post)
        self._alarm.set()

    def _tick(self) -> None:
        if self.core.report_due() <= self._world.now:
            for replica in self.replicas:
                replica.catch_up()
                self._handle(ReplicaLoaded(replica.core.load()))
        self._handle(WorkerTick())
