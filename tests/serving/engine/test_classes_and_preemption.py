"""Who goes first, who gives way, and that giving way changes no token."""

import pytest

from serving.engine.request import FinishReason, Priority


def test_a_class_is_served_in_order_of_arrival(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1})
    for index in range(5):
        driver.add(f"r{index}", make_prompt(4, index), max_tokens=3)
    driver.run()
    assert list(driver.ends) == [f"r{index}" for index in range(5)]


def test_the_higher_class_overtakes_those_that_wait(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1})
    for index in range(3):
        driver.add(f"low{index}", make_prompt(4, index), Priority.LOW, max_tokens=3)
    driver.add("high", make_prompt(4, 9), max_tokens=3)
    driver.run()
    assert list(driver.ends) == ["high", "low0", "low1", "low2"]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_higher_class_takes_a_row_from_the_last_of_the_lower(make_driver, make_prompt, depth):
    driver = make_driver(config={"pipeline_depth": depth})
    for index in range(4):
        driver.add(f"low{index}", make_prompt(4, index), Priority.LOW, max_tokens=20)
    for _ in range(4):
        driver.step()
    driver.add("high", make_prompt(4, 9), max_tokens=4)
    driver.step()
    driver.step()
    assert driver.running() == {"low0", "low1", "low2", "high"}
    assert driver.waiting() == ["low3"]
    driver.run()
    driver.assert_as_reference()
    assert next(iter(driver.ends)) == "high"


@pytest.mark.parametrize("depth", [1, 2])
def test_the_higher_class_takes_blocks_from_the_lower(make_driver, make_prompt, depth):
    driver = make_driver(limits={"num_blocks": 12}, config={"pipeline_depth": depth})
    driver.add("low0", make_prompt(12, 0), Priority.LOW, max_tokens=12)
    driver.add("low1", make_prompt(16, 1), Priority.LOW, max_tokens=12)
    for _ in range(5):
        driver.step()
    assert driver.running() == {"low0", "low1"}
    driver.add("high", make_prompt(20, 2), max_tokens=4)
    driver.step()
    driver.step()
    assert "high" in driver.running()
    assert driver.waiting() == ["low1"]
    driver.run()
    driver.assert_as_reference()


@pytest.mark.parametrize("length", range(4, 12))
@pytest.mark.parametrize("need", range(3, 9))
def test_blocks_on_their_way_to_the_higher_class_are_not_taken(
    make_driver, make_prompt, length, need
):
    driver = make_driver(limits={"num_blocks": 12}, config={"pipeline_depth": 2, "watermark": 0.0})
    for index in range(3):
        prompt = make_prompt(length, index)
        driver.add(f"low{index}", prompt, Priority.LOW, max_tokens=30, ignore_eos=True)
    for _ in range(6):
        driver.step()
    driver.add("high", make_prompt(4 * need, 9), max_tokens=2)
    driver.plan()  # makes room
    driver.collect()  # the room is there
    driver.plan()
    assert "high" in driver.running()
    driver.run()
    driver.assert_as_reference()


def test_nobody_gives_way_when_it_would_not_help(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 16})
    driver.add("high0", make_prompt(40, 0), max_tokens=20)
    driver.add("low", make_prompt(4, 1), Priority.LOW, max_tokens=30)
    for _ in range(8):
        driver.step()
    driver.add("high1", make_prompt(40, 2), max_tokens=2)
    driver.step()
    assert driver.running() == {"high0", "low"}
    driver.run()
    driver.assert_as_reference()


def test_the_lower_class_is_not_admitted_while_the_higher_waits(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 16})
    driver.add("high0", make_prompt(40, 0), max_tokens=10)
    for _ in range(6):
        driver.step()
    driver.add("high1", make_prompt(40, 2), max_tokens=2)
    driver.add("low", make_prompt(3, 1), Priority.LOW, max_tokens=2)
    while "high1" in driver.waiting():
        assert "low" not in driver.running()  # though there is a row and blocks for the low one
        driver.step()
    assert "high0" in driver.ends
    driver.run()
    driver.assert_as_reference()


def test_prefills_of_the_higher_class_come_before_decodes_of_the_lower(make_driver, make_prompt):
    driver = make_driver(config={"max_step_tokens": 5}, limits={"max_prefill_tokens": 5})
    for index in range(3):
        driver.add(f"low{index}", make_prompt(4, index), Priority.LOW, max_tokens=20)
    for _ in range(5):
        driver.step()
    driver.add("high", make_prompt(10, 9), max_tokens=6)
    plan = driver.plan()
    assert plan.decode_rows.size == 0
    assert plan.prefills[0].tokens.size == 5
    driver.run()
    driver.assert_as_reference()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_growth_preempts_the_last_to_come(make_driver, make_prompt, depth, prefix_caching):
    driver = make_driver(
        limits={"num_blocks": 12},
        config={"pipeline_depth": depth, "prefix_caching": prefix_caching, "watermark": 0.0},
    )
    for index in range(3):
        driver.add(f"r{index}", make_prompt(12, index), max_tokens=24, ignore_eos=True)
    gone = []
    before = set()
    while not driver.core.is_idle():
        driver.step()
        gone += sorted(before - driver.running() - set(driver.ends))
        before = driver.running()
    assert gone[0] == "r2"
    assert "r0" not in gone
    driver.assert_as_reference()
    driver.assert_at_rest()
    assert next(iter(driver.ends)) == "r0"


def test_emitted_tokens_are_not_emitted_again_after_preemption(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1})
    driver.add("low", make_prompt(6), Priority.LOW, max_tokens=12)
    for _ in range(5):
        driver.step()
    kept = list(driver.tokens["low"])
    assert len(kept) == 5
    driver.add("high", make_prompt(6, 1), max_tokens=5)
    driver.run()  # the driver refuses an index that comes twice or too early
    assert driver.tokens["low"][:5] == kept
    driver.assert_as_reference()


def test_a_token_in_flight_at_preemption_is_not_lost(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1}, config={"pipeline_depth": 2})
    driver.add("low", make_prompt(6), Priority.LOW, max_tokens=12)
    driver.step()
    driver.step()
    assert len(driver.in_flight) == 1
    driver.add("high", make_prompt(6, 1), max_tokens=5)
    driver.plan()
    assert driver.waiting() == ["low"]
    before = len(driver.tokens["low"])
    driver.collect()
    assert len(driver.tokens["low"]) == before + 1
    driver.run()
    driver.assert_as_reference()


def test_the_last_token_in_flight_can_end_a_preempted_request(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1}, config={"pipeline_depth": 2})
    driver.add("low", make_prompt(6), Priority.LOW, max_tokens=3)
    driver.step()
    driver.step()
    driver.add("high", make_prompt(6, 1), max_tokens=5)
    driver.plan()
    driver.collect()
    assert driver.ends["low"] is FinishReason.LENGTH
    driver.run()
    driver.assert_as_reference()


def test_the_watermark_keeps_admission_from_thrashing(make_driver, make_prompt):
    def preemptions(watermark):
        driver = make_driver(limits={"num_blocks": 20}, config={"watermark": watermark})
        for index in range(8):
            driver.add(f"r{index}", make_prompt(15, index), max_tokens=20, ignore_eos=True)
        count = 0
        while not driver.core.is_idle():
            before = driver.running()
            driver.step()
            count += len(before - driver.running() - set(driver.ends))
        driver.assert_as_reference()
        return count

    assert preemptions(0.25) < preemptions(0.0)


def test_a_request_alone_may_use_the_whole_arena(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 16}, config={"watermark": 0.5})
    driver.add("a", make_prompt(60), max_tokens=4)
    driver.run()
    driver.assert_as_reference("a")


def test_the_oldest_request_is_never_starved(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 10}, config={"pipeline_depth": 2})
    driver.add("old", make_prompt(12), max_tokens=26, ignore_eos=True)
    for index in range(60):
        driver.add(f"r{index}", make_prompt(6, index), max_tokens=8)
        driver.step()
        if "old" in driver.ends:
            break
    assert "old" in driver.ends
    assert index < 45
    driver.run()
    driver.assert_as_reference()
