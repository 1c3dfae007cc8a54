"""The prefix cache as requests see it: fewer tokens computed, the same tokens out."""

import pytest

from serving.engine.request import Priority


def computed(driver):
    return sum(chunk.tokens.size for plan in driver.plans for chunk in plan.prefills)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_hit_gives_the_same_tokens_as_a_miss(make_driver, make_prompt, depth):
    driver = make_driver(config={"pipeline_depth": depth})
    driver.add("miss", make_prompt(18), max_tokens=6)
    driver.run()
    before = computed(driver)
    driver.add("hit", make_prompt(18), max_tokens=6)
    driver.run()
    assert driver.cached == {"miss": 0, "hit": 16}
    assert computed(driver) - before == 2
    assert driver.tokens["hit"] == driver.tokens["miss"]
    driver.assert_as_reference()
    assignment = driver.plans[-6].assignments[0] if depth == 1 else None
    assert assignment is None or assignment.kv_len == 16


def test_a_prompt_of_whole_blocks_computes_its_last_block(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(16), max_tokens=2)
    driver.run()
    driver.add("b", make_prompt(16), max_tokens=2)
    driver.run()
    assert driver.cached["b"] == 12
    driver.assert_as_reference()


@pytest.mark.parametrize(("count", "cached"), [(15, 24), (14, 20)])
@pytest.mark.parametrize("steps", [1, 4])
def test_generated_tokens_are_cached_for_the_next_turn(
    make_driver, make_prompt, count, cached, steps
):
    driver = make_driver(config={"decode_steps": steps})
    driver.add("turn1", make_prompt(10), max_tokens=count, ignore_eos=True)
    driver.run()
    driver.add("turn2", [*make_prompt(10), *driver.tokens["turn1"], 44, 45], max_tokens=4)
    driver.run()
    # The last token was sampled but never run through the model, so its block is not whole.
    assert driver.cached["turn2"] == cached
    driver.assert_as_reference()


def test_the_end_of_a_prefix_is_evicted_before_its_start(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 12})
    driver.add("a", make_prompt(17), max_tokens=1)
    driver.run()
    driver.add("takes the free blocks and one more", make_prompt(36, 1), max_tokens=1)
    driver.run()
    driver.add("again", make_prompt(17), max_tokens=1)
    driver.run()
    assert driver.cached["again"] == 12


def test_a_running_request_shares_its_blocks(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(17), max_tokens=20)
    for _ in range(4):
        driver.step()
    in_use = driver.books().in_use
    driver.add("b", make_prompt(17), max_tokens=3)
    driver.step()
    assert driver.cached.get("b", 16) == 16
    assert driver.books().in_use <= in_use + 2
    driver.run()
    driver.assert_as_reference()


def test_blocks_of_a_step_that_still_runs_are_not_shared(make_driver, make_prompt):
    driver = make_driver(config={"pipeline_depth": 2}, limits={"max_prefill_tokens": 64})
    driver.add("a", make_prompt(17), max_tokens=20)
    driver.plan()
    driver.add("b", make_prompt(17), max_tokens=3)
    driver.plan()
    assert driver.plans[1].assignments[0].kv_len == 0
    driver.run()
    assert driver.cached["b"] == 0
    driver.assert_as_reference()
    driver.assert_at_rest()


def test_another_prefix_is_a_miss_and_off_is_off(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(17))
    driver.run()
    driver.add("b", make_prompt(17, 1))
    driver.run()
    assert driver.cached["b"] == 0
    off = make_driver(config={"prefix_caching": False})
    for name in ("a", "b"):
        off.add(name, make_prompt(17))
        off.run()
    assert off.cached == {"a": 0, "b": 0}
    assert off.books().free == 24


def test_the_least_recently_used_prefix_goes_first(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 12})
    for name in ("old", "young"):
        driver.add(name, make_prompt(17, len(name)), max_tokens=1)
        driver.run()
    driver.add("old again", make_prompt(17, 3), max_tokens=1)
    driver.run()
    assert driver.cached["old again"] == 16
    driver.add("fills", make_prompt(28, 77), max_tokens=1)  # takes what "young" had, leaves first
    driver.run()
    driver.add("old once more", make_prompt(17, 3), max_tokens=1)
    driver.run()
    assert driver.cached["old once more"] == 16
    driver.add("young again", make_prompt(17, 5), max_tokens=1)
    driver.run()
    assert driver.cached["young again"] < 16
    driver.assert_as_reference()


def test_a_preempted_request_finds_its_own_blocks_again(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1})
    driver.add("low", make_prompt(16), Priority.LOW, max_tokens=12)
    for _ in range(6):
        driver.step()
    driver.add("high", make_prompt(4, 1), max_tokens=2)
    driver.run()
    again = [a for plan in driver.plans for a in plan.assignments][-1]
    assert again.kv_len == 20  # the prompt and one block of what it generated
    assert driver.cached["low"] == 0  # of the prompt, when it was first admitted
    driver.assert_as_reference()
