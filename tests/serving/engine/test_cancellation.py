"""Cancelling in every state: the end is published at once, blocks are free within one step."""

import pytest

from serving.engine.active import RequestState
from serving.engine.events import CancelRequest, Interrupt
from serving.engine.request import FinishReason, Priority
from serving.errors import InternalError


def assert_only_cached_or_free(driver):
    books = driver.books()
    assert (books.in_use, books.in_flight) == (0, 0)


def test_while_it_waits(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(9))
    driver.cancel("a")
    assert driver.ends["a"] is FinishReason.CANCELLED
    assert driver.books().free == 24
    driver.assert_at_rest()


@pytest.mark.parametrize("depth", [1, 2])
def test_while_it_prefills(make_driver, make_prompt, depth):
    driver = make_driver(config={"pipeline_depth": depth})
    driver.add("a", make_prompt(30))
    driver.plan()
    driver.cancel("a")
    assert driver.ends["a"] is FinishReason.CANCELLED
    assert driver.books().in_flight == 8
    driver.collect()
    assert_only_cached_or_free(driver)
    driver.assert_at_rest()


def test_while_it_prefills_and_nothing_runs(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(30))
    driver.step()
    driver.cancel("a")
    assert_only_cached_or_free(driver)
    driver.assert_at_rest()


@pytest.mark.parametrize("depth", [1, 2])
def test_while_it_decodes(make_driver, make_prompt, depth):
    driver = make_driver(config={"pipeline_depth": depth})
    driver.add("a", make_prompt(9), max_tokens=40, ignore_eos=True)
    driver.add("b", make_prompt(9, 1), max_tokens=40, ignore_eos=True)
    for _ in range(8):
        driver.step()
    while driver.plan():
        pass
    driver.cancel("a")
    in_use = driver.books().in_use
    assert driver.books().in_flight > 0
    for _ in range(depth):
        driver.collect()
    assert driver.books().in_flight == 0
    assert driver.books().in_use == in_use
    driver.run()
    driver.assert_as_reference("b")
    driver.assert_at_rest()


def test_while_it_waits_after_preemption(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1}, config={"pipeline_depth": 2})
    driver.add("low", make_prompt(9), Priority.LOW, max_tokens=30)
    for _ in range(6):
        driver.step()
    driver.add("high", make_prompt(9, 1), max_tokens=5)
    driver.plan()
    assert driver.waiting() == ["low"]
    driver.cancel("low")
    assert driver.ends["low"] is FinishReason.CANCELLED
    driver.run()
    driver.assert_as_reference("high")
    driver.assert_at_rest()


def test_after_its_end_and_of_strangers_it_does_nothing(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(4), max_tokens=2)
    driver.run()
    assert driver.cancel("a") == []
    assert driver.handle(CancelRequest("nobody", 1)) == []
    assert driver.ends["a"] is FinishReason.LENGTH


def test_of_another_attempt_it_does_nothing(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(4), attempt=2)
    assert driver.handle(CancelRequest("a", 1)) == []
    driver.run()
    driver.assert_as_reference("a")


def test_it_interrupts_a_plan_of_several_steps(make_driver, make_prompt):
    driver = make_driver(config={"decode_steps": 8, "pipeline_depth": 2})
    driver.add("a", make_prompt(4), max_tokens=50, ignore_eos=True)
    driver.add("b", make_prompt(4, 1), max_tokens=50, ignore_eos=True)
    for _ in range(2):
        driver.step()
    while driver.plan():
        pass
    assert [plan.steps for plan in driver.in_flight] == [8, 8]
    effects = driver.cancel("a")
    assert isinstance(effects[-1], Interrupt)
    effects = driver.collect()
    assert isinstance(effects[-1], Interrupt)  # the next plan holds the blocks as well
    driver.collect()
    assert driver.books().in_flight == 0
    driver.run()
    driver.assert_as_reference("b")


def test_a_cancelled_request_frees_its_row_for_the_next(make_driver, make_prompt):
    driver = make_driver(limits={"num_rows": 1}, config={"pipeline_depth": 2})
    driver.add("a", make_prompt(9), max_tokens=30)
    driver.add("b", make_prompt(9, 1), max_tokens=5)
    for _ in range(4):
        driver.step()
    driver.cancel("a")
    plan = driver.plan()
    assert plan.assignments[0].row == 0
    driver.run()
    driver.assert_as_reference("b")


def test_an_illegal_transition_raises(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(4))
    (request,) = driver.core._requests.values()
    with pytest.raises(InternalError, match="from waiting to decoding"):
        request.move(RequestState.DECODING)
