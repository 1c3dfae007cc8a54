"""What a run tells an onlooker at the moment something goes wrong in it."""

import enum
from typing import Protocol

from serving.cluster.gateway_events import GatewayEvent
from serving.cluster.messages import ToGateway, ToWorker
from serving.engine.core import EngineCore
from serving.policy.snapshot import ReplicaLoad


class Mishap(enum.Enum):
    """Everything that can befall a request in a simulated run."""

    LOSS = "loss"
    DUPLICATION = "duplication"
    REORDER = "reorder"
    CRASH = "crash"
    CUT = "cut"
    PARTITION = "partition"
    STALL = "stall"
    REPLICA = "replica failure"
    CANCEL = "cancel"
    BREAK = "break"
    RESUME = "resume"
    DEADLINE = "deadline"
    PREEMPTION = "preemption"
    NO_BLOCKS = "out of blocks"


class Watch(Protocol):
    """Looks on and changes nothing: the same seed gives the same log with and without it."""

    def gateway_event(self, event: GatewayEvent, now: float) -> None:
        """The gateway's core is about to take this event."""
        ...

    def message(self, message: ToGateway | ToWorker, mishap: Mishap) -> None:
        """This befalls a message that was just given to a link."""
        ...

    def engine_stepped(self, name: str, engine: EngineCore, load: ReplicaLoad) -> None:
        """The engine of the replica of that name took a step or gave something out."""
        ...
