"""Dispatch as a table: the fleet, the request, who takes it."""

import pytest

from serving.policy.dispatch import Forecast, dispatch, fewest_requests, forecast
from serving.policy.snapshot import FleetSnapshot, PlacedRequests, ReplicaLoad, WorkerLoad

HIGH, LOW = 0, 1


def load(replica=0, **changes) -> ReplicaLoad:
    """100 blocks of 16 tokens, all free."""
    values = {
        "replica": replica,
        "running": 0,
        "waiting": 0,
        "waiting_tokens": 0,
        "total_blocks": 100,
        "free_blocks": 100,
        "cached_blocks": 0,
        "block_size": 16,
    }
    return ReplicaLoad(**{**values, **changes})


def fleet(*workers: tuple[ReplicaLoad, ...], placed=()) -> FleetSnapshot:
    """Workers w0, w1, ... with these replicas."""
    return FleetSnapshot(
        tuple(WorkerLoad(f"w{i}", "1", replicas, 0.0) for i, replicas in enumerate(workers)),
        tuple(placed),
    )


BUSY = load(free_blocks=20, running=5)
NO_MEMORY = load(free_blocks=1, running=2)
QUEUED = load(waiting=3, waiting_tokens=320)

CASES = {
    "nobody there": (fleet(), HIGH, None),
    "no replica": (fleet(()), HIGH, None),
    "the only one": (fleet((load(),)), HIGH, ("w0", 0)),
    "equal: the first by name": (fleet((load(),), (load(),)), HIGH, ("w0", 0)),
    "more memory left": (fleet((BUSY,), (load(),)), LOW, ("w1", 0)),
    "cached blocks count as free": (
        fleet((load(free_blocks=50),), (load(free_blocks=10, cached_blocks=80),)),
        LOW,
        ("w1", 0),
    ),
    "second replica of a worker": (fleet((BUSY, load(replica=1))), LOW, ("w0", 1)),
    "without memory yet": (
        fleet((load(total_blocks=0, free_blocks=0),), (BUSY,)),
        HIGH,
        ("w1", 0),
    ),
    "unhealthy": (fleet((load(healthy=False),), (BUSY,)), HIGH, ("w1", 0)),
    "draining": (fleet((load(draining=True),), (BUSY,)), HIGH, ("w1", 0)),
    "all draining": (fleet((load(draining=True), load(replica=1, healthy=False))), HIGH, None),
    "placed since the report": (
        fleet((load(),), (load(),), placed=[PlacedRequests("w0", 0, 200)]),
        HIGH,
        ("w1", 0),
    ),
    "placed on the other replica": (
        fleet((load(), load(replica=1)), placed=[PlacedRequests("w0", 1, 200)]),
        HIGH,
        ("w0", 0),
    ),
    "high goes where nobody is ahead": (fleet((QUEUED,), (BUSY,)), HIGH, ("w1", 0)),
    "low goes where memory is left": (fleet((QUEUED,), (BUSY,)), LOW, ("w0", 0)),
    "memory before a short queue": (fleet((NO_MEMORY,), (QUEUED,)), HIGH, ("w1", 0)),
    "all full: the least so": (
        fleet((load(free_blocks=0, waiting_tokens=800),), (load(free_blocks=0),)),
        LOW,
        ("w1", 0),
    ),
    "fewer requests": (fleet((load(running=2),), (load(running=1),)), HIGH, ("w1", 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_dispatch(name):
    snapshot, priority, expected = CASES[name]
    placement = dispatch(snapshot, 32, priority)
    if expected is None:
        assert placement is None
    else:
        assert placement is not None
        assert (placement.worker_id, placement.replica) == expected
        assert "candidates" in placement.reason


def test_requests_without_a_report_between_them_are_spread():
    placed: list[PlacedRequests] = []
    for _ in range(6):
        placement = dispatch(fleet((load(),), (load(),), (load(),), placed=placed), 64, HIGH)
        assert placement is not None
        placed.append(PlacedRequests(placement.worker_id, placement.replica, 64))
    assert [p.worker_id for p in placed] == ["w0", "w1", "w2", "w0", "w1", "w2"]


def test_forecast_counts_what_is_there_waiting_and_on_its_way():
    busy = load(free_blocks=60, cached_blocks=10, running=3, waiting=1, waiting_tokens=40)
    placed = [PlacedRequests("w0", 0, 23)]
    # 30 blocks in use; 40 + 23 + 64 + 1 tokens are 8 blocks.
    assert forecast("w0", busy, placed, 64) == Forecast("w0", 0, 0.38, 63, 5)


def test_fewest_requests_looks_at_nothing_else():
    idle, full = load(running=2, free_blocks=90), load(running=1, free_blocks=0)
    placement = fewest_requests(fleet((idle,), (full,)), 32, HIGH)
    assert placement is not None
    assert placement.worker_id == "w1"
    placed = [PlacedRequests("w1", 0, 10, requests=2)]
    placement = fewest_requests(fleet((idle,), (full,), placed=placed), 32, HIGH)
    assert placement is not None
    assert placement.worker_id == "w0"
    assert fewest_requests(fleet(()), 32, HIGH) is None
