"""The overlapped pipeline and plans of several steps against the plain loop."""

import pytest

from serving.engine.events import Interrupt
from serving.engine.request import FinishReason, Priority


def fill(driver, make_prompt):
    """Twelve requests that cannot all run at once."""
    for index in range(12):
        driver.add(
            f"r{index}",
            [*make_prompt(9, index % 2), *make_prompt(1 + index, index)],
            priority=Priority(index % 3 == 1),
            max_tokens=6 + 3 * index,
            min_tokens=4 if index % 4 == 0 else 0,
            temperature=float(index % 2),
            seed=index,
            logprobs=1 if index % 5 == 0 else None,
        )


@pytest.mark.parametrize("num_blocks", [18, 60])
def test_every_way_to_run_gives_the_same_tokens(make_driver, make_prompt, num_blocks):
    results = []
    for depth in (1, 2):
        for steps in (1, 4):
            for prefix_caching in (True, False):
                driver = make_driver(
                    limits={"num_blocks": num_blocks},
                    config={
                        "pipeline_depth": depth,
                        "decode_steps": steps,
                        "prefix_caching": prefix_caching,
                    },
                    eos_every=15,
                )
                fill(driver, make_prompt)
                driver.run()
                driver.assert_as_reference()
                driver.assert_at_rest()
                results.append((driver.tokens, driver.ends, driver.logprobs))
    assert all(result[0] == results[0][0] for result in results)
    assert all(result[1] == results[0][1] for result in results)
    assert all(result[2] == results[0][2] for result in results)


def test_the_next_step_is_submitted_while_one_runs(make_driver, make_prompt):
    driver = make_driver(config={"pipeline_depth": 2})
    driver.add("a", make_prompt(6), max_tokens=10)
    assert driver.plan() is not None
    plan = driver.plan()
    assert plan is not None
    assert plan.decode_rows.tolist() == [0]
    assert driver.plan() is None
    assert len(driver.in_flight) == 2


def test_a_stop_found_late_discards_what_ran_on(make_driver, make_prompt):
    driver = make_driver(config={"pipeline_depth": 2}, eos_every=3)
    driver.add("a", make_prompt(6), max_tokens=40)
    while "a" not in driver.ends:
        driver.step()
    assert driver.ends["a"] is FinishReason.STOP
    assert len(driver.in_flight) == 1
    assert driver.books().in_flight > 0
    driver.collect()
    driver.assert_as_reference("a")
    driver.assert_at_rest()


def test_the_last_step_of_a_request_is_known_and_not_overrun(make_driver, make_prompt):
    driver = make_driver(config={"pipeline_depth": 2, "eos_token_ids": ()})
    driver.add("a", make_prompt(6), max_tokens=5)
    driver.run()
    assert len(driver.plans) == 5


def test_several_steps_only_when_nothing_waits_or_is_masked(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 2}, config={"decode_steps": 4})
    driver.add("a", make_prompt(6), max_tokens=23, min_tokens=3, ignore_eos=False)
    driver.run()
    # One prefill, two more masked samples, then fours as long as they fit, then the rest.
    assert [plan.steps for plan in driver.plans] == [1, 1, 1, 4, 4, 4, 4, 4]
    driver.assert_as_reference()
    busy = make_driver(limits={"num_rows": 1}, config={"decode_steps": 4})
    busy.add("a", make_prompt(6), max_tokens=9)
    busy.add("b", make_prompt(6, 1), max_tokens=9)
    busy.run()
    steps = [plan.steps for plan in busy.plans]
    assert set(steps[:9]) == {1}  # "b" waits until "a" has ended
    assert steps[9:] == [1, 4, 4]


def test_several_steps_never_go_beyond_what_a_row_may_still_sample(make_driver, make_prompt):
    driver = make_driver(config={"decode_steps": 4, "pipeline_depth": 2})
    for index, count in enumerate((3, 8, 17)):
        driver.add(f"r{index}", make_prompt(6, index), max_tokens=count, ignore_eos=True)
    driver.run()
    driver.assert_as_reference()
    assert max(plan.steps for plan in driver.plans) == 4


def test_several_steps_fall_back_to_one_when_memory_is_short(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 8}, config={"decode_steps": 8, "watermark": 0.0})
    driver.add("a", make_prompt(8), max_tokens=20, ignore_eos=True)
    driver.add("b", make_prompt(8, 1), max_tokens=20, ignore_eos=True)
    driver.run()
    driver.assert_as_reference()
    driver.assert_at_rest()


@pytest.mark.parametrize("depth", [1, 2])
def test_an_arrival_interrupts_and_short_results_are_reconciled(make_driver, make_prompt, depth):
    driver = make_driver(config={"decode_steps": 8, "pipeline_depth": depth})
    driver.add("a", make_prompt(6), max_tokens=40, ignore_eos=True)
    driver.step()
    while driver.plan():
        pass
    assert driver.in_flight[-1].steps == 8
    before = len(driver.tokens["a"])
    while driver.in_flight and driver.in_flight[0].steps == 1:
        driver.collect()
        before = len(driver.tokens["a"])
    effects = driver.add("b", make_prompt(6, 1), max_tokens=12)
    assert isinstance(effects[-1], Interrupt)
    assert not any(isinstance(e, Interrupt) for e in driver.add("c", make_prompt(3)))
    driver.collect()
    assert len(driver.tokens["a"]) == before + 1
    driver.run()
    driver.assert_as_reference()
    driver.assert_at_rest()


def test_an_early_end_gives_the_other_rows_their_tokens_back(make_driver, make_prompt):
    driver = make_driver(config={"decode_steps": 8, "pipeline_depth": 2}, eos_every=6)
    for index in range(4):
        driver.add(f"r{index}", make_prompt(6, index), max_tokens=16)
    short = 0
    while not driver.core.is_idle():
        while driver.plan():
            pass
        planned, had = driver.in_flight[0], {n: len(t) for n, t in driver.tokens.items()}
        driver.collect()
        got = max(len(t) - had[n] for n, t in driver.tokens.items())
        short += planned.steps > 1 and got < planned.steps
    assert short
    driver.assert_as_reference()
