"""The fault test can fail: with one rule of the protocol taken out, some seed notices."""

import pytest

from serving.cluster.attempt_ledger import AttemptLedger
from serving.cluster.durable_requests import DurableRequests
from serving.cluster.fences import Fences
from serving.cluster.gateway_requests import Placement, RequestRecord
from serving.cluster.worker_core import WorkerCore
from serving.errors import InternalError
from serving.sim.faults.run import FaultRun
from serving.sim.gateway_node import GatewayNode
from serving.sim.replica_node import ReplicaNode

MOST_SEEDS = 60


def no_fencing(self, worker, request_id, attempt):
    record = self.records.get(request_id)
    return None if record is None or record.placement is None else record


def no_deduplication(self, output):
    self.tokens.extend(output.tokens)
    self.logprobs.extend(output.logprobs)
    return True


def gaps_are_ignored(self, output):
    new = output.tokens[max(0, len(self.tokens) - output.start_index) :]
    self.tokens.extend(new)
    return True


def nothing(self, *args, **kwargs):
    return None


def due_but_not_done(self, now):
    self._timers.pop_due(now)


def never_again(self, config):
    return float("inf")


def fence_forgets(self, fence, number):
    return False


def resumed_from_the_start(self, record, stream, from_index, attach=DurableRequests.attach):
    attach(self, record, stream, 0)


def replica_keeps_cancelled(self, event, post=ReplicaNode.post):
    if type(event).__name__ != "CancelRequest":
        post(self, event)


def emitted_is_left_out(self, placement, engine_request=RequestRecord.engine_request):
    request = engine_request(self, placement)
    object.__setattr__(request, "emitted", request.emitted[:-1])
    return request


BROKEN_RULES = {
    "outputs of older attempts are taken": (DurableRequests, "_current", no_fencing),
    "repeated tokens are taken": (RequestRecord, "append", no_deduplication),
    "missing tokens are skipped": (RequestRecord, "append", gaps_are_ignored),
    "requests of lost workers stay there": (DurableRequests, "worker_lost", nothing),
    "an unanswered question is not repeated": (Placement, "ask_due", never_again),
    "an abort is not repeated": (AttemptLedger, "tick", due_but_not_done),
    "late submits start again": (Fences, "blocks", fence_forgets),
    "a resume replays everything": (DurableRequests, "attach", resumed_from_the_start),
    "a worker forgets no output": (WorkerCore, "_forget", nothing),
    "an engine does not cancel": (ReplicaNode, "post", replica_keeps_cancelled),
    "the last token is not handed on": (RequestRecord, "engine_request", emitted_is_left_out),
    "lost replicas are kept secret": (WorkerCore, "_replica_failed", nothing),
}


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_broken_rule_is_noticed(monkeypatch, rule):
    where, name, broken = BROKEN_RULES[rule]
    monkeypatch.setattr(where, name, broken)
    for seed in range(MOST_SEEDS):
        try:
            FaultRun(seed).run()
        except (InternalError, AssertionError):
            return
    pytest.fail(f"{MOST_SEEDS} seeds did not notice that {rule}")


def test_a_token_delivered_twice_is_noticed(monkeypatch):
    """The client's own check, without the gateway's help."""

    def deliver_twice(self, effect, carry_out=GatewayNode._carry_out):
        carry_out(self, effect)
        if type(effect).__name__ == "Deliver" and effect.delta.finish is None:
            carry_out(self, effect)

    monkeypatch.setattr(GatewayNode, "_carry_out", deliver_twice)
    with pytest.raises(InternalError, match="is next, but the delta starts at"):
        FaultRun(0).run()
