"""One request after another: limits, stops, masks, chunks, logprobs, ends."""

import numpy as np
import pytest

from serving.engine.config import EngineConfig
from serving.engine.events import StepDone
from serving.engine.executor import MixedSize
from serving.engine.plan import NO_ROWS, StepResult
from serving.engine.request import FinishReason, Priority
from serving.errors import ConfigurationError, InternalError

EOS = 7


def test_a_request_gets_the_reference_tokens(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(10), max_tokens=12)
    driver.run()
    driver.assert_as_reference("a")
    assert driver.ends["a"] is FinishReason.LENGTH
    assert len(driver.tokens["a"]) == 12
    driver.assert_at_rest()


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("depth", [1, 2])
def test_chunked_and_whole_prefill_agree(make_driver, make_prompt, chunk, depth):
    driver = make_driver(
        limits={"max_prefill_tokens": chunk}, config={"pipeline_depth": depth}, eos_every=30
    )
    for index in range(6):
        driver.add(f"r{index}", make_prompt(5 + 7 * index, index), max_tokens=15)
    driver.run()
    driver.assert_as_reference()
    longest = max(piece.tokens.size for plan in driver.plans for piece in plan.prefills)
    assert longest == min(chunk, 40)


def test_the_step_budget_bounds_decodes_and_chunks_together(make_driver, make_prompt):
    driver = make_driver(config={"max_step_tokens": 6})
    for index in range(4):
        driver.add(f"r{index}", make_prompt(12, index), max_tokens=10)
    driver.run()
    driver.assert_as_reference()
    used = [
        plan.decode_rows.size + sum(chunk.tokens.size for chunk in plan.prefills)
        for plan in driver.plans
    ]
    assert max(used) == 6


def test_prompts_are_spread_over_steps_while_others_decode(make_driver, make_prompt):
    """A quarter of what waits, here, as a power of two; all of it when nothing decodes."""
    driver = make_driver(
        limits={"max_prefill_tokens": 32, "max_prefills": 8, "num_blocks": 60, "num_rows": 12},
        config={"spread_steps": 4, "min_prefill_tokens": 2, "prefix_caching": False},
    )
    driver.add("first", make_prompt(30), max_tokens=30)
    driver.step()
    for index in range(3):
        driver.add(f"r{index}", make_prompt(20, index), max_tokens=4)
    driver.run()
    driver.assert_as_reference()
    prefilled = [sum(chunk.tokens.size for chunk in plan.prefills) for plan in driver.plans]
    assert prefilled[0] == 30
    # 60 tokens are left, 44, 28, 20, 12, 8, 6, 4, 2: a quarter, rounded up.
    assert prefilled[1:10] == [16, 16, 8, 8, 4, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((), [16, 16, 8]),
        (((16, 4, 2), (32, 4, 2)), [12, 12, 12]),  # 60, 48, 36 tokens are left: 16 of each
        (((8, 2, 1), (32, 4, 2)), [28, 6]),  # a quarter of 60 is more than the smaller one takes
    ],
)
def test_prompts_beside_decodes_fill_a_mixed_call(make_driver, make_prompt, sizes, expected):
    """One whose tokens are at least what a step should take, and whose rows hold the decodes."""
    driver = make_driver(
        limits={
            "max_prefill_tokens": 32, "max_prefills": 8, "num_blocks": 60, "num_rows": 12,
            "mixed_sizes": tuple(MixedSize(*size) for size in sizes),
        },
        config={"spread_steps": 4, "min_prefill_tokens": 2, "prefix_caching": False},
    )  # fmt: skip
    driver.add("first", make_prompt(30), max_tokens=30)
    driver.step()
    for index in range(3):
        driver.add(f"r{index}", make_prompt(20, index), max_tokens=4)
    driver.run()
    driver.assert_as_reference()
    prefilled = [sum(chunk.tokens.size for chunk in plan.prefills) for plan in driver.plans]
    assert prefilled[0] == 30
    assert prefilled[1 : 1 + len(expected)] == expected


def test_more_decodes_than_mixed_calls_take_are_as_without_any(make_driver, make_prompt):
    driver = make_driver(
        limits={
            "max_prefill_tokens": 32, "max_prefills": 8, "num_blocks": 60, "num_rows": 12,
            "mixed_sizes": (MixedSize(32, 2, 2),),
        },
        config={"spread_steps": 4, "min_prefill_tokens": 16, "prefix_caching": False},
    )  # fmt: skip
    for index in range(2):
        driver.add(f"early{index}", make_prompt(5, index), max_tokens=30)
    driver.step()
    driver.add("third", make_prompt(40, 2), max_tokens=30)
    driver.step()  # beside two decodes
    driver.step()
    driver.add("fourth", make_prompt(40, 3), max_tokens=2)
    driver.step()  # beside three
    driver.run()
    driver.assert_as_reference()
    prefilled = [sum(chunk.tokens.size for chunk in plan.prefills) for plan in driver.plans]
    assert prefilled[:5] == [10, 30, 10, 16, 16]


@pytest.mark.parametrize(("spread", "priority"), [(1, Priority.HIGH), (4, Priority.LOW)])
def test_steps_are_filled_if_told_or_beside_the_batch_class(
    make_driver, make_prompt, spread, priority
):
    driver = make_driver(
        limits={"max_prefill_tokens": 32, "max_prefills": 8, "num_blocks": 60, "num_rows": 12},
        config={"spread_steps": spread, "min_prefill_tokens": 2, "prefix_caching": False},
    )
    driver.add("first", make_prompt(30), priority=priority, max_tokens=30)
    driver.step()
    for index in range(3):
        driver.add(f"r{index}", make_prompt(20, index), priority=priority, max_tokens=4)
    driver.run()
    prefilled = [sum(chunk.tokens.size for chunk in plan.prefills) for plan in driver.plans]
    assert prefilled[1:4] == [32, 28, 0]


@pytest.mark.parametrize(
    ("other", "prefill_first", "decoding"),
    [
        (Priority.LOW, True, [0, 0, 0, 4, 5]),
        (Priority.LOW, False, [0, 2, 3, 4, 5]),
        (Priority.HIGH, True, [0, 2, 3, 4, 5]),
    ],
)
def test_decodes_of_the_batch_class_wait_for_prompts_that_fill_calls(
    make_driver, make_prompt, other, prefill_first, decoding
):
    driver = make_driver(
        limits={"max_prefill_tokens": 32, "max_prefills": 8, "num_blocks": 80, "num_rows": 12},
        config={"prefill_first": prefill_first, "spread_steps": 1, "prefix_caching": False},
    )
    driver.add("first", make_prompt(12), priority=Priority.LOW, max_tokens=9)
    driver.add("other", make_prompt(20), priority=other, max_tokens=9)
    for index in range(2):
        driver.add(f"r{index}", make_prompt(32, index), priority=Priority.LOW, max_tokens=4)
    driver.add("short", make_prompt(31), priority=Priority.LOW, max_tokens=4)  # fills no call
    driver.run()
    driver.assert_as_reference()
    assert [plan.decode_rows.size for plan in driver.plans[: len(decoding)]] == decoding


@pytest.mark.parametrize(
    ("stop", "priority"),
    [("length", Priority.LOW), ("length", Priority.HIGH), ("cancel", Priority.LOW)],
)
def test_prompts_without_end_do_not_stop_the_batch_class(make_driver, make_prompt, stop, priority):
    """Each leaves its row and blocks at once, so these never run out."""
    driver = make_driver(
        limits={"max_prefill_tokens": 8, "max_prefills": 2, "num_blocks": 24, "num_rows": 4},
        config={"prefix_caching": False},
    )
    driver.add("old", make_prompt(4), priority=Priority.LOW, max_tokens=6)
    driver.step()
    for index in range(200):
        most = 1 if stop == "length" else 8
        driver.add(f"r{index}", make_prompt(8, index), priority=priority, max_tokens=most)
        driver.step()
        if stop == "cancel":
            driver.cancel(f"r{index}")
        if "old" in driver.ends:
            break
    driver.assert_as_reference("old")
    # The old one waits for 12 of those cancelled, which kept would fill the memory, then no more.
    assert index < (5 if stop == "length" else 12 + 6)


@pytest.mark.parametrize("name", ["spread_steps", "min_prefill_tokens"])
def test_a_spread_of_nothing_is_refused(name):
    with pytest.raises(ConfigurationError, match=name):
        EngineConfig(**{name: 0})


def test_a_plan_has_no_more_prefills_than_the_executor_takes(make_driver, make_prompt):
    driver = make_driver(limits={"max_prefills": 2, "max_prefill_tokens": 30})
    for index in range(4):
        driver.add(f"r{index}", make_prompt(5, index))
    driver.run()
    driver.assert_as_reference()
    assert max(len(plan.prefills) for plan in driver.plans) == 2


@pytest.mark.parametrize(("max_step_tokens", "most"), [(None, 8), (11, 8), (19, 16), (6, 6)])
def test_prefills_of_a_step_fill_whole_calls(make_driver, make_prompt, max_step_tokens, most):
    """Not a few tokens more, however much room decodes leave in the step."""
    driver = make_driver(
        limits={"max_prefills": 4, "max_prefill_tokens": 8},
        config={"max_step_tokens": max_step_tokens},
    )
    for index in range(4):
        driver.add(f"r{index}", make_prompt(9 + index, index))
    driver.run()
    driver.assert_as_reference()
    prefilled = [sum(chunk.tokens.size for chunk in plan.prefills) for plan in driver.plans]
    assert prefilled[0] == max(prefilled) == most
    if most == 8:  # the last of 9 tokens, and as many of the next prompt as the call takes then
        assert [chunk.tokens.size for chunk in driver.plans[1].prefills] == [1, 7]


def test_model_end_tokens_stop_unless_ignored(make_driver, make_prompt):
    driver = make_driver(eos_every=4)
    driver.add("stops", make_prompt(6), max_tokens=50)
    driver.add("runs on", make_prompt(6), max_tokens=50, ignore_eos=True)
    driver.run()
    driver.assert_as_reference()
    assert driver.ends["stops"] is FinishReason.STOP
    assert driver.tokens["stops"][-1] == EOS
    assert EOS in driver.tokens["runs on"]
    assert driver.ends["runs on"] is FinishReason.LENGTH
    assert len(driver.tokens["runs on"]) == 50


def test_own_stop_tokens_stop_even_when_the_models_are_ignored(make_driver, make_prompt):
    driver = make_driver()
    driver.add("free", make_prompt(6), max_tokens=20, ignore_eos=True)
    driver.run()
    stop = driver.tokens["free"][7]
    first = driver.tokens["free"].index(stop)
    driver.add("a", make_prompt(6), max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    driver.run()
    assert driver.tokens["a"] == driver.tokens["free"][: first + 1]
    assert driver.ends["a"] is FinishReason.STOP


@pytest.mark.parametrize("depth", [1, 2])
def test_min_tokens_masks_every_stop(make_driver, make_prompt, depth):
    driver = make_driver(config={"pipeline_depth": depth}, eos_every=2)
    for index in range(4):
        driver.add(
            f"r{index}",
            make_prompt(6, index),
            max_tokens=30,
            min_tokens=6,
            stop_token_ids=tuple(range(20, 60)),
        )
    driver.run()
    driver.assert_as_reference()
    for tokens in driver.tokens.values():
        assert len(tokens) > 6
        assert not set(tokens[:6]) & {EOS, *range(20, 60)}
    masked = sum(len(plan.masks) for plan in driver.plans)
    assert masked == 4 * 6  # the first six samples of each, and no more


def test_no_mask_is_sent_when_nothing_could_stop_the_request(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(6), min_tokens=5, ignore_eos=True)
    driver.run()
    assert not any(plan.masks for plan in driver.plans)


def test_the_context_ends_at_the_models_limit(make_driver, make_prompt):
    driver = make_driver(limits={"max_model_len": 30})
    driver.add("a", make_prompt(20), max_tokens=1000, ignore_eos=True)
    driver.run()
    assert driver.ends["a"] is FinishReason.LENGTH
    assert len(driver.tokens["a"]) == 10


def test_the_context_ends_where_the_arena_is_full(make_driver, make_prompt):
    driver = make_driver(limits={"num_blocks": 6})
    driver.add("a", make_prompt(20), max_tokens=1000, ignore_eos=True)
    driver.run()
    assert driver.ends["a"] is FinishReason.LENGTH
    assert len(driver.tokens["a"]) == 4
    driver.assert_as_reference("a")


@pytest.mark.parametrize("length", [0, 64, 100])
def test_a_prompt_that_cannot_fit_fails_with_a_sentence(make_driver, make_prompt, length):
    driver = make_driver()
    driver.add("a", make_prompt(length))
    assert driver.ends["a"] is FinishReason.FAILED
    assert driver.details["a"].endswith(".")
    assert ("63" in driver.details["a"]) == (length > 0)
    driver.assert_at_rest()


def test_masking_the_whole_vocabulary_fails_with_a_sentence(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(4), min_tokens=1, stop_token_ids=tuple(range(97)))
    assert driver.ends["a"] is FinishReason.FAILED
    assert "stop_token_ids" in driver.details["a"]


def test_a_later_attempt_continues_where_the_earlier_one_ended(make_driver, make_prompt):
    whole = make_driver()
    whole.add("a", make_prompt(9), max_tokens=20, min_tokens=12, temperature=1.0, seed=5)
    whole.run()
    for kept in (1, 7, 11, 19):
        driver = make_driver()
        driver.add(
            "a",
            make_prompt(9),
            emitted=whole.tokens["a"][:kept],
            attempt=2,
            max_tokens=20,
            min_tokens=12,
            temperature=1.0,
            seed=5,
        )
        driver.run()
        assert driver.tokens["a"] == whole.tokens["a"]
        assert sum(len(plan.masks) for plan in driver.plans) == max(12 - kept, 0)


def test_an_attempt_that_was_complete_ends_at_once(make_driver, make_prompt):
    driver = make_driver()
    driver.add("full", make_prompt(4), emitted=[10, 11, 12], max_tokens=3)
    driver.add("stopped", make_prompt(4), emitted=[10, EOS], max_tokens=9)
    driver.add("masked", make_prompt(4), emitted=[10, EOS], max_tokens=9, min_tokens=2)
    assert driver.ends == {"full": FinishReason.LENGTH, "stopped": FinishReason.STOP}
    driver.run()
    assert driver.tokens["full"] == [10, 11, 12]


def test_logprobs_are_those_of_the_step_that_drew_the_token(make_driver, make_prompt):
    for depth, steps in ((1, 1), (2, 1), (1, 4), (2, 4)):
        driver = make_driver(config={"pipeline_depth": depth, "decode_steps": steps})
        driver.add("two", make_prompt(9), max_tokens=9, logprobs=2)
        driver.add("chosen", make_prompt(5, 1), max_tokens=9, logprobs=0)
        driver.add("none", make_prompt(7, 2), max_tokens=9)
        driver.run()
        function = driver.executor.function
        for name, count in (("two", 2), ("chosen", 0)):
            request = driver.requests[name]
            context = [*request.prompt, *driver.tokens[name]]
            expected = [
                function.logprobs(
                    np.array(context[: len(request.prompt) + i], np.int32), request.sampling, count
                )
                for i in range(9)
            ]
            assert driver.logprobs[name] == expected
        assert driver.logprobs["none"] == []


def test_deadlines_end_requests_wherever_they_are(make_driver, make_prompt):
    driver = make_driver()
    driver.now = 5.0
    driver.add("late", make_prompt(4), deadline=5.0)
    assert driver.ends["late"] is FinishReason.DEADLINE
    for index in range(4):
        driver.add(f"runs{index}", make_prompt(4, index), max_tokens=40, deadline=9.0)
    driver.add("waits", make_prompt(4), deadline=8.0)
    driver.add("in time", make_prompt(4), max_tokens=3, deadline=50.0)
    for _ in range(6):
        driver.step()
    driver.now = 8.0
    driver.plan()
    assert driver.ends["waits"] is FinishReason.DEADLINE
    driver.now = 9.5
    driver.collect()
    assert all(driver.ends[f"runs{index}"] is FinishReason.DEADLINE for index in range(4))
    assert "after 6 tokens" in driver.details["runs0"]
    driver.run()
    assert driver.ends["in time"] is FinishReason.LENGTH
    driver.assert_at_rest()


def test_a_repeated_message_changes_nothing(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(5))
    assert driver.add("a", make_prompt(5)) == []
    driver.run()
    driver.assert_as_reference("a")


def test_two_attempts_of_one_request_are_two_requests(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(5), attempt=1)
    driver.cancel("a")
    del driver.ends["a"]
    driver.add("a", make_prompt(5), attempt=2)
    driver.run()
    driver.assert_as_reference("a")


def test_load_tells_what_runs_and_waits(make_driver, make_prompt):
    driver = make_driver(config={"replica": 3})
    for index in range(6):
        driver.add(f"r{index}", make_prompt(6, index))
    load = driver.core.load()
    assert (load.replica, load.running, load.waiting, load.waiting_tokens) == (3, 0, 6, 36)
    for _ in range(3):
        driver.step()
    load = driver.core.load()
    assert (load.running, load.waiting, load.waiting_tokens, load.steps) == (4, 2, 12, 3)
    assert load.total_blocks == 24
    assert load.block_size == 4
    assert load.free_blocks + load.cached_blocks == 24 - driver.books().in_use
    driver.run()
    assert driver.core.load().waiting_tokens == 0


def test_an_executor_error_loses_everything_and_kills_the_core(make_driver, make_prompt):
    for depth in (1, 2):
        driver = make_driver(config={"pipeline_depth": depth})
        for index in range(5):
            driver.add(f"r{index}", make_prompt(6, index), priority=Priority.LOW)
        driver.add("high", make_prompt(6))
        driver.step()
        while driver.plan():
            pass
        driver.executor.fail("the device is gone")
        driver.collect()
        (fail,) = driver.fails
        assert fail.reason == "the device is gone"
        assert fail.requests_lost == (*((f"r{i}", 1) for i in range(5)), ("high", 1))
        assert not driver.core.load().healthy
        driver.assert_at_rest()
        (answer,) = driver.add("new", make_prompt(3))
        assert answer.requests_lost == (("new", 1),)
        assert driver.plan() is None


def test_a_result_of_another_plan_is_a_failure(make_driver, make_prompt):
    driver = make_driver()
    driver.add("a", make_prompt(3))
    driver.plan()
    driver.executor._submitted[0] = type(driver.plans[0])(step_id=99)
    driver.executor._durations[99] = (0, 0, 0)
    driver.collect()
    assert "99" in driver.fails[0].reason


def test_a_result_without_a_plan_is_a_bug(make_driver):
    core = make_driver().core
    result = StepResult(1, NO_ROWS, np.zeros((0, 0), np.int32))
    with pytest.raises(InternalError, match="none is in flight"):
        core.handle(StepDone(result), 0.0)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"pipeline_depth": 3}, "pipeline_depth"),
        ({"decode_steps": 0}, "decode_steps"),
        ({"watermark": 1.0}, "watermark"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, name):
    with pytest.raises(ConfigurationError, match=name):
        EngineConfig(**settings)


def test_a_budget_that_decodes_would_fill_is_refused(make_driver):
    with pytest.raises(ConfigurationError, match="max_step_tokens"):
        make_driver(config={"max_step_tokens": 4})
