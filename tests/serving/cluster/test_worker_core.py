"""The worker core, event by event."""

import pytest

from serving.cluster.messages import (
    AbortRequest,
    FetchOutput,
    GatewayHeartbeat,
    LoadReport,
    ReplicaInfo,
    RequestAccepted,
    RequestUnknown,
    StepOutputs,
    SubmitRequest,
    WorkerHello,
)
from serving.cluster.worker_core import WorkerCore
from serving.cluster.worker_events import (
    DrainWorker,
    GatewayConnected,
    GatewayLost,
    GatewayMessage,
    PostToReplica,
    ReplicaFailed,
    ReplicaLoaded,
    ReplicaPublished,
    ReplicaRestored,
    SendToGateway,
    WorkerConfig,
    WorkerDrained,
    WorkerTick,
)
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from serving.policy.snapshot import ReplicaLoad

REPLICAS = tuple(ReplicaInfo(replica, 4, 64, 64, 4, 16) for replica in (0, 1))
CONFIG = WorkerConfig("w", "i1", "m", "r", 97, REPLICAS)


def request_of(name="r", attempt=1, emitted=(), prompt=(1, 2)) -> EngineRequest:
    return EngineRequest(name, attempt, prompt, SamplingParams(), emitted)


class Desk:
    """A worker core with the clock in the test's hand; gateway gN is connected by link N."""

    def __init__(self, gateways=1) -> None:
        self.core = WorkerCore(CONFIG)
        self.now = 0.0
        for link in range(1, gateways + 1):
            self.handle(GatewayConnected(link))
            self.hears(GatewayHeartbeat(f"g{link}"), link)

    def handle(self, event):
        effects = self.core.handle(event, self.now)
        self.core.check_invariants()
        return effects

    def hears(self, message, link=1):
        return self.handle(GatewayMessage(link, message))

    def submit(self, request=None, replica=0, link=1, deadline_in_s=None):
        request = request or request_of()
        return self.hears(SubmitRequest(f"g{link}", replica, request, deadline_in_s), link)

    def abort(self, attempt=1, name="r"):
        return self.hears(AbortRequest("g1", name, attempt))

    def fetch(self, from_index, attempt=1, name="r"):
        return self.hears(FetchOutput("g1", name, attempt, from_index))

    def acknowledge(self, *keys):
        return self.hears(GatewayHeartbeat("g1", keys))

    def publish(self, *outputs, replica=0):
        return self.handle(ReplicaPublished(replica, outputs))

    def tick(self, now):
        effects = []
        while (due := self.core.next_due()) is not None and due <= now:
            self.now = max(self.now, due)
            effects += self.handle(WorkerTick())
        self.now = now
        return effects


def output(start, tokens, finish=None, name="r", attempt=1):
    return RequestOutput(name, attempt, start, tuple(tokens), finish=finish)


def posted(effects):
    return [(e.replica, e.event) for e in effects if isinstance(e, PostToReplica)]


def sent(effects, *kinds):
    """(link, message) but hello and reports, unless asked for."""
    wanted = kinds or (RequestAccepted, RequestUnknown, StepOutputs)
    return [
        (e.link, e.message)
        for e in effects
        if isinstance(e, SendToGateway) and isinstance(e.message, wanted)
    ]


ACCEPTED = (1, RequestAccepted("w", "i1", "r", 1))
UNKNOWN = (1, RequestUnknown("w", "i1", "r", 1))


def step_outputs(*outputs, replica=0, link=1):
    return (link, StepOutputs("w", "i1", replica, outputs))


def test_a_submit_is_accepted_started_and_its_output_passed_on():
    desk = Desk()
    desk.now = 7.0
    effects = desk.submit(replica=1, deadline_in_s=3.0)
    ((replica, event),) = posted(effects)
    assert replica == 1
    assert isinstance(event, AddRequest)
    assert event.request.deadline == 10.0  # on this worker's clock
    assert sent(effects) == [ACCEPTED]
    run = output(0, [5, 6])
    assert sent(desk.publish(run, replica=1)) == [step_outputs(run, replica=1)]


def test_a_repeated_submit_is_accepted_again_and_started_once():
    desk = Desk()
    desk.submit()
    effects = desk.submit()
    assert sent(effects) == [ACCEPTED]
    assert posted(effects) == []


def test_another_request_of_the_same_name_and_attempt_is_not_taken_for_a_repetition():
    desk = Desk(gateways=2)
    desk.submit()
    assert sent(desk.submit(request_of(prompt=(9, 9)))) == [UNKNOWN]
    assert sent(desk.submit(link=2)) == [(2, UNKNOWN[1])]
    assert sent(desk.submit(request_of(attempt=2), link=2)) == [
        (2, RequestAccepted("w", "i1", "r", 2))
    ]


REFUSED = {
    "no such replica": ([], {"replica": 5}),
    "a failed replica": ([ReplicaFailed(0, "gone")], {}),
    "draining": ([DrainWorker()], {}),
    "aborted before it came": ([GatewayMessage(1, AbortRequest("g1", "r", 1))], {}),
    "older than one that was aborted": ([GatewayMessage(1, AbortRequest("g1", "r", 4))], {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_submit_that_is_not_taken_is_answered(name):
    before, how = REFUSED[name]
    desk = Desk()
    for event in before:
        desk.handle(event)
    effects = desk.submit(**how)
    assert sent(effects) == [UNKNOWN]
    assert posted(effects) == []


def test_a_newer_attempt_stops_the_older_one_and_a_late_older_one_is_refused():
    desk = Desk()
    desk.submit()
    effects = desk.submit(request_of(attempt=2, emitted=(5,)), replica=1)
    assert posted(effects)[0] == (0, CancelRequest("r", 1))
    assert posted(effects)[1][0] == 1
    cancelled = output(0, [], FinishReason.CANCELLED)
    assert sent(desk.publish(cancelled)) == [step_outputs(cancelled)]
    desk.acknowledge(("r", 1))
    assert sent(desk.submit()) == [UNKNOWN]


def test_one_message_per_step_and_gateway():
    desk = Desk(gateways=2)
    for name, link in (("a", 1), ("b", 2), ("c", 1)):
        desk.submit(request_of(name), link=link)
    runs = [output(0, [5], name=name) for name in ("a", "b", "c")]
    assert sent(desk.publish(*runs)) == [
        step_outputs(runs[0], runs[2]),
        step_outputs(runs[1], link=2),
    ]


def test_fetch_replays_from_any_index_until_acknowledged():
    desk = Desk()
    desk.submit(request_of(emitted=(1, 2)))
    assert sent(desk.fetch(2)) == [ACCEPTED]  # nothing yet: it is queued here
    desk.publish(output(2, [5, 6]))
    desk.publish(output(4, [7], FinishReason.STOP))
    assert sent(desk.fetch(3)) == [step_outputs(output(3, [6, 7], FinishReason.STOP))]
    assert sent(desk.fetch(5)) == [step_outputs(output(5, [], FinishReason.STOP))]
    desk.acknowledge(("r", 1))
    assert sent(desk.fetch(3)) == [UNKNOWN]
    assert desk.core.is_idle()


def test_an_acknowledgement_of_what_still_runs_is_ignored():
    desk = Desk()
    desk.submit()
    desk.acknowledge(("r", 1))
    assert not desk.core.is_idle()


def test_abort_cancels_once_and_tells_the_end_when_asked_again():
    desk = Desk()
    desk.submit()
    assert posted(desk.abort()) == [(0, CancelRequest("r", 1))]
    assert desk.abort() == []
    end = output(0, [], FinishReason.CANCELLED)
    assert sent(desk.publish(end)) == [step_outputs(end)]
    assert sent(desk.abort()) == [step_outputs(end)]
    assert sent(desk.abort(name="x")) == [(1, RequestUnknown("w", "i1", "x", 1))]


def test_a_replica_that_fails_loses_its_requests_and_takes_no_more():
    desk = Desk()
    desk.submit(request_of("a"))
    desk.submit(request_of("b"), replica=1)
    desk.publish(output(0, [5], name="a"))
    effects = desk.handle(ReplicaFailed(0, "device lost"))
    ((_, message),) = sent(effects)
    (lost,) = message.outputs
    assert (lost.request_id, lost.start_index, lost.finish) == ("a", 1, FinishReason.FAILED)
    assert lost.retriable
    assert lost.detail == "Replica 0 of worker w failed: device lost"
    ((_, report),) = sent(effects, LoadReport)
    assert [load.healthy for load in report.replicas] == [False, True]
    assert desk.publish(output(1, [6], name="a")) == []  # was on its way when it failed
    ((_, report),) = sent(desk.handle(ReplicaRestored(0)), LoadReport)
    assert [load.healthy for load in report.replicas] == [True, True]
    assert len(posted(desk.submit(request_of("a", attempt=2, emitted=(5,))))) == 1


def test_hello_and_load_go_out_at_the_interval():
    desk = Desk()
    effects = desk.handle(GatewayConnected(2))
    ((link, hello),) = sent(effects, WorkerHello)
    assert (link, hello) == (2, WorkerHello("w", "i1", "m", "r", 97, REPLICAS))
    desk.handle(ReplicaLoaded(ReplicaLoad(1, 2, 3, 40, 16, 5, 6, 4)))
    reports = sent(desk.tick(1.0), LoadReport)
    assert [link for link, _ in reports] == [1, 2] * 3
    assert reports[0][1].replicas[1].running == 2
    assert reports[0][1].replicas[0].free_blocks == 16


def test_while_a_gateway_is_away_its_requests_run_on():
    desk = Desk()
    desk.submit()
    desk.handle(GatewayLost(1))
    assert desk.publish(output(0, [5])) == []
    desk.handle(GatewayConnected(2))
    replay = desk.hears(FetchOutput("g1", "r", 1, 0), link=2)
    assert sent(replay) == [step_outputs(output(0, [5]), link=2)]
    assert sent(desk.publish(output(1, [6]))) == [step_outputs(output(1, [6]), link=2)]


def test_the_newest_link_of_a_gateway_is_used():
    desk = Desk()
    desk.handle(GatewayConnected(2))
    desk.hears(GatewayHeartbeat("g1"), link=2)
    desk.submit(link=1)  # still on its way over the older one
    assert sent(desk.publish(output(0, [5]))) == [step_outputs(output(0, [5]), link=2)]
    desk.handle(GatewayLost(1))
    assert sent(desk.publish(output(1, [6]))) == [step_outputs(output(1, [6]), link=2)]
    assert desk.hears(GatewayHeartbeat("g1"), link=1) == []


def test_a_gateway_silent_for_its_lease_loses_its_requests():
    desk = Desk()
    desk.submit(request_of("runs"))
    desk.now = 50.0
    desk.submit(request_of("ended"))
    desk.publish(output(0, [5], FinishReason.STOP, name="ended"))
    assert posted(desk.tick(109.0)) == []
    assert posted(desk.tick(110.0)) == [(0, CancelRequest("runs", 1))]
    desk.publish(output(0, [], FinishReason.CANCELLED, name="runs"))
    desk.tick(171.0)
    assert desk.core.is_idle()


def test_output_that_nobody_acknowledges_is_dropped_in_time():
    desk = Desk()
    desk.submit()
    desk.publish(output(0, [5], FinishReason.STOP))
    for now in range(10, 60, 10):
        desk.acknowledge()
        desk.tick(float(now))
    assert not desk.core.is_idle()
    desk.tick(60.5)
    assert desk.core.is_idle()


def test_a_fence_lasts_from_the_last_word_about_its_request():
    desk = Desk()
    desk.submit()
    desk.tick(50.0)
    desk.publish(output(0, [5], FinishReason.STOP))
    desk.acknowledge(("r", 1))
    for now in (70.0, 90.0, 109.0):
        desk.tick(now)
        desk.acknowledge()
    assert sent(desk.submit()) == [UNKNOWN]


def test_drain_waits_for_the_last_acknowledgement():
    desk = Desk()
    desk.submit()
    ((_, report),) = sent(desk.handle(DrainWorker()), LoadReport)
    assert all(load.draining for load in report.replicas)
    assert WorkerDrained() not in desk.publish(output(0, [5], FinishReason.STOP))
    assert desk.acknowledge(("r", 1)) == [WorkerDrained()]
