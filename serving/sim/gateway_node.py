"""The shell of the gateway core in virtual time."""

from collections.abc import Callable

from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    ClientSubmit,
    Deliver,
    Drained,
    GatewayConfig,
    GatewayEffect,
    GatewayEvent,
    GatewayTick,
    Refuse,
    SendToWorker,
    StreamEnded,
    StreamOpened,
    WorkerConnected,
    WorkerLost,
    WorkerMessage,
)
from serving.policy.dispatch import Dispatch, dispatch
from serving.sim.alarm import Alarm
from serving.sim.transport import Link, LinkEnd
from serving.sim.world import World

type ClientEffect = StreamOpened | Refuse | Deliver | StreamEnded


class GatewayNode:
    """Runs a GatewayCore. Clients attach by stream number with a function that takes effects."""

    def __init__(self, world: World, config: GatewayConfig, policy: Dispatch = dispatch) -> None:
        self.core = GatewayCore(config, policy)
        self._world = world
        self._links: dict[int, Link] = {}
        self._clients: dict[int, Callable[[ClientEffect], None]] = {}
        self._alarm = Alarm(world, self.core.next_due, self._tick)

    def client_event(
        self,
        event: ClientSubmit | ClientResume | ClientCancel,
        answer: Callable[[ClientEffect], None],
    ) -> None:
        """A client does something; `answer` gets whatever concerns its stream or call."""
        number = event.call if isinstance(event, ClientCancel) else event.stream
        self._clients[number] = answer
        self.handle(event)

    def attach(self, link: Link) -> None:
        """Be one end of a link to a worker."""

        def closed() -> None:
            del self._links[link.number]
            self.handle(WorkerLost(link.number))

        self._links[link.number] = link
        link.gateway_end = LinkEnd(
            lambda message: self.handle(WorkerMessage(link.number, message)), closed
        )

    def connected(self, link: Link) -> None:
        """The link is up at both ends."""
        self.handle(WorkerConnected(link.number))

    def handle(self, event: GatewayEvent) -> None:
        """Give the core an event and carry out what it answers."""
        self._world.note("gateway", event)
        if self._world.watch is not None:
            self._world.watch.gateway_event(event, self._world.now)
        effects = self.core.handle(event, self._world.now)
        if self._world.checked:
            self.core.check_invariants()
        for effect in effects:
            self._carry_out(effect)
        self._alarm.set()

    def _carry_out(self, effect: GatewayEffect) -> None:
        match effect:
            case SendToWorker(number, message):
                if number in self._links:
                    self._links[number].send_to_worker(message)
            case Drained():
                self._world.note("gateway", effect)
            case _:
                self._world.note("client", effect)
                self._clients[effect.stream](effect)

    def _tick(self) -> None:
        self.handle(GatewayTick())
