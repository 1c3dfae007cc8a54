"""The gateway core, event by event."""

import pytest

from serving.cluster.gateway_core import GatewayCore
from serving.cluster.gateway_events import (
    ClientCancel,
    ClientResume,
    ClientSubmit,
    Deliver,
    Drain,
    Drained,
    GatewayConfig,
    GatewayTick,
    Refuse,
    SendToWorker,
    StreamBroken,
    StreamEnded,
    StreamOpened,
    WorkerConnected,
    WorkerLost,
    WorkerMessage,
)
from serving.cluster.generation import Delta, GenerationRequest
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
from serving.engine.request import (
    FinishReason,
    Priority,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from serving.errors import (
    DrainingError,
    InvalidRequestError,
    QueueFullError,
    RequestExistsError,
    StreamReplacedError,
    UnknownRequestError,
)
from serving.policy.snapshot import ReplicaLoad

CONFIG = GatewayConfig(gateway_id="g", max_queued_requests=3)


def request_of(name="r", prompt=(1, 2, 3), max_tokens=8, **values) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens=max_tokens), **values)


class Desk:
    """A gateway core with the clock in the test's hand; worker wN speaks over link N."""

    def __init__(self, config=CONFIG, workers=1) -> None:
        self.core = GatewayCore(config)
        self.now = 0.0
        self.incarnation: dict[int, str] = {}
        for link in range(1, workers + 1):
            self.connect(link)

    def handle(self, event):
        effects = self.core.handle(event, self.now)
        self.core.check_invariants()
        return effects

    def connect(self, link, worker=None, incarnation="i1", max_model_len=64):
        name = worker or f"w{link}"
        self.incarnation[link] = incarnation
        info = ReplicaInfo(0, 4, max_model_len, 64, 4, 16)
        hello = WorkerHello(name, incarnation, "m", "r", 97, (info,))
        effects = self.handle(WorkerConnected(link))
        return effects + self.handle(WorkerMessage(link, hello))

    def submit(self, request=None, stream=100):
        return self.handle(ClientSubmit(stream, request or request_of()))

    def says(self, link, message_type, *fields, worker=None):
        message = message_type(worker or f"w{link}", self.incarnation[link], *fields)
        return self.handle(WorkerMessage(link, message))

    def accepted(self, link=1, name="r", attempt=1):
        return self.says(link, RequestAccepted, name, attempt)

    def unknown(self, link=1, name="r", attempt=1):
        return self.says(link, RequestUnknown, name, attempt)

    def output(self, start, tokens, finish=None, link=1, attempt=1, name="r", **values):
        output = RequestOutput(name, attempt, start, tuple(tokens), finish=finish, **values)
        return self.says(link, StepOutputs, 0, (output,))

    def tick(self, now):
        """Let time pass; all effects of the ticks that are due on the way."""
        effects = []
        while (due := self.core.next_due()) is not None and due <= now:
            self.now = max(self.now, due)
            effects += self.handle(GatewayTick())
        self.now = now
        return effects


def sent(effects, kind=None):
    """Messages to workers but heartbeats, as (link, message)."""
    return [
        (e.link, e.message)
        for e in effects
        if isinstance(e, SendToWorker)
        and not isinstance(e.message, GatewayHeartbeat)
        and (kind is None or isinstance(e.message, kind))
    ]


def deltas(effects):
    return [(e.stream, e.delta) for e in effects if isinstance(e, Deliver)]


def tokens_of(effects):
    return [token for _, delta in deltas(effects) for token in delta.tokens]


def refusal(effects, kind):
    (effect,) = effects
    assert isinstance(effect, Refuse)
    assert isinstance(effect.error, kind), effect
    return effect.error


# A request from beginning to end.


def test_a_request_is_placed_streamed_and_ended():
    desk = Desk()
    effects = desk.submit(request_of(deadline_s=5.0, priority=Priority.LOW))
    assert isinstance(effects[0], StreamOpened)
    ((link, submit),) = sent(effects)
    assert link == 1
    assert isinstance(submit, SubmitRequest)
    assert submit.replica == 0
    assert submit.deadline_in_s == 5.0
    assert submit.request.attempt == 1
    assert submit.request.emitted == ()
    assert submit.request.priority is Priority.LOW
    assert desk.accepted() == []
    assert deltas(desk.output(0, [5, 6], cached_tokens=2)) == [
        (100, Delta(0, (5, 6), cached_tokens=2, attempt=1))
    ]
    effects = desk.output(2, [7], FinishReason.LENGTH)
    assert deltas(effects) == [
        (100, Delta(2, (7,), finish=FinishReason.LENGTH, cached_tokens=2, attempt=1))
    ]
    assert effects[-1] == StreamEnded(100)
    assert desk.core.info().running == 0


def test_ended_attempts_are_acknowledged_three_times_then_forgotten():
    desk = Desk()
    desk.submit()
    desk.output(0, [5], FinishReason.STOP)
    heartbeats = [
        effect.message.acknowledged
        for effect in desk.tick(4.5)
        if isinstance(effect, SendToWorker) and isinstance(effect.message, GatewayHeartbeat)
    ]
    assert heartbeats == [(("r", 1),)] * 3 + [()] * 2
    assert not desk.core.is_idle()  # still remembered for a resume
    desk.tick(CONFIG.remember_finished_s + 0.1)
    assert desk.core.is_idle()


def test_logprobs_go_with_their_tokens():
    desk = Desk()
    desk.submit()
    first, second = TokenLogprobs(-1.0, ()), TokenLogprobs(-2.0, ())
    desk.output(0, [5], logprobs=(first,))
    ((_, delta),) = deltas(desk.output(0, [5, 6], logprobs=(first, second)))
    assert (delta.tokens, delta.logprobs) == ((6,), (second,))


# Each index once and in order.

ARRIVALS = {
    "in order": ([(0, [5]), (1, [6]), (2, [7])], [5, 6, 7], 0),
    "repeated": ([(0, [5, 6]), (0, [5, 6]), (2, [7])], [5, 6, 7], 0),
    "overlapping": ([(0, [5, 6]), (1, [6, 7])], [5, 6, 7], 0),
    "older run late": ([(0, [5, 6, 7]), (0, [5])], [5, 6, 7], 0),
    "gap, then asked again": ([(0, [5]), (2, [7]), (1, [6, 7])], [5, 6, 7], 1),
    "gap asked once until it is due again": ([(1, [6]), (2, [7]), (0, [5])], [5], 1),
}


@pytest.mark.parametrize("name", ARRIVALS)
def test_each_index_is_delivered_once_and_in_order(name):
    arrivals, expected, fetches = ARRIVALS[name]
    desk = Desk()
    desk.submit()
    effects = [effect for start, tokens in arrivals for effect in desk.output(start, tokens)]
    assert tokens_of(effects) == expected
    assert len(sent(effects, FetchOutput)) == fetches


def test_a_gap_is_asked_for_until_it_is_closed():
    desk = Desk()
    desk.submit()
    desk.output(0, [5])
    fetch = FetchOutput("g", "r", 1, 1)
    assert sent(desk.output(2, [7])) == [(1, fetch)]
    assert sent(desk.tick(0.6)) == [(1, fetch)] * 2
    desk.output(1, [6, 7])
    assert sent(desk.tick(1.2)) == []


def test_an_end_behind_a_gap_waits_for_the_gap():
    desk = Desk()
    desk.submit()
    assert deltas(desk.output(1, [6], FinishReason.STOP)) == []
    assert tokens_of(desk.output(0, [5, 6], FinishReason.STOP)) == [5, 6]


# Silence.


def test_an_unanswered_submit_is_repeated_with_what_is_left_of_the_deadline():
    desk = Desk()
    desk.submit(request_of(deadline_s=5.0))
    ((link, again),) = sent(desk.tick(1.0))
    assert link == 1
    assert again.request.attempt == 1
    assert again.deadline_in_s == 4.0
    desk.accepted()
    assert sent(desk.tick(3.9)) == []


def test_a_silent_attempt_is_asked_for_output():
    desk = Desk()
    desk.submit()
    desk.accepted()
    desk.output(0, [5])
    desk.tick(4.0)
    desk.says(1, LoadReport, ())  # the worker lives, the request says nothing
    assert sent(desk.tick(5.0)) == [(1, FetchOutput("g", "r", 1, 1))]


def test_an_unknown_attempt_is_placed_again_after_a_pause_that_grows():
    desk = Desk()
    desk.submit()
    desk.output(0, [5, 6])
    assert sent(desk.unknown()) == []
    ((_, submit),) = sent(desk.tick(0.05))
    assert (submit.request.attempt, submit.request.emitted) == (2, (5, 6))
    assert sent(desk.unknown(attempt=2)) == []
    assert sent(desk.tick(0.14)) == []
    ((_, submit),) = sent(desk.tick(0.16))
    assert submit.request.attempt == 3


# Workers that go.


def test_a_lost_workers_requests_go_elsewhere_after_the_grace():
    desk = Desk(workers=2)
    desk.submit()
    desk.output(0, [5, 6])
    assert desk.handle(WorkerLost(1)) == []
    assert sent(desk.tick(0.4)) == []
    ((link, submit),) = sent(desk.tick(0.5), SubmitRequest)
    assert link == 2
    assert (submit.request.attempt, submit.request.emitted) == (2, (5, 6))
    effects = desk.output(2, [7], link=2, attempt=2)
    assert deltas(effects) == [(100, Delta(2, (7,), attempt=2))]


def test_a_worker_that_comes_back_in_time_keeps_its_requests():
    desk = Desk(workers=2)
    desk.submit()
    desk.output(0, [5, 6])
    desk.handle(WorkerLost(1))
    desk.now = 0.3
    assert sent(desk.connect(3, worker="w1")) == [(3, FetchOutput("g", "r", 1, 2))]
    assert sent(desk.tick(2.0), SubmitRequest) == []


def test_a_restarted_workers_requests_are_placed_at_once():
    desk = Desk()
    desk.submit()
    desk.output(0, [5])
    desk.handle(WorkerLost(1))
    effects = desk.connect(2, worker="w1", incarnation="i2")
    ((link, submit),) = sent(effects, SubmitRequest)
    assert link == 2
    assert (submit.request.attempt, submit.request.emitted) == (2, (5,))


def test_an_older_attempt_is_fenced_and_aborted():
    desk = Desk(workers=2)
    desk.submit()
    desk.output(0, [5])
    desk.handle(WorkerLost(1))
    desk.tick(0.6)
    effects = desk.connect(3, worker="w1")
    assert sent(effects) == [(3, AbortRequest("g", "r", 1))]
    late = RequestOutput("r", 1, 1, (66,))
    message = StepOutputs("w1", "i1", 0, (late,))
    assert desk.handle(WorkerMessage(3, message)) == []
    assert tokens_of(desk.output(1, [6], link=2, attempt=2)) == [6]
    # The end of the old attempt is the end of that attempt only.
    ended = RequestOutput("r", 1, 2, (), finish=FinishReason.CANCELLED)
    assert desk.handle(WorkerMessage(3, StepOutputs("w1", "i1", 0, (ended,)))) == []
    assert sent(desk.tick(2.0), AbortRequest) == []


def test_messages_of_another_incarnation_and_of_old_links_are_ignored():
    desk = Desk()
    desk.submit()
    old = StepOutputs("w1", "i0", 0, (RequestOutput("r", 1, 0, (66,)),))
    assert desk.handle(WorkerMessage(1, old)) == []
    desk.connect(2, worker="w1")
    stale = StepOutputs("w1", "i1", 0, (RequestOutput("r", 1, 0, (66,)),))
    assert desk.handle(WorkerMessage(1, stale)) == []
    desk.handle(WorkerLost(1))
    new = StepOutputs("w1", "i1", 0, (RequestOutput("r", 1, 0, (5,)),))
    assert tokens_of(desk.handle(WorkerMessage(2, new))) == [5]


def test_a_silent_worker_counts_as_lost():
    desk = Desk(workers=2)
    desk.submit()
    desk.accepted()
    desk.now = 8.0
    desk.says(2, LoadReport, (ReplicaLoad(0, 0, 0, 0, 16, 16, 0, 4),))
    submits = sent(desk.tick(10.6), SubmitRequest)
    assert [(link, submit.request.attempt) for link, submit in submits] == [(2, 2)]


RETRIABLE = {"finish": FinishReason.FAILED, "retriable": True, "detail": "Device gone."}


def test_a_retriable_failure_is_placed_again_and_its_tokens_kept():
    desk = Desk(workers=2)
    desk.submit()
    effects = desk.output(0, [5], **RETRIABLE)
    assert deltas(effects) == [(100, Delta(0, (5,), attempt=1))]
    ((_, submit),) = sent(effects)
    assert (submit.request.attempt, submit.request.emitted) == (2, (5,))


def test_a_failure_of_the_request_itself_is_final():
    desk = Desk()
    desk.submit()
    effects = desk.output(0, [], FinishReason.FAILED, detail="The prompt is empty.")
    ((_, delta),) = deltas(effects)
    assert (delta.finish, delta.detail) == (FinishReason.FAILED, "The prompt is empty.")
    assert sent(effects) == []


def test_attempts_without_a_new_token_are_bounded():
    desk = Desk()
    desk.submit()
    for attempt in range(1, 4):
        desk.output(0, [], attempt=attempt, **RETRIABLE)
    desk.output(0, [5], attempt=4, **RETRIABLE)  # it helped: the count starts anew
    for attempt in range(5, 9):
        assert deltas(desk.output(1, [], attempt=attempt, **RETRIABLE)) == []
    ((_, delta),) = deltas(desk.output(1, [], attempt=9, **RETRIABLE))
    assert delta.finish is FinishReason.FAILED
    assert delta.detail.startswith("5 attempts in a row ended without a new token; the last one:")


def test_a_workers_own_cancellation_is_not_the_clients():
    desk = Desk()
    desk.submit()
    effects = desk.output(0, [], FinishReason.CANCELLED)
    assert deltas(effects) == []
    assert [m.request.attempt for _, m in sent(effects, SubmitRequest)] == [2]


# Without workers.


def test_requests_wait_for_a_worker_higher_classes_first():
    desk = Desk(workers=0)
    assert not desk.core.info().ready
    for stream, priority in ((100, Priority.LOW), (101, Priority.LOW), (102, Priority.HIGH)):
        effects = desk.submit(request_of(f"r{stream}", priority=priority), stream)
        assert sent(effects) == []
    submits = sent(desk.connect(1))
    assert [m.request.request_id for _, m in submits] == ["r102", "r100", "r101"]
    assert [record.attempt for record in desk.core.decisions()] == [1, 1, 1]


def test_a_request_that_nobody_takes_fails_with_a_sentence():
    desk = Desk(workers=0)
    desk.submit()
    assert deltas(desk.tick(59.9)) == []
    ((_, delta),) = deltas(desk.tick(60.0))
    assert delta.finish is FinishReason.FAILED
    assert delta.detail == "No worker could take the request within 60 s; try again later."


def test_the_deadline_ends_a_waiting_request_and_aborts_a_running_one():
    desk = Desk(workers=0)
    desk.submit(request_of(deadline_s=2.0))
    assert [d.finish for _, d in deltas(desk.tick(2.0))] == [FinishReason.DEADLINE]
    desk.connect(1)
    desk.submit(request_of("s", deadline_s=2.0), 101)
    effects = desk.tick(4.0)
    assert [d.finish for _, d in deltas(effects)] == [FinishReason.DEADLINE]
    assert sent(effects, AbortRequest) == [(1, AbortRequest("g", "s", 1))]


# Clients.


def test_cancel_ends_the_stream_and_is_repeated_until_the_worker_says_so():
    desk = Desk()
    desk.submit()
    desk.accepted()
    effects = desk.handle(ClientCancel(7, "r"))
    assert [d.finish for _, d in deltas(effects)] == [FinishReason.CANCELLED]
    abort = (1, AbortRequest("g", "r", 1))
    assert sent(effects) == [abort]
    assert sent(desk.tick(1.0)) == [abort, abort]
    desk.output(0, [], FinishReason.CANCELLED)
    assert sent(desk.tick(3.0)) == []
    assert desk.handle(ClientCancel(8, "r")) == []
    error = refusal(desk.handle(ClientCancel(9, "nobody")), UnknownRequestError)
    assert "'nobody'" in str(error)


def test_a_broken_stream_without_a_lease_aborts_at_once():
    desk = Desk()
    desk.submit()
    assert sent(desk.handle(StreamBroken(100))) == [(1, AbortRequest("g", "r", 1))]
    assert desk.handle(StreamBroken(100)) == []


def test_a_broken_stream_with_a_lease_goes_on_and_can_be_resumed():
    desk = Desk()
    desk.submit(request_of(resume_lease_s=3.0))
    desk.output(0, [5])
    assert desk.handle(StreamBroken(100)) == []
    assert desk.output(1, [6]) == []
    desk.tick(2.9)
    effects = desk.handle(ClientResume(101, "r", 0))
    assert isinstance(effects[0], StreamOpened)
    assert deltas(effects) == [(101, Delta(0, (5, 6), attempt=1))]
    assert deltas(desk.tick(4.0)) == []  # the lease is void again
    assert deltas(desk.output(2, [7])) == [(101, Delta(2, (7,), attempt=1))]


def test_a_lease_that_runs_out_cancels():
    desk = Desk()
    desk.submit(request_of(resume_lease_s=3.0))
    desk.accepted()
    desk.handle(StreamBroken(100))
    assert sent(desk.tick(3.0), AbortRequest) == [(1, AbortRequest("g", "r", 1))]
    ((_, delta),) = deltas(desk.handle(ClientResume(101, "r", 0)))
    assert (delta.finish, delta.detail) == (
        FinishReason.CANCELLED,
        "Nobody resumed it within its lease.",
    )


def test_a_resume_cuts_off_the_older_stream():
    desk = Desk()
    desk.submit()
    desk.output(0, [5, 6])
    effects = desk.handle(ClientResume(101, "r", 1))
    assert isinstance(effects[0], StreamEnded)
    assert effects[0].stream == 100
    assert isinstance(effects[0].error, StreamReplacedError)
    assert deltas(effects) == [(101, Delta(1, (6,), attempt=1))]
    assert desk.handle(StreamBroken(100)) == []  # the old one breaks: nobody cares
    assert [stream for stream, _ in deltas(desk.output(2, [7]))] == [101]


def test_an_ended_request_can_be_replayed_for_a_while():
    desk = Desk()
    desk.submit(request_of(resume_lease_s=30.0))
    desk.output(0, [5, 6], FinishReason.STOP)
    desk.tick(29.0)
    effects = desk.handle(ClientResume(101, "r", 1))
    assert deltas(effects) == [(101, Delta(1, (6,), finish=FinishReason.STOP, attempt=1))]
    assert effects[-1] == StreamEnded(101)
    desk.tick(30.5)
    refusal(desk.handle(ClientResume(102, "r", 1)), UnknownRequestError)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_resume_beyond_the_tokens_is_refused(index):
    desk = Desk()
    desk.submit()
    desk.output(0, [5])
    error = refusal(desk.handle(ClientResume(101, "r", index)), InvalidRequestError)
    assert error.parameter == "from_index"


# Refusals.


def test_the_queue_is_bounded_and_counts_requests_without_a_token():
    desk = Desk()
    for stream in (100, 101, 102):
        desk.submit(request_of(f"r{stream}"), stream)
    assert desk.core.info().queued == 3
    error = refusal(desk.submit(request_of("more"), 103), QueueFullError)
    assert error.retry_after_s == 5.0  # nothing left the queue yet
    desk.now = 1.0
    desk.output(0, [5], name="r100")
    desk.now = 2.0
    desk.handle(ClientCancel(7, "r101"))
    assert (desk.core.info().queued, desk.core.info().running) == (1, 1)
    # The first one is placed again: it had its token and never counts any more.
    desk.output(1, [], name="r100", **RETRIABLE)
    assert desk.core.info().queued == 1
    desk.submit(request_of("a"), 104)
    desk.submit(request_of("b"), 105)
    error = refusal(desk.submit(request_of("more"), 106), QueueFullError)
    assert error.retry_after_s == 1.0


def test_an_id_in_progress_is_refused_and_an_ended_one_is_free():
    desk = Desk()
    desk.submit()
    refusal(desk.submit(stream=101), RequestExistsError)
    desk.output(0, [5], FinishReason.STOP)
    ((_, submit),) = sent(desk.submit(stream=102))
    assert submit.request.attempt == 2  # what is still said about the first one is fenced


def test_a_prompt_that_fits_no_replica_is_refused():
    desk = Desk(workers=0)
    desk.connect(1, max_model_len=32)
    desk.connect(2, max_model_len=48)
    error = refusal(desk.submit(request_of(prompt=(1,) * 48)), InvalidRequestError)
    assert error.parameter == "prompt"
    assert "48 tokens" in str(error)
    assert "at most 47" in str(error)
    ((link, _),) = sent(desk.submit(request_of(prompt=(1,) * 47)))
    assert link == 2


def test_drain_refuses_and_reports_when_nothing_is_left():
    desk = Desk()
    desk.submit()
    assert desk.handle(Drain()) == []
    refusal(desk.submit(request_of("s"), 101), DrainingError)
    assert desk.core.info().draining
    effects = desk.output(0, [5], FinishReason.STOP)
    assert effects[-1] == Drained()
    assert desk.handle(Drain()) == [Drained()]


def test_a_new_link_is_told_who_is_here():
    desk = Desk(workers=0)
    assert desk.handle(WorkerConnected(1)) == [SendToWorker(1, GatewayHeartbeat("g"))]
