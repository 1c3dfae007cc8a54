"""A fleet in virtual time: the same run every time, with and without stretches."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from serving.engine.request import FinishReason
from serving.errors import ConfigurationError
from serving.sim.fleet.clients import prompt_of
from serving.sim.fleet.records import GapHistogram, RequestTimes
from serving.sim.fleet.run import DEFAULT_ENGINE, FleetConfig, FleetRun
from serving.sim.profile import read_profile
from serving.sim.workload.requests import BATCH, INTERACTIVE, Workload, WorkloadRequest

PROFILE = read_profile(Path(__file__).parents[4] / "configs/profiles/h200_llama_8b.json")
SMALL = replace(PROFILE, executor=replace(PROFILE.executor, num_rows=8, mixed_calls=((128, 8),)))


def workload(seed, requests=60, seconds=1.0):
    """Random requests, some with common prefixes, some of class batch."""
    chance = random.Random(seed)
    at = sorted(chance.uniform(0, seconds) for _ in range(requests))
    return Workload(
        "random",
        seconds,
        tuple(
            WorkloadRequest(
                at_s=time,
                prompt=chance.choice([20, 300, 900]),
                output=chance.choice([1, 2, 40, 200, 400]),
                service=chance.choice([INTERACTIVE, INTERACTIVE, BATCH]),
                prefix=chance.choice([(), (), (1,), (1, 2), (3, 4, 5)]),
            )
            for time in at
        ),
        prefix_tokens=128,
    )


def config(**changes):
    engine = replace(DEFAULT_ENGINE, prefix_caching=True)
    settings = {"profile": SMALL, "replicas": 3, "replicas_per_worker": 2, "engine": engine}
    return FleetConfig(**{**settings, "num_blocks": 60, "sample_s": 0.1, **changes})


def outcome(result):
    """All that must not depend on how steps are put together."""
    times = result.times
    return {
        "arrived": times.arrived.tolist(),
        "first": times.first.tolist(),
        "finished": times.finished.tolist(),
        "tokens": times.tokens.tolist(),
        "preempted": times.preempted.tolist(),
        "cached": times.cached.tolist(),
        "gaps": result.gaps.counts.tolist(),
        "samples": result.samples,
        "steps": result.steps,
    }


@pytest.mark.parametrize("seed", range(3))
def test_stretches_change_nothing(seed):
    work = workload(seed)
    with_, without = (
        FleetRun(config(), work, checked=seed == 0, stretches=stretches).run()
        for stretches in (True, False)
    )
    assert outcome(with_) == outcome(without)
    assert with_.events < without.events
    assert with_.times.preempted.sum() > 0
    assert with_.times.cached.sum() > 0
    assert with_.times.tokens.tolist() == [request.output for request in work.requests]
    assert with_.times.ends == {FinishReason.LENGTH: len(work.requests)}
    several = sum(request.output - 1 for request in work.requests)
    assert with_.gaps.counts.sum() == several


def test_the_same_seed_gives_the_same_log():
    logs = [FleetRun(config(), workload(seed), hash_log=True).run().log for seed in (1, 1, 2)]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_one_request_takes_what_its_steps_take():
    alone = Workload("one", 1.0, (WorkloadRequest(0.25, 1024, 3),))
    settings = config(profile=PROFILE, replicas=1, num_blocks=None, network_s=0.001)
    times = FleetRun(settings, alone).run().times
    # Submit, token: two messages. Then a call of 1,024 tokens.
    it = np.ones(1, np.bool_)
    assert times.ttft(it)[0] == pytest.approx(0.002 + 0.0230, abs=2e-4)
    assert times.tpot(it)[0] == pytest.approx(0.0043, abs=1e-4)


def test_who_finds_the_gateway_full_comes_back():
    crowd = Workload("crowd", 1.0, tuple(WorkloadRequest(0.0, 900, 2) for _ in range(40)))
    result = FleetRun(config(queue=10, replicas=1), crowd).run()
    assert result.times.refused > 0
    assert (result.times.tokens == 2).all()


def test_what_fits_nowhere_is_refused_for_good():
    large = Workload("large", 1.0, (WorkloadRequest(0.0, 5000, 2), WorkloadRequest(0.5, 10, 2)))
    result = FleetRun(config(), large).run()
    assert result.times.refused == 1
    assert result.times.tokens.tolist() == [0, 2]
    assert np.isnan(result.times.first[0])


def test_prompts_share_their_prefix_and_nothing_else():
    one = WorkloadRequest(0.0, 50, 1, prefix=(70_000, 2))
    other = WorkloadRequest(0.0, 60, 1, prefix=(70_000, 3))
    a, b, c = prompt_of(1, one, 16), prompt_of(2, one, 16), prompt_of(1, other, 16)
    assert (len(a), len(c)) == (50, 60)
    assert a[:32] == b[:32]
    assert a[32:] != b[32:]
    assert a[:16] == c[:16]
    assert a[16:32] != c[16:32]
    short = WorkloadRequest(0.0, 20, 1, prefix=(70_000, 2))
    assert prompt_of(9, short, 16) == a[:20]


def test_percentiles_of_gaps_are_within_half_a_percent():
    gaps = GapHistogram()
    values = np.random.default_rng(0).lognormal(-4, 1, 5000)
    gaps.add_all(values, 2)
    for percent in (50, 95, 99):
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert gaps.percentile(percent) == pytest.approx(exact, rel=0.006)
    assert GapHistogram().percentile(50) is None


def test_times_of_requests_that_did_not_end_are_left_out():
    times = RequestTimes.of(4)
    times.arrived[:] = 1.0
    times.first[:] = (3.0, 4.0, np.nan, 6.0)
    times.finished[:] = (7.0, np.nan, np.nan, 6.0)
    times.tokens[:] = (5, 4, 0, 1)  # the last one's first token is all
    every, later = np.ones(4, np.bool_), np.array([False, True, True, True])
    assert times.ttft(every).tolist() == [2.0, 3.0, 5.0]
    assert times.tpot(every).tolist() == [1.0]
    assert times.ttft(later).tolist() == [3.0, 5.0]
    assert times.tpot(later).tolist() == []


@pytest.mark.parametrize(
    "wrong", [{"replicas": 0}, {"queue": 0}, {"report_s": 0.0}, {"network_s": -1.0}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        config(**wrong)
