"""10,000 random engine operations under the invariants, with the books checked after each."""

import random
from collections import Counter

import pytest

from serving.engine.executor import MixedSize
from serving.engine.request import FinishReason, Priority

OPERATIONS = 2000  # for each of the eight variants below

TIGHT = {"num_blocks": 18, "max_model_len": 48}


def add(driver, rng, name):
    """A request with a prefix that others have too, of any class and shape."""
    stem = [10 + rng.randrange(3)] * rng.choice([0, 4, 9, 16])
    own = [rng.randrange(8, 97) for _ in range(rng.randrange(1, 10))]
    greedy = rng.random() < 0.7
    driver.add(
        name,
        stem + own,
        priority=Priority.HIGH if rng.random() < 0.5 else Priority.LOW,
        deadline=driver.now + rng.randrange(1, 60) if rng.random() < 0.1 else None,
        temperature=0.0 if greedy else 1.0,
        seed=rng.randrange(3),
        max_tokens=rng.choice([1, 2, 5, 12, 40]),
        min_tokens=rng.choice([0, 0, 0, 3, 9]),
        stop_token_ids=rng.choice([(), (), (20, 21, 22)]),
        ignore_eos=rng.random() < 0.2,
        logprobs=rng.choice([None, None, None, 0, 2]),
    )


def assert_higher_class_first(driver, plan):
    """Invariant 6, after a plan of the plain loop: what a waiting HIGH request lacks is not LOW's.

    Blocks that no HIGH request holds would not be enough for it, or HIGH requests have filled what
    a step prefills.
    """
    waiting = [r for r in driver.core._waiting if r.priority is Priority.HIGH]
    running = [r for r in driver.core._batch.requests if r is not None]
    if not waiting or not any(r.priority is Priority.LOW for r in running):
        return
    high = [r for r in running if r.priority is Priority.HIGH]
    rows = {r.row for r in high}
    chunks = [chunk for chunk in plan.prefills if chunk.row in rows]
    tokens = sum(chunk.tokens.size for chunk in chunks)
    limits = driver.limits
    if len(chunks) == limits.max_prefills or tokens == limits.max_prefill_tokens:
        return
    assert len(high) < driver.limits.num_rows
    others = driver.limits.num_blocks - len({b for r in high for b in r.blocks})
    need = -(-len(waiting[0].tokens) // driver.limits.block_size)
    assert others < need + 1, "a LOW request runs on what a HIGH request waits for"


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("decode_steps", [1, 4])
@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_random_operations(make_driver, pipeline_depth, decode_steps, prefix_caching):
    seed = 1000 * pipeline_depth + 10 * decode_steps + prefix_caching
    rng = random.Random(seed)
    spread = pipeline_depth == 2 and decode_steps == 1
    driver = make_driver(
        limits={**TIGHT, "mixed_sizes": (MixedSize(6, 3, 2),)} if spread else TIGHT,
        config={
            **({"spread_steps": 4, "min_prefill_tokens": 1} if spread else {}),
            "pipeline_depth": pipeline_depth,
            "decode_steps": decode_steps,
            "prefix_caching": prefix_caching,
        },
        eos_every=25,
    )
    seen = Counter()
    for operation in range(OPERATIONS):
        driver.now += rng.random()
        choice = rng.random()
        live = sorted(set(driver.requests) - set(driver.ends))
        before = driver.running()
        if choice < 0.12 and len(live) < 12:
            add(driver, rng, f"r{operation}")
        elif choice < 0.14 and live:
            driver.cancel(rng.choice(live))
        elif choice < 0.55 and driver.in_flight:
            driver.collect()
        else:
            plan = driver.plan()
            seen["preempted"] += len(before - driver.running() - set(driver.ends))
            if plan is not None and pipeline_depth == 1:
                assert_higher_class_first(driver, plan)
        seen["in flight"] += driver.books().in_flight > 0
        seen["several steps"] += bool(driver.in_flight) and driver.in_flight[-1].steps > 1
    driver.run()
    driver.assert_at_rest()
    assert set(driver.ends) == set(driver.requests)
    for name, end in driver.ends.items():
        seen[end] += 1
        if end in (FinishReason.STOP, FinishReason.LENGTH):
            driver.assert_as_reference(name)
        else:
            got = driver.tokens[name]
            assert got == driver.reference(name)[: len(got)]
            assert end in (FinishReason.CANCELLED, FinishReason.DEADLINE)
        wanted = driver.requests[name].sampling.logprobs
        assert len(driver.logprobs[name]) == (0 if wanted is None else len(driver.tokens[name]))
    # The run went where it should have gone.
    assert seen["preempted"] > 10
    assert all(seen[end] > 2 for end in FinishReason if end is not FinishReason.FAILED)
    assert seen["in flight"] > 0
    if decode_steps > 1:
        assert seen["several steps"] > 5
    if prefix_caching:
        assert sum(count > 0 for count in driver.cached.values()) > 10
