"""Every event comes back as it was; JSON of another type is refused with a sentence."""

import dataclasses
import json
from typing import get_type_hints

import numpy as np
import pytest

from serving.cluster import gateway_events as g
from serving.cluster import messages as m
from serving.cluster import worker_events as w
from serving.cluster.generation import GenerationRequest
from serving.engine.events import AddRequest, CancelRequest, EngineEvent, PlanStep, StepDone
from serving.engine.plan import NO_ROWS, Int32, LogprobArrays, StepPlan, StepResult
from serving.engine.request import (
    EngineRequest,
    FinishReason,
    Priority,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from serving.errors import QueueFullError
from serving.incident.values import decode, encode, reader
from serving.policy.snapshot import ReplicaLoad

SAMPLING = SamplingParams(0.1, 5, 1 / 3, 0, 2**32 - 1, 2, 9, 1, (3, 4), True)
REQUEST = EngineRequest("a", 2, (1, 2, 3), SAMPLING, (9,), Priority.LOW, 1e9 + 0.1)
OUTPUT = RequestOutput(
    "a", 1, 4, (5, 6), (TokenLogprobs(-0.5, ((5, -0.5), (6, -np.inf))),), FinishReason.DEADLINE, "x"
)
LOAD = ReplicaLoad(0, 1, 2, 3, 64, 60, 0, 16, 7, healthy=False)
INFO = m.ReplicaInfo(0, 8, 1024, 1024, 16, 64)
SELF = ("w", "one")
EVENTS = {
    EngineEvent: [AddRequest(REQUEST), CancelRequest("a", 1), PlanStep()],
    g.GatewayEvent: [
        g.ClientSubmit(1, GenerationRequest("a", (1,), SAMPLING, ("stop",), deadline_s=2)),
        g.ClientResume(1, "a", 3),
        g.ClientCancel(4, "a"),
        g.StreamBroken(1),
        g.Drain(),
        g.WorkerConnected(2),
        g.WorkerLost(2),
        g.GatewayTick(),
        g.WorkerMessage(2, m.WorkerHello(*SELF, "model", "r", 97, (INFO,))),
        g.WorkerMessage(2, m.RequestAccepted(*SELF, "a", 1)),
        g.WorkerMessage(2, m.RequestUnknown(*SELF, "a", 1)),
        g.WorkerMessage(2, m.StepOutputs(*SELF, 0, (OUTPUT,))),
        g.WorkerMessage(2, m.LoadReport(*SELF, (LOAD,))),
    ],
    w.WorkerEvent: [
        w.GatewayConnected(1),
        w.GatewayLost(1),
        w.ReplicaPublished(0, (OUTPUT,)),
        w.ReplicaLoaded(LOAD),
        w.ReplicaFailed(0, "broke"),
        w.ReplicaRestored(0),
        w.DrainWorker(),
        w.WorkerTick(),
        w.GatewayMessage(1, m.SubmitRequest("g", 0, REQUEST, 1.5)),
        w.GatewayMessage(1, m.AbortRequest("g", "a", 1)),
        w.GatewayMessage(1, m.FetchOutput("g", "a", 1, 2)),
        w.GatewayMessage(1, m.GatewayHeartbeat("g", (("a", 1), ("b", 2)))),
    ],
}


@pytest.mark.parametrize(
    ("kind", "event"), [(kind, event) for kind, events in EVENTS.items() for event in events]
)
def test_events_come_back(kind, event):
    again = decode(kind, encode(event))
    assert again == event
    assert repr(again) == repr(event)  # 1 and 1.0 are equal, and different


WITH_ARRAYS = {StepResult, Int32}  # compared by the tests below


def test_the_table_above_has_every_event():
    for kind, events in EVENTS.items():
        reader(kind)
        plain = {
            one for one in kind.__args__ if not WITH_ARRAYS & set(get_type_hints(one).values())
        }
        assert plain == {type(event) for event in events}


@pytest.mark.parametrize("shape", [(0, 0), (0, 1), (3, 0), (2, 3)])
def test_step_results_come_back_with_shapes_and_bits(shape):
    numbers = np.random.default_rng(0).standard_normal((*shape, 2)).astype(np.float32)
    logprobs = LogprobArrays(numbers[..., 0], np.zeros((*shape, 2), np.int32), numbers)
    tokens = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    result = StepResult(3, NO_ROWS, tokens, logprobs, None, {"never": object()})
    again = decode(EngineEvent, encode(StepDone(result))).result
    assert again.extra == {}
    assert (again.step_id, again.error) == (3, None)
    pairs = [(again.rows, NO_ROWS), (again.tokens, tokens)]
    pairs += [(getattr(again.logprobs, f.name), getattr(logprobs, f.name))
              for f in dataclasses.fields(LogprobArrays)]  # fmt: skip
    for one, other in pairs:
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_plans_with_masks_are_told_apart():
    def of(word):
        return encode(StepPlan(1, masks={3: np.asarray([word], np.uint32)}))

    assert decode(StepPlan, of(5)).masks[3].tolist() == [5]
    assert of(5) != of(6)


def test_errors_are_answers_too():
    assert (
        encode(QueueFullError("full", 1.5)) == '["QueueFullError","full",[["retry_after_s",1.5]]]'
    )


def test_what_no_event_holds_is_not_written():
    with pytest.raises(TypeError, match="A object is in an event"):
        encode([object()])


def changed(event, *path_and_value):
    *path, last, value = path_and_value
    whole = json.loads(encode(event))
    at = whole
    for step in path:
        at = at[step]
    at[last] = value
    return json.dumps(whole)


DONE = StepDone(StepResult(1, NO_ROWS, np.zeros((1, 1), np.int32)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "AddRequest or CancelRequest"),
        ('["Popen","rm"]', "AddRequest or CancelRequest"),
        ('["CancelRequest","a"]', "2 fields of CancelRequest"),
        ('["CancelRequest","a",1.0]', "a int"),
        (changed(AddRequest(REQUEST), 1, 3, [1, "2"]), "a list of numbers"),
        (changed(AddRequest(REQUEST), 1, 6, 7), "a Priority"),
        (changed(AddRequest(REQUEST), 1, 7, "soon"), "a float"),
        (changed(DONE, 1, 3, 0, "<i8"), "an array of int32"),
        (changed(DONE, 1, 3, 0, "O"), "an array of int32"),
        (changed(DONE, 1, 3, 1, [2, 2]), "reshape"),
        (changed(DONE, 1, 3, 1, [-1]), "a shape"),
        (changed(DONE, 1, 3, 2, [2**40]), "beyond int32"),
        (changed(DONE, 1, 3, 2, [0.5]), "numbers of type int32"),
    ],
)
def test_other_json_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        decode(EngineEvent, text)
