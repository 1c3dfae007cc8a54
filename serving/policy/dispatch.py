"""Dispatch: which replica takes a request. A pure function of what the scheduler knows.

Least loaded first, by memory and by prefill work ahead of the request. The reports are one
interval old, so requests placed since count as if they were waiting there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.policy.snapshot import FleetSnapshot, PlacedRequests, ReplicaLoad

HIGHEST_PRIORITY = 0  # Priority.HIGH; policy imports nothing of the engine


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and why in one sentence."""

    worker_id: str
    replica: int
    reason: str


class Forecast(NamedTuple):
    """A replica as it will look once it took everything on its way and this request too.

    usage: blocks needed by all of it per block there is; above 1 somebody has to wait.
    tokens_ahead: context tokens to prefill before this request's own.
    requests: running, waiting and on their way, without this one.
    """

    worker_id: str
    replica: int
    usage: float
    tokens_ahead: int
    requests: int


def dispatch(fleet: FleetSnapshot, context_tokens: int, priority: int) -> Placement | None:
    """The replica for a request of `context_tokens` tokens; None if no replica takes any.

    Replicas where the request finds memory go first. Among those, a request of the highest
    priority goes where the fewest tokens are ahead of it (its first token comes soonest), any
    other where most memory is left. Ties are broken by the other of the two, then by requests,
    worker id and replica number.
    """
    forecasts = _forecasts(fleet, context_tokens)
    if not forecasts:
        return None

    def order(f: Forecast) -> tuple[bool, float, float, int, str, int]:
        by = (
            (float(f.tokens_ahead), f.usage)
            if priority == HIGHEST_PRIORITY
            else (f.usage, float(f.tokens_ahead))
        )
        return (f.usage > 1.0, *by, f.requests, f.worker_id, f.replica)

    return _placement(min(forecasts, key=order), forecasts)


def fewest_requests(fleet: FleetSnapshot, context_tokens: int, priority: int) -> Placement | None:
    """The replica with the fewest requests, whatever they are: the usual balance, to compare with.

    Ties are broken by worker id and replica number.
    """
    forecasts = _forecasts(fleet, context_tokens)
    if not forecasts:
        return None
    best = min(forecasts, key=lambda f: (f.requests, f.worker_id, f.replica))
    return _placement(best, forecasts)


type Dispatch = Callable[[FleetSnapshot, int, int], Placement | None]
"""From (fleet, context tokens, priority) to a placement, or None if no replica takes any."""

DISPATCHES: dict[str, Dispatch] = {"least_loaded": dispatch, "fewest_requests": fewest_requests}
"""By the names that settings use."""


def _forecasts(fleet: FleetSnapshot, context_tokens: int) -> list[Forecast]:
    """Of all replicas that take requests."""
    placed: dict[tuple[str, int], list[PlacedRequests]] = {}
    for since in fleet.placed_since_report:
        placed.setdefault((since.worker_id, since.replica), []).append(since)
    return [
        forecast(
            worker.worker_id, load, placed.get((worker.worker_id, load.replica), ()), context_tokens
        )
        for worker in fleet.workers
        for load in worker.replicas
        if load.healthy and not load.draining and load.total_blocks > 0
    ]


def _placement(best: Forecast, forecasts: list[Forecast]) -> Placement:
    full = sum(f.usage > 1.0 for f in forecasts)
    reason = (
        f"memory use would be {best.usage:.0%} with {best.tokens_ahead} tokens ahead and "
        f"{best.requests} other requests; {len(forecasts)} candidates, {full} of them full"
    )
    return Placement(best.worker_id, best.replica, reason)


def forecast(
    worker_id: str, load: ReplicaLoad, placed: Sequence[PlacedRequests], context_tokens: int
) -> Forecast:
    """What `load` becomes with the requests placed on it since, and one of `context_tokens`."""
    tokens_ahead = load.waiting_tokens
    requests = load.running + load.waiting
    for since in placed:
        tokens_ahead += since.context_tokens
        requests += since.requests
    in_use = load.total_blocks - load.free_blocks - load.cached_blocks
    # One token more than the context: the first one generated needs its place too.
    blocks = -(-(tokens_ahead + context_tokens + 1) // load.block_size)
    return Forecast(
        worker_id=worker_id,
        replica=load.replica,
        usage=(in_use + blocks) / load.total_blocks,
        tokens_ahead=tokens_ahead,
        requests=requests,
    )
