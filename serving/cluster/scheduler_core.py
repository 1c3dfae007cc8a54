"""The scheduler's core: soft state of the fleet, rebuilt from reports, and dispatch on it.

It knows workers only by what they said. Nothing here must survive a restart: one report interval
later it knows the same again.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from serving.cluster.messages import ReplicaInfo, WorkerHello
from serving.cluster.worker_messages import idle_load
from serving.policy.dispatch import Dispatch, Placement, dispatch
from serving.policy.snapshot import FleetSnapshot, PlacedRequests, ReplicaLoad, WorkerLoad


@dataclass(frozen=True, slots=True)
class DispatchRecord:
    """One decision with its inputs, for /debug/decisions. `at` is on the gateway's clock."""

    at: float
    request_id: str
    attempt: int
    context_tokens: int
    priority: int
    fleet: FleetSnapshot
    placement: Placement | None


@dataclass(slots=True)
class Underway:
    """A placed request until a report shows it. `seen`: its worker accepted it."""

    replica: int
    context_tokens: int
    seen: bool = False


@dataclass(slots=True)
class WorkerState:
    """One worker. `link` is None while it is lost, since `lost_at`."""

    hello: WorkerHello
    link: int | None
    replicas: tuple[ReplicaLoad, ...]
    reported_at: float
    heard_at: float
    lost_at: float | None = None
    underway: dict[tuple[str, int], Underway] = field(default_factory=dict)
    placed: dict[int, PlacedRequests] = field(default_factory=dict)  # those, summed by replica
    limits: dict[int, int] = field(init=False)  # context_limit by replica

    def __post_init__(self) -> None:
        """Work out what every placement asks for."""
        self.limits = {info.replica: context_limit(info) for info in self.hello.replicas}

    def place(self, key: tuple[str, int], replica: int, context_tokens: int) -> None:
        """An attempt is on its way to a replica."""
        self.underway[key] = Underway(replica, context_tokens)
        self._count(replica, context_tokens, 1)

    def release(self, key: tuple[str, int]) -> None:
        """It is not any more, or a report shows it."""
        gone = self.underway.pop(key, None)
        if gone is not None:
            self._count(gone.replica, -gone.context_tokens, -1)

    def _count(self, replica: int, context_tokens: int, requests: int) -> None:
        placed = self.placed.get(replica)
        if placed is not None:
            context_tokens += placed.context_tokens
            requests += placed.requests
        if requests:
            self.placed[replica] = PlacedRequests(
                self.hello.worker_id, replica, context_tokens, requests
            )
        else:
            del self.placed[replica]


class SchedulerCore:
    """Who is in the fleet, how loaded each is, and who takes the next request. Sans I/O."""

    def __init__(self, decisions_kept: int, policy: Dispatch = dispatch) -> None:
        self._policy = policy
        self._workers: dict[str, WorkerState] = {}
        self._decisions: deque[DispatchRecord] = deque(maxlen=decisions_kept)

    def worker(self, worker_id: str) -> WorkerState | None:
        """What is known of a worker, lost or not."""
        return self._workers.get(worker_id)

    def connected(self) -> Iterator[WorkerState]:
        """Workers with a link, in the order in which they were first seen."""
        return (worker for worker in self._workers.values() if worker.link is not None)

    def hello(self, link: int, hello: WorkerHello, now: float) -> WorkerState | None:
        """A worker introduces itself over `link`.

        Returns its earlier state if it is back: connected again, or restarted (then the
        incarnations differ); None if it is new or was there all the time.
        """
        known = self._workers.get(hello.worker_id)
        if known is not None and known.hello.incarnation == hello.incarnation:
            earlier = replace(known) if known.link != link else None
            known.link, known.hello, known.heard_at, known.lost_at = link, hello, now, None
            return earlier
        loads = tuple(idle_load(info) for info in hello.replicas)
        self._workers[hello.worker_id] = WorkerState(hello, link, loads, now, now)
        return known

    def lost(self, worker: WorkerState, now: float) -> None:
        """Its link broke or it fell silent."""
        worker.link = None
        worker.lost_at = now

    def forget(self, worker_id: str) -> None:
        """It will not come back."""
        del self._workers[worker_id]

    def report(self, worker: WorkerState, loads: tuple[ReplicaLoad, ...], now: float) -> None:
        """A load report: what was accepted before it is contained in it."""
        worker.replicas = loads
        worker.reported_at = now
        for key in [key for key, it in worker.underway.items() if it.seen]:
            worker.release(key)

    def accepted(self, worker: WorkerState, request_id: str, attempt: int) -> None:
        """The next report will contain this attempt."""
        underway = worker.underway.get((request_id, attempt))
        if underway is not None:
            underway.seen = True

    def released(self, worker_id: str, request_id: str, attempt: int) -> None:
        """This attempt is no longer on that worker."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.release((request_id, attempt))

    def place(
        self, request_id: str, attempt: int, context_tokens: int, priority: int, now: float
    ) -> tuple[WorkerState, int] | None:
        """The worker and replica that take this attempt, or None if nobody can now."""
        largest = self.largest_context()
        # A request that filled the largest replica goes to one of that size, which ends it.
        needed = min(context_tokens + 1, largest) if largest is not None else context_tokens + 1
        fleet = self.snapshot(needed)
        placement = self._policy(fleet, context_tokens, priority)
        self._decisions.append(
            DispatchRecord(now, request_id, attempt, context_tokens, priority, fleet, placement)
        )
        if placement is None:
            return None
        worker = self._workers[placement.worker_id]
        worker.place((request_id, attempt), placement.replica, context_tokens)
        return worker, placement.replica

    def largest_context(self) -> int | None:
        """Tokens of the longest request that a known replica holds; None if none is known."""
        limits = [limit for worker in self._workers.values() for limit in worker.limits.values()]
        return max(limits, default=None)

    def ready(self) -> bool:
        """A healthy replica that takes requests is connected."""
        return any(
            load.healthy and not load.draining
            for worker in self.connected()
            for load in worker.replicas
        )

    def snapshot(self, context_tokens: int = 0) -> FleetSnapshot:
        """The connected workers, with the replicas that hold `context_tokens`."""
        workers = []
        placed: list[PlacedRequests] = []
        for worker in self.connected():
            limits = worker.limits
            loads = tuple(
                load for load in worker.replicas if limits.get(load.replica, -1) >= context_tokens
            )
            hello = worker.hello
            workers.append(
                WorkerLoad(hello.worker_id, hello.incarnation, loads, worker.reported_at)
            )
            placed.extend(worker.placed.values())
        return FleetSnapshot(tuple(workers), tuple(placed))

    def decisions(self) -> tuple[DispatchRecord, ...]:
        """The last placements, oldest first."""
        return tuple(self._decisions)


def context_limit(info: ReplicaInfo) -> int:
    """Tokens of prompt and output together that one request can have on this replica."""
    return min(info.max_model_len, info.max_context_tokens)
