"""Soft state: what the scheduler learns, and when it stops counting what it placed."""

from serving.cluster.messages import ReplicaInfo, WorkerHello
from serving.cluster.scheduler_core import SchedulerCore
from serving.policy.snapshot import ReplicaLoad


def hello_of(name="w1", incarnation="i1", limit=64) -> WorkerHello:
    return WorkerHello(name, incarnation, "m", "r", 97, (ReplicaInfo(0, 4, limit, 64, 4, 16),))


def load(**values) -> ReplicaLoad:
    return ReplicaLoad(0, 1, 0, 0, 16, 10, 0, 4, **values)


def placed(scheduler):
    return [p.context_tokens for p in scheduler.snapshot().placed_since_report]


def test_a_placed_request_counts_until_a_report_contains_it():
    scheduler = SchedulerCore(8)
    scheduler.hello(1, hello_of(), 0.0)
    chosen = scheduler.place("r", 1, 20, 0, 0.0)
    assert chosen is not None
    worker, replica = chosen
    assert (worker.hello.worker_id, replica) == ("w1", 0)
    scheduler.report(worker, (load(),), 0.1)  # was under way when the submit was
    assert placed(scheduler) == [20]
    scheduler.accepted(worker, "r", 1)
    assert placed(scheduler) == [20]
    scheduler.report(worker, (load(),), 0.2)
    assert placed(scheduler) == []


def test_a_released_request_does_not_count():
    scheduler = SchedulerCore(8)
    scheduler.hello(1, hello_of(), 0.0)
    scheduler.place("r", 1, 20, 0, 0.0)
    scheduler.released("w1", "r", 1)
    scheduler.released("nobody", "r", 1)
    assert placed(scheduler) == []


def test_hello_says_who_came_back_and_who_was_restarted():
    scheduler = SchedulerCore(8)
    assert scheduler.hello(1, hello_of(), 0.0) is None
    assert scheduler.hello(1, hello_of(), 0.5) is None
    worker = scheduler.worker("w1")
    assert worker is not None
    scheduler.lost(worker, 1.0)
    assert list(scheduler.connected()) == []
    assert not scheduler.ready()
    earlier = scheduler.hello(2, hello_of(), 1.2)
    assert earlier is not None
    assert (earlier.hello.incarnation, earlier.lost_at) == ("i1", 1.0)
    assert scheduler.ready()
    earlier = scheduler.hello(3, hello_of(incarnation="i2"), 2.0)
    assert earlier is not None
    assert earlier.hello.incarnation == "i1"
    assert [worker.link for worker in scheduler.connected()] == [3]


def test_requests_go_where_they_fit_and_a_full_one_to_the_largest():
    scheduler = SchedulerCore(8)
    scheduler.hello(1, hello_of("s16", limit=16), 0.0)
    scheduler.hello(2, hello_of("s64", limit=64), 0.0)
    for context, expected in ((15, "s16"), (16, "s64"), (64, "s64")):
        chosen = scheduler.place("r", context, context, 1, 0.0)
        assert chosen is not None
        assert chosen[0].hello.worker_id == expected
        scheduler.released(expected, "r", context)
    large = scheduler.worker("s64")
    assert large is not None
    scheduler.lost(large, 1.0)  # it may come back, so nobody else takes it
    assert scheduler.place("r", 99, 40, 1, 1.0) is None


def test_unhealthy_and_draining_replicas_are_not_ready():
    scheduler = SchedulerCore(8)
    scheduler.hello(1, hello_of(), 0.0)
    worker = scheduler.worker("w1")
    assert worker is not None
    scheduler.report(worker, (load(draining=True),), 0.1)
    assert not scheduler.ready()
    assert scheduler.place("r", 1, 5, 0, 0.1) is None
    scheduler.report(worker, (load(),), 0.2)
    assert scheduler.ready()


def test_the_last_decisions_are_kept_with_their_inputs():
    scheduler = SchedulerCore(2)
    scheduler.hello(1, hello_of(), 0.0)
    for attempt in (1, 2, 3):
        scheduler.place("r", attempt, 5, 0, float(attempt))
    decisions = scheduler.decisions()
    assert [(d.at, d.attempt) for d in decisions] == [(2.0, 2), (3.0, 3)]
    assert decisions[-1].placement is not None
    assert [p.requests for p in decisions[-1].fleet.placed_since_report] == [2]
