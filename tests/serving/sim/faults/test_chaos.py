"""Search, shrinking, replay and coverage: they find what is planted and say the same each time."""

import dataclasses
import json

import pytest

from serving.cluster.attempt_ledger import AttemptLedger
from serving.cluster.durable_requests import DurableRequests
from serving.sim.faults import shrink as shrinking
from serving.sim.faults.chaos import (
    Failure,
    digest,
    read_run,
    record,
    replay,
    rule_of,
    run_seed,
    scenario_of,
    write_run,
)
from serving.sim.faults.coverage import Coverage, Stage, possible
from serving.sim.faults.run import FaultRun
from serving.sim.faults.scenario import Fault, Scenario
from serving.sim.faults.seed_search import Tally, run_seeds, search
from serving.sim.faults.shrink import shrink
from serving.sim.literal import LiteralError, from_literal, to_literal
from serving.sim.watch import Mishap
from serving.sim.world import InvariantViolated

SEEDS = range(26)  # two groups of `search`

# (stage, mishap) that migration and elastic weights will live or die by.
IMPORTANT = [
    (Stage.QUEUED, Mishap.STALL),
    (Stage.QUEUED, Mishap.CANCEL),
    (Stage.SENT, Mishap.LOSS),
    (Stage.SENT, Mishap.DUPLICATION),
    (Stage.SENT, Mishap.CUT),
    (Stage.SENT, Mishap.CRASH),
    (Stage.DECODING, Mishap.LOSS),
    (Stage.DECODING, Mishap.DUPLICATION),
    (Stage.DECODING, Mishap.REORDER),
    (Stage.DECODING, Mishap.CUT),
    (Stage.DECODING, Mishap.STALL),
    (Stage.DECODING, Mishap.REPLICA),
    (Stage.DECODING, Mishap.CANCEL),
    (Stage.DECODING, Mishap.BREAK),
    (Stage.DECODING, Mishap.DEADLINE),
    (Stage.DECODING, Mishap.PREEMPTION),
    (Stage.DECODING, Mishap.NO_BLOCKS),
    (Stage.UNDELIVERED, Mishap.LOSS),
    (Stage.UNDELIVERED, Mishap.CUT),
    (Stage.UNDELIVERED, Mishap.PARTITION),
    (Stage.AGAIN, Mishap.STALL),
    (Stage.KEPT, Mishap.LOSS),
    (Stage.KEPT, Mishap.CRASH),
    (Stage.OLDER, Mishap.REORDER),
    (Stage.OLDER, Mishap.DUPLICATION),
    (Stage.CONTINUED, Mishap.LOSS),
    (Stage.CONTINUED, Mishap.REORDER),
    (Stage.AWAY, Mishap.LOSS),
    (Stage.AWAY, Mishap.RESUME),
]


@pytest.fixture(scope="module")
def tally():
    return run_seeds(SEEDS)


def acknowledgements_are_lost(self, worker_id):
    return ()


def lost_workers_keep_their_requests(self, worker_id, incarnation, why):
    return None


PLANTED = {
    "lost acknowledgement": (AttemptLedger, "take_acknowledgements", acknowledgements_are_lost),
    "ignored loss": (DurableRequests, "worker_lost", lost_workers_keep_their_requests),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found_shrunk_and_replayed(monkeypatch, tmp_path, planted):
    with monkeypatch.context() as broken:
        broken.setattr(*PLANTED[planted])
        failure = next(failure for seed in range(60) if (failure := run_seed(seed)))
        whole = scenario_of(failure.seed)
        small = shrink(failure.seed, whole, failure.rule, most_runs=150)
        assert small.runs <= 150
        assert len(small.scenario.clients) == 1 < len(whole.clients)
        assert len(small.scenario.workers) == 1
        assert len(small.scenario.faults) <= 1
        run = record(small.seed, small.scenario)
        assert run.rule == failure.rule
        write_run(tmp_path / "run.json", run)
        again = read_run(tmp_path / "run.json")
        assert again == run
        logs = [replay(again.seed, again.scenario) for _ in range(2)]
        assert logs[0] == logs[1]
        assert digest(logs[0][0]) == run.log_sha256
        assert logs[0][0].splitlines()[-1] == f"broken: {run.message}"
    # The file is about the core, not about the search: without the plant nothing breaks.
    log, failure = replay(again.seed, again.scenario)
    assert failure is None
    assert log.splitlines()[-1] == "no rule was broken"
    with pytest.raises(ValueError, match="breaks no rule"):
        record(again.seed, again.scenario)


def test_a_clean_range_is_clean(tally):
    assert tally.seeds == len(SEEDS)
    assert not tally.failures
    assert tally.cpu_s > 0


def test_every_important_cell_is_hit(tally):
    missed = [cell for cell in IMPORTANT if not tally.coverage.hits[cell]]
    assert not missed
    assert not set(IMPORTANT) & set(tally.coverage.missed())


def test_what_cannot_meet_does_not(tally):
    assert all(possible(*cell) for cell in tally.coverage.hits)


def test_the_same_seeds_give_the_same_tally_on_two_cores(tally):
    other = Tally()
    for part in search(SEEDS.start, len(SEEDS), jobs=2):
        other.add(part)
    assert other.coverage.hits == tally.coverage.hits
    assert other.coverage.table() == tally.coverage.table()
    assert (other.seeds, other.failures) == (tally.seeds, tally.failures)


@pytest.mark.parametrize("seed", [3, 8])
def test_looking_on_changes_nothing(seed):
    runs = [FaultRun(seed, keep_log=True, coverage=coverage) for coverage in (None, Coverage())]
    results = [run.run() for run in runs]
    assert results[0] == results[1]
    assert runs[0].world.log == runs[1].world.log


def test_the_table_tells_never_from_impossible():
    coverage = Coverage()
    coverage.hits[Stage.QUEUED, Mishap.CRASH] = 12345
    lines = coverage.table().splitlines()
    assert len(lines) == 1 + len(Stage)
    assert lines[0].split() == [mishap.value.split()[-1] for mishap in Mishap]
    queued = lines[1].removeprefix(Stage.QUEUED.value)
    # No message is about a request that waits at the gateway.
    assert queued.split() == ["12345", *["."] * 8]
    assert (Stage.QUEUED, Mishap.CRASH) not in coverage.missed()
    assert (Stage.QUEUED, Mishap.CUT) in coverage.missed()
    assert (Stage.QUEUED, Mishap.LOSS) not in coverage.missed()


def test_shrinking_keeps_what_the_rule_needs_and_nothing_else(monkeypatch):
    whole = scenario_of(0)
    crash = dataclasses.replace(whole.faults[0], fault=Fault.CRASH, worker=1, replica=0)
    setup = dataclasses.replace(whole.workers[0], worker_id="w1", replicas=2)
    whole = dataclasses.replace(
        whole, workers=(whole.workers[0], setup), faults=(*whole.faults, crash)
    )

    def needs_a_client_and_a_crash(seed, scenario):
        struck = {(scenario.workers[f.worker].worker_id, f.fault) for f in scenario.faults}
        names = [plan.request.request_id for plan in scenario.clients]
        broken = ("w1", Fault.CRASH) in struck and "r3" in names
        return Failure(seed, "rule", "message", 0.0) if broken else None

    monkeypatch.setattr(shrinking, "run_seed", needs_a_client_and_a_crash)
    small = shrink(0, whole, "rule").scenario
    assert [plan.request.request_id for plan in small.clients] == ["r3"]
    assert [setup.worker_id for setup in small.workers] == ["w1"]
    assert [(fault.fault, fault.worker) for fault in small.faults] == [(Fault.CRASH, 0)]
    assert small.clients[0].acts == ()
    assert len(small.clients[0].request.prompt) == 1
    assert small.clients[0].request.sampling.max_tokens == 1
    assert small.network.loss == small.network.duplication == 0.0
    assert small.workers[0].replicas == 1
    # Another rule does not count, and runs are not spent without end.
    assert shrink(0, whole, "another rule").scenario == whole
    assert shrink(0, whole, "rule", most_runs=3).runs == 3


def test_rules_are_told_apart_by_what_they_say():
    def rule(message):
        return rule_of(InvariantViolated(message))

    first = rule("seed 17, 0.250001 s: request r5: its tokens are [1, 2], wanted (3,)")
    assert first == rule("seed 2, 0.5 s: request r11: its tokens are [], wanted (3, 4)")
    assert first != rule("seed 17, 0.250001 s: request r5: nobody cancelled it")
    with pytest.raises(KeyError) as caught:
        {}["b"]
    assert rule_of(caught.value) == "KeyError in test_rules_are_told_apart_by_what_they_say"


@pytest.mark.parametrize("seed", range(10))
def test_scenarios_survive_a_file(seed):
    scenario = scenario_of(seed)
    text = json.dumps(to_literal(scenario))
    assert from_literal(Scenario, json.loads(text)) == scenario
    # The scenario of a file is the seed's own.
    assert run_seed(seed, scenario) is None


WRONG = {
    "not JSON": ("{", "is not JSON"),
    "brackets without end": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "must be the fields of RecordedRun"),
    "a field less": ('{"seed": 1}', "missing: log_sha256, message, rule, scenario"),
}
WRONG_PARTS = {
    ("network", "loss"): ("much", "scenario.network.loss is 'much'; it must be a number"),
    ("network", "duplication"): (float("nan"), "network.duplication is nan; it must be a number"),
    ("gateway", "worker_silent_s"): (0, "gateway.worker_silent_s is 0.0; it must be more than 0"),
    ("network", "lost"): (0.5, "scenario.network has not the fields of NetworkFaults; unknown: l"),
    ("network", "delay"): ([0.1], "scenario.network.delay is .* a list of 2"),
    ("numerics", "drift"): (1, "scenario.numerics.drift is 1; it must be true or false"),
    ("numerics", "eos_every"): (True, "it must be a whole number"),
    ("clients", 0): ({"submit_at": 0.0}, r"scenario.clients\[0\] has not .*; missing: request"),
    ("faults", 0): (
        {"at": 0.1, "fault": "FLOOD", "worker": 0, "replica": 0, "seconds": 0.1},
        r"faults\[0\].fault is 'FLOOD'; it must be one of CRASH, CUT,",
    ),
    ("faults", 1): (
        {"at": 0.1, "fault": "CUT", "worker": 9, "replica": 0, "seconds": 0.1},
        r"scenario.faults\[1\] names a worker that is not there",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_is_no_run_is_refused(tmp_path, wrong):
    text, message = WRONG[wrong]
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(LiteralError, match=message):
        read_run(tmp_path / "run.json")


@pytest.mark.parametrize("part", WRONG_PARTS)
def test_a_wrong_value_in_a_file_is_named(tmp_path, part):
    value, message = WRONG_PARTS[part]
    scenario = to_literal(scenario_of(2))
    assert len(scenario["faults"]) >= 2
    scenario[part[0]][part[1]] = value
    content = {"seed": 2, "scenario": scenario, "rule": "", "message": "", "log_sha256": ""}
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(LiteralError, match=message):
        read_run(tmp_path / "run.json")


def test_a_file_of_a_fleet_that_cannot_be_is_refused(tmp_path):
    for part, value, message in (
        ("replicas", 10**30, r"workers\[0\].replicas is 10+; it must be from 1 to"),
        ("engine", {"watermark": 3.0}, "run.json: watermark is 3.0"),
    ):
        scenario = to_literal(scenario_of(2))
        scenario["faults"] = []
        scenario["workers"][0][part] = value
        content = {"seed": 2, "scenario": scenario, "rule": "", "message": "", "log_sha256": ""}
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(LiteralError, match=message):
            read_run(tmp_path / "run.json")
    scenario = to_literal(scenario_of(2))
    scenario["faults"] = []
    scenario["workers"][0]["numerics"]["limits"]["block_size"] = 0
    content["scenario"] = scenario
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(LiteralError, match="no fleet can be made of its scenario"):
        read_run(tmp_path / "run.json")
