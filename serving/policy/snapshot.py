"""Frozen pictures of the fleet that policies decide on. Imports nothing of the other rooms."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica at the end of a step.

    Blocks: total = free + cached + in use (+ in flight). Cached ones are evictable.
    waiting_tokens: context tokens that waiting requests still have to prefill.
    """

    replica: int
    running: int
    waiting: int
    waiting_tokens: int
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    block_size: int
    steps: int = 0  # steps taken since start
    healthy: bool = True
    draining: bool = False


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker's replicas, as its last report gave them, and when it was received (seconds)."""

    worker_id: str
    incarnation: str
    replicas: tuple[ReplicaLoad, ...]
    received_at: float


@dataclass(frozen=True, slots=True)
class PlacedRequests:
    """Requests placed since the last report of their replica, so not yet visible in it.

    context_tokens: of all of them.
    """

    worker_id: str
    replica: int
    context_tokens: int
    requests: int = 1


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """What dispatch knows: the last reports and what was placed since."""

    workers: tuple[WorkerLoad, ...]
    placed_since_report: tuple[PlacedRequests, ...]
