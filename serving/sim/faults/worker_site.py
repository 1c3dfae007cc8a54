"""Where a worker lives: its process is started again when it died, its link is built again."""

import random

from serving.sim.faults.oracle import Oracle
from serving.sim.faults.worker_node import WorkerNode, WorkerSetup
from serving.sim.gateway_node import GatewayNode
from serving.sim.transport import Link, NetworkFaults
from serving.sim.world import World

_RECONNECT_S = (0.005, 0.15)


class WorkerSite:
    """One host with one worker on it, connected to one gateway."""

    def __init__(
        self,
        world: World,
        gateway: GatewayNode,
        setup: WorkerSetup,
        faults: NetworkFaults,
        oracle: Oracle,
    ) -> None:
        self.node: WorkerNode | None = None
        self.setup = setup
        self._world = world
        self._gateway = gateway
        self._faults = faults
        self._oracle = oracle
        self._chance: random.Random = world.chance(f"site {setup.worker_id}")
        self._starts = 0
        self._link: Link | None = None
        self.start()

    @property
    def connected(self) -> bool:
        """Its link is up."""
        return self._link is not None and self._link.up

    def start(self) -> None:
        """Start the worker as a new incarnation."""
        self._starts += 1
        incarnation = f"{self.setup.worker_id}-{self._starts}"
        self._world.note("site", f"start {incarnation}")
        self.node = WorkerNode(self._world, self.setup, incarnation, self._oracle)
        self._connect_soon()

    def crash(self, down_s: float) -> None:
        """Kill the process; start it again after `down_s` seconds."""
        if self.node is None:
            return
        self._world.note("site", f"crash {self.node.name}")
        self.node.destroy()
        self.node = None
        if self._link is not None:
            self._link.sever()
        self._world.time.after(down_s, self.start)

    def cut(self) -> None:
        """Break the connection; it is built again."""
        if self._link is not None and self._link.up:
            self._world.note("site", f"cut link {self._link.number}")
            self._link.sever()
            self._connect_soon()

    def partition(self, seconds: float) -> None:
        """Swallow all messages for a while."""
        if self._link is not None:
            self._world.note("site", f"partition link {self._link.number}")
            self._link.partition(seconds)

    def stall(self, seconds: float) -> None:
        """Hold all messages back for a while."""
        if self._link is not None:
            self._world.note("site", f"stall link {self._link.number}")
            self._link.stall(seconds)

    def break_replica(self, replica: int) -> None:
        """A device of the worker fails."""
        if self.node is not None:
            node = self.node.replicas[replica]
            self._world.note("site", f"break {node.name}")
            node.break_down("the device is gone")

    def _connect_soon(self) -> None:
        node = self.node
        self._world.time.after(self._chance.uniform(*_RECONNECT_S), lambda: self._connect(node))

    def _connect(self, node: WorkerNode | None) -> None:
        if node is None or node is not self.node or self.connected:
            return
        self._link = Link(self._world, self._faults, self._chance, self._world.number())
        # Both ends first: each says something as soon as it is connected.
        self._gateway.attach(self._link)
        node.attach(self._link)
        self._gateway.connected(self._link)
        node.connected(self._link)
