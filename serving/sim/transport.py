"""The network between one gateway and a worker: late, lossy, repeating, out of order, broken."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from serving.cluster.messages import ToGateway, ToWorker
from serving.sim.watch import Mishap
from serving.sim.world import World


@dataclass(frozen=True, slots=True)
class NetworkFaults:
    """What a link does to messages. Probabilities per message; times in seconds, uniform.

    The spread of delays reorders messages. Faults end at `until`, so that a run can come to rest;
    delays stay.
    """

    loss: float = 0.0
    duplication: float = 0.0
    delay: tuple[float, float] = (0.0005, 0.002)
    notice: tuple[float, float] = (0.001, 0.05)  # until an end learns that the link broke
    until: float = 0.0


@dataclass(slots=True)
class LinkEnd[Message]:
    """One end of a link: where messages arrive, until that side learns that the link is down.

    latest: when the last of the messages on their way there arrives.
    """

    receive: Callable[[Message], None]
    closed: Callable[[], None]
    is_open: bool = True
    latest: float = 0.0


class Link:
    """One connection. Messages in flight die with it."""

    def __init__(
        self, world: World, faults: NetworkFaults, chance: random.Random, number: int
    ) -> None:
        self.number = number
        self.up = True
        self.gateway_end: LinkEnd[ToGateway] | None = None
        self.worker_end: LinkEnd[ToWorker] | None = None
        self._world = world
        self._faults = faults
        self._chance = chance
        self._black_until = 0.0
        self._stalled_until = 0.0

    def send_to_gateway(self, message: ToGateway) -> None:
        """Carry a message there, if nothing befalls it."""
        self._carry(self.gateway_end, message)

    def send_to_worker(self, message: ToWorker) -> None:
        """Carry a message there, if nothing befalls it."""
        self._carry(self.worker_end, message)

    def partition(self, seconds: float) -> None:
        """Swallow everything for a while without telling anybody."""
        self._black_until = self._world.now + seconds

    def stall(self, seconds: float) -> None:
        """Hold everything back for a while, then deliver it."""
        self._stalled_until = self._world.now + seconds

    def sever(self) -> None:
        """Break; each end learns it in its own time."""
        if not self.up:
            return
        self.up = False
        for end in (self.gateway_end, self.worker_end):
            if end is not None:
                self._close_later(end)

    def _carry[Message: ToGateway | ToWorker](
        self, end: LinkEnd[Message] | None, message: Message
    ) -> None:
        faults, chance, now = self._faults, self._chance, self._world.now
        watch = self._world.watch
        if not self.up or end is None or now < self._black_until:
            return
        copies = 1
        if now < faults.until:
            if chance.random() < faults.loss:
                if watch is not None:
                    watch.message(message, Mishap.LOSS)
                return
            if chance.random() < faults.duplication:
                copies = 2
                if watch is not None:
                    watch.message(message, Mishap.DUPLICATION)

        def arrive() -> None:
            if self.up and end.is_open:
                end.receive(message)

        for _ in range(copies):
            leaves = max(now, self._stalled_until)
            arrives = leaves + chance.uniform(*faults.delay)
            if watch is not None and arrives < end.latest:
                watch.message(message, Mishap.REORDER)
            end.latest = max(end.latest, arrives)
            self._world.time.at(arrives, arrive)

    def _close_later[Message](self, end: LinkEnd[Message]) -> None:
        def close() -> None:
            end.is_open = False
            end.closed()

        self._world.time.after(self._chance.uniform(*self._faults.notice), close)
