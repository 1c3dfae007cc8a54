import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigurationError
from serving.sim.workload import transforms as t
from serving.sim.workload.arrivals import Gamma, poisson
from serving.sim.workload.generated import generated
from serving.sim.workload.lengths import Fixed, Uniform
from serving.sim.workload.requests import BATCH, INTERACTIVE, ServiceClass, Workload
from serving.sim.workload.requests import WorkloadRequest as One
from serving.sim.workload.table import RequestTable


def every_second(count=10, prefix=False):
    rows = tuple(One(float(at), at + 1, 5, prefix=(0, at) if prefix else ()) for at in range(count))
    return Workload("w", float(count), rows, 16 if prefix else 0, left_out=3)


def many(count=20_000, seed=1):
    return generated("many", Uniform(1, 100), Fixed(5), poisson(10.0), count, seed)


def times(workload):
    return [one.at_s for one in workload.requests]


def test_a_window_starts_at_zero_and_does_not_hold_its_end():
    found = t.window(every_second(prefix=True), 4.0, 3.0)
    assert times(found) == [0.0, 1.0, 2.0]
    assert [one.prefix for one in found.requests] == [(0, 4), (0, 5), (0, 6)]
    assert (found.seconds, found.rate, found.left_out) == (3.0, 1.0, 0)
    assert times(t.window(every_second(), 8.5, 100.0)) == [0.5]
    assert len(t.window(every_second(), 20.0, 1.0).requests) == 0
    for start, seconds in ((-1, 1), (0, 0), (0, float("nan")), (float("inf"), 1)):
        with pytest.raises(ConfigurationError, match="of a window must be"):
            t.window(every_second(), start, seconds)


def test_another_rate_keeps_the_shape():
    made = t.at_rate(many(), 4.0)
    assert made.rate == pytest.approx(4.0)
    table, before = RequestTable.of(made.requests), RequestTable.of(many().requests)
    gaps, gaps_before = np.diff(table.at_s), np.diff(before.at_s)
    assert gaps / gaps.mean() == pytest.approx(gaps_before / gaps_before.mean())
    assert (table.prompt == before.prompt).all()
    with pytest.raises(
        ConfigurationError, match="no rate that could be scaled; give them arrivals"
    ):
        t.at_rate(Workload("w", 0.0, every_second().requests), 1.0)
    with pytest.raises(ConfigurationError, match="rate must be more than 0"):
        t.at_rate(every_second(), 0.0)


def test_thinning_keeps_times_and_a_share_of_the_requests():
    whole, thin = many(), t.thinned(many(), 0.25, seed=3)
    assert len(thin.requests) == pytest.approx(5000, rel=0.05)
    assert thin.seconds == whole.seconds
    assert set(times(thin)) < set(times(whole))
    assert thin == t.thinned(many(), 0.25, seed=3)
    assert thin != t.thinned(many(), 0.25, seed=4)
    for share in (0.0, 1.1):
        with pytest.raises(ConfigurationError, match="share of requests must be"):
            t.thinned(whole, share, 0)


def test_what_does_not_fit_is_counted():
    found = t.fitting(every_second(), max_tokens=9)
    assert [one.prompt for one in found.requests] == [1, 2, 3, 4]
    assert found.left_out == 3 + 6
    assert found.seconds == 10.0


def test_other_arrivals():
    found = t.with_arrivals(every_second(prefix=True), Gamma(2.0, 0.0), seed=0)
    assert times(found) == [at / 2 for at in range(10)]
    assert (found.seconds, found.rate) == (5.0, 2.0)
    assert [one.prompt for one in found.requests] == list(range(1, 11))


def test_classes_by_share():
    made = t.with_services(many(), {INTERACTIVE: 3.0, BATCH: 1.0}, seed=5)
    count = sum(one.service is BATCH for one in made.requests)
    assert count / len(made.requests) == pytest.approx(0.25, abs=0.01)
    assert made == t.with_services(many(), {INTERACTIVE: 3.0, BATCH: 1.0}, seed=5)
    assert made != t.with_services(many(), {INTERACTIVE: 3.0, BATCH: 1.0}, seed=6)
    only = t.with_services(every_second(), {INTERACTIVE: 0, BATCH: 2.0}, seed=5)
    assert {one.service for one in only.requests} == {BATCH}
    for shares in ({}, {BATCH: 0.0}, {BATCH: -1.0}, {BATCH: float("nan")}):
        with pytest.raises(ConfigurationError, match=r"[Ss]hares? of classes must"):
            t.with_services(every_second(), shares, seed=0)


def test_tenants_and_their_classes():
    made = t.with_tenants(many(), {"a": 1.0, "b": 1.0, "c": 0.0}, seed=5)
    gold = ServiceClass("gold", ttft_s=0.5)
    classed = t.with_services_of_tenants(made, {"b": gold, "a": BATCH})
    assert {(one.tenant, one.service) for one in classed.requests} == {("a", BATCH), ("b", gold)}
    with pytest.raises(ConfigurationError, match=r"No service class for tenant 'b'; .* 'a', 'c'"):
        t.with_services_of_tenants(made, {"a": BATCH, "c": gold})
    # Whose a request is says nothing about its class where both are drawn by one seed.
    both = t.with_services(made, {BATCH: 1.0, gold: 1.0}, seed=5)
    shares = [
        np.mean([one.service is BATCH for one in both.requests if one.tenant == who])
        for who in "ab"
    ]
    assert shares == pytest.approx([0.5, 0.5], abs=0.02)


def test_merged_workloads_interleave_and_share_no_prefix():
    first = t.with_tenants(every_second(3, prefix=True), {"a": 1.0}, 0)
    second = t.with_arrivals(every_second(4, prefix=True), Gamma(1.5, 0.0), 0)
    both = t.merged("both", (first, second))
    assert times(both) == pytest.approx([0, 0, 2 / 3, 1, 4 / 3, 2, 2])
    assert [one.tenant for one in both.requests] == ["a", "", "", "a", "", "a", ""]
    assert (both.seconds, both.left_out, both.prefix_tokens, both.name) == (3.0, 6, 16, "both")
    for who in ("a", ""):
        assert len({one.prefix[0] for one in both.requests if one.tenant == who}) == 1
    assert len({one.prefix[0] for one in both.requests}) == 2
    assert t.merged("m", [every_second(3), first]).prefix_tokens == 16
    bursts = [
        Workload(who, 10.0, tuple(One(at // 50, 1, 1, tenant=who) for at in range(500)))
        for who in "ab"
    ]
    tenants = "".join(one.tenant for one in t.merged("m", bursts).requests)
    assert tenants == ("a" * 50 + "b" * 50) * 10
    other = Workload("w", 1.0, first.requests, prefix_tokens=512)
    with pytest.raises(ConfigurationError, match="pieces of 16 and 512 tokens cannot"):
        t.merged("m", [first, other])
    with pytest.raises(ConfigurationError, match="no workload to merge"):
        t.merged("m", [])


def test_repeated_workloads_go_on_with_other_prefixes():
    made = t.repeated(every_second(2, prefix=True), 3)
    assert times(made) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [one.prompt for one in made.requests] == [1, 2] * 3
    assert (made.seconds, made.left_out) == (6.0, 9)
    prefixes = [set(one.prefix) for one in made.requests]
    assert prefixes[0] & prefixes[1]
    assert not (prefixes[0] | prefixes[1]) & (prefixes[2] | prefixes[3])
    for wrong in (0, 10**9):
        with pytest.raises(ConfigurationError, match="repeat must be"):
            t.repeated(every_second(2), wrong)


STEPS = {
    "window": lambda w: t.window(w, 1.5, 0.7 * max(w.seconds, 1.0)),
    "rate": lambda w: t.at_rate(w, 3.0) if 0 < w.rate < np.inf else w,
    "thinned": lambda w: t.thinned(w, 0.7, 1),
    "fitting": lambda w: t.fitting(w, 60),
    "arrivals": lambda w: t.with_arrivals(w, Gamma(2.0, 3.0), 1),
    "tenants": lambda w: t.with_tenants(w, {"a": 1, "b": 2}, 1),
    "services": lambda w: t.with_services(w, {BATCH: 1, INTERACTIVE: 2}, 1),
    "merged": lambda w: t.merged("m", [w, w]),
    "repeated": lambda w: t.repeated(w, 2),
}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=6))
def test_any_transforms_in_any_order_leave_a_workload(steps):
    workload = every_second(50, prefix=True)
    for step in steps:
        workload = STEPS[step](workload)
        at = times(workload)
        assert at == sorted(at)
        assert all(0 <= one <= workload.seconds for one in at)
        assert RequestTable.of(list(workload.requests)) == workload.requests
