"""The modelled executor must notice what a device would answer with garbage."""

import numpy as np
import pytest

from serving.engine.executor import ExecutorLimits
from serving.engine.masks import mask_without
from serving.engine.plan import PrefillChunk, RowAssignment, StepPlan, TableUpdate
from serving.engine.request import SamplingParams
from serving.errors import ExecutorError
from serving.sim.modelled_executor import ModelledExecutor, StepCost
from serving.sim.token_function import TokenFunction

GREEDY = SamplingParams(temperature=0.0)
SLOTS = 6
PROMPT = tuple(range(20, 30))


def make_executor(**changes) -> ModelledExecutor:
    values = {
        "num_rows": 3,
        "num_blocks": 12,
        "slots_per_block": SLOTS,
        "block_size": 4,
        "max_model_len": 32,
        "max_prefill_tokens": 16,
        "max_prefills": 2,
        "vocab_size": 97,
        "max_logprobs": 3,
        "model_revision": "r1",
    }
    return ModelledExecutor(ExecutorLimits(**{**values, **changes}), StepCost(1.0, 0.1, 0.01))


def table(row, blocks, first_column=0):
    columns = np.arange(first_column, first_column + len(blocks), dtype=np.int32)
    bases = np.asarray(blocks, np.int32) * SLOTS
    return TableUpdate(np.full(len(blocks), row, np.int32), columns, bases)


def start(step_id, row=0, prompt=PROMPT, blocks=(0, 1, 2), cached=0, samples=True, **changes):
    """A plan that assigns a row and runs a whole prompt."""
    values = {
        "prefills": (PrefillChunk(row, cached, np.asarray(prompt[cached:], np.int32), samples),),
        "assignments": (RowAssignment(row, cached, GREEDY, ()),),
        "table": table(row, blocks),
    }
    return StepPlan(step_id, **{**values, **changes})


def decode(step_id, rows=(0,), **changes):
    return StepPlan(step_id, np.asarray(rows, np.int32), **changes)


def run(executor, plan):
    executor.submit(plan)
    return executor.collect()


def test_tokens_are_those_of_the_reference():
    executor = make_executor()
    tokens = [int(run(executor, start(1)).tokens[0, 0])]
    for step in range(2):
        tokens += run(executor, decode(2 + step)).tokens[0].tolist()
    assert tuple(tokens) == executor.function.reference_tokens(PROMPT, 3, GREEDY)
    assert executor.violations == []


def test_a_chunk_that_does_not_sample_brings_no_tokens():
    executor = make_executor()
    chunk = PrefillChunk(0, 0, np.asarray(PROMPT[:7], np.int32), samples=False)
    result = run(executor, start(1, prefills=(chunk,)))
    assert result.rows.size == 0
    assert result.tokens.shape == (0, 0)
    rest = PrefillChunk(0, 7, np.asarray(PROMPT[7:], np.int32), samples=True)
    result = run(executor, StepPlan(2, prefills=(rest,)))
    assert tuple(result.tokens[0]) == executor.function.reference_tokens(PROMPT, 1, GREEDY)


def test_several_steps_end_early_at_a_stop_or_an_interrupt():
    executor = make_executor()
    expected = executor.function.reference_tokens(PROMPT, 9, GREEDY)
    stop = expected[3]
    plan = start(1, blocks=(0, 1, 2, 3, 4))
    run(executor, plan)
    assert run(executor, decode(2, steps=2)).tokens.tolist() == [list(expected[1:3])]
    executor.submit(decode(3, steps=4))
    executor.interrupt()
    assert executor.collect().tokens.tolist() == [[stop]]
    executor.interrupt()  # nothing runs, so nothing is interrupted
    assert run(executor, decode(4, steps=3)).tokens.tolist() == [list(expected[4:7])]
    executor.submit(decode(5, steps=3))
    executor.interrupt(steps_taken=1)
    assert executor.collect().tokens.shape == (1, 2)
    assignment = RowAssignment(1, 0, GREEDY, (stop,))
    row1 = start(6, row=1, blocks=(5, 6, 7, 8, 9), assignments=(assignment,))
    assert run(executor, row1).tokens.tolist() == [[expected[0]]]
    assert run(executor, decode(7, (1,), steps=8)).tokens.tolist() == [list(expected[1:4])]
    assert executor.violations == []


def test_a_mask_forbids_tokens_at_the_first_sample():
    executor = make_executor()
    (first,) = executor.function.reference_tokens(PROMPT, 1, GREEDY)
    mask = mask_without(97, {first})
    other = int(run(executor, start(1, masks={0: mask})).tokens[0, 0])
    assert other != first
    only = mask_without(97, set(range(97)) - {5})
    assert int(run(executor, decode(2, masks={0: only})).tokens[0, 0]) == 5


def test_logprobs_come_for_rows_that_ask():
    executor = make_executor()
    asks = SamplingParams(temperature=0.0, logprobs=2)
    result = run(executor, start(1, assignments=(RowAssignment(0, 0, asks, ()),)))
    made_up = executor.function.logprobs(np.asarray(PROMPT, np.int32), asks, 3)
    assert result.logprobs is not None
    assert result.logprobs.chosen.tolist() == [[made_up.logprob]]
    assert result.logprobs.top_ids.tolist() == [[[token for token, _ in made_up.top]]]
    assert run(make_executor(), start(1)).logprobs is None


def test_a_seed_matters_only_when_sampling():
    function = TokenFunction("r1", 1000)
    runs = {
        (temperature, seed): function.reference_tokens(
            PROMPT, 8, SamplingParams(temperature=temperature, seed=seed)
        )
        for temperature in (0.0, 1.0)
        for seed in (1, 2)
    }
    assert runs[0.0, 1] == runs[0.0, 2]
    assert runs[1.0, 1] != runs[1.0, 2]
    assert runs[0.0, 1] != runs[1.0, 1]


def test_end_tokens_come_at_about_the_rate_asked_for():
    function = TokenFunction("r1", 10_000, (3,), eos_every=10)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    tokens = function.reference_tokens(PROMPT, 1000, sampling)
    assert 60 < tokens.count(3) < 150
    stopped = function.reference_tokens(PROMPT, 1000, GREEDY)
    assert stopped == tokens[: tokens.index(3) + 1]


def test_a_wrong_table_entry_changes_the_tokens_and_is_noticed():
    executor = make_executor()
    run(executor, start(1))
    wrong = decode(2, table=table(0, (2,), first_column=1))
    token = int(run(executor, wrong).tokens[0, 0])
    assert "reads position 4 from block 2, which holds position 8" in executor.violations[0]
    assert token != executor.function.reference_tokens(PROMPT, 2, GREEDY)[1]


def test_a_wrong_prefix_hit_gives_other_tokens():
    executor = make_executor()
    run(executor, start(1))
    prompt = (1, 2, 3, 4, *PROMPT[4:])
    result = run(executor, start(2, row=1, prompt=prompt, blocks=(0, 5, 6), cached=4))
    assert tuple(result.tokens[0]) != executor.function.reference_tokens(prompt, 1, GREEDY)


def test_a_block_that_was_never_written_is_noticed():
    executor = make_executor()
    run(executor, start(1, cached=4, blocks=(7, 1, 2)))
    assert "block 7, which holds position -1" in executor.violations[0]


def test_a_missing_table_entry_is_noticed():
    executor = make_executor()
    run(executor, start(1, blocks=(0, 1)))
    assert any("lacks blocks" in violation for violation in executor.violations)


def test_reusing_a_block_while_a_step_runs_is_noticed():
    executor = make_executor()
    run(executor, start(1))
    executor.submit(decode(2))
    executor.submit(start(3, row=1, prompt=(9, 9, 9), blocks=(2,)))
    assert any("still writing" in violation for violation in executor.violations)
    executor = make_executor()
    run(executor, start(1))
    executor.submit(decode(2))
    executor.submit(start(3, row=1, prompt=(9, 9, 9), blocks=(0,)))
    assert any("still being read" in violation for violation in executor.violations)


def test_reusing_a_block_after_the_step_is_fine():
    executor = make_executor()
    run(executor, start(1))
    run(executor, decode(2))
    result = run(executor, start(3, row=1, prompt=(9, 9, 9), blocks=(0,)))
    assert tuple(result.tokens[0]) == executor.function.reference_tokens((9, 9, 9), 1, GREEDY)
    assert executor.violations == []


def test_sharing_a_block_that_is_only_read_is_fine():
    executor = make_executor()
    run(executor, start(1))
    executor.submit(decode(2))
    executor.submit(start(3, row=1, blocks=(0, 1, 5), cached=8))
    executor.collect()
    executor.collect()
    assert executor.violations == []


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (decode(2, (0, 0)), "twice or out of order"),
        (decode(2, (1, 0)), "twice or out of order"),
        (decode(2, steps=2, masks={0: mask_without(97, {1})}), "several steps beside"),
        (decode(2, masks={1: mask_without(97, {1})}), "does not sample"),
        (start(2, row=0), "prefills from 0 but its KV ends at"),
        (start(2, row=1, blocks=(4, 5, 6), prompt=tuple(range(17))), "empty or too long"),
        (start(2, row=1, blocks=(4, 5, 6), cached=2), "starts inside a block"),
        (decode(2, (1,)), "never sampled"),
    ],
)
def test_plans_against_the_rules_are_noticed(plan, what):
    executor = make_executor()
    run(executor, start(1))
    if what.startswith("prefills"):
        plan = StepPlan(2, prefills=plan.prefills)
    if what == "never sampled":
        run(executor, start(9, row=1, blocks=(4, 5, 6, 7), samples=False))
    run(executor, plan)
    assert any(what in violation for violation in executor.violations), executor.violations


def test_a_failure_comes_back_as_a_result():
    executor = make_executor()
    executor.submit(start(1))
    executor.fail("the device is gone")
    assert executor.collect().error == "the device is gone"
    assert run(executor, decode(2)).error == "the device is gone"


def test_collecting_nothing_is_refused():
    with pytest.raises(ExecutorError, match="submit one first"):
        make_executor().collect()


def test_duration_counts_tokens_and_context():
    executor = make_executor()
    plan = start(1, blocks=(0, 1, 2, 3))
    executor.submit(plan)
    assert executor.predicted_duration(plan) == pytest.approx(1.0 + 0.1 * 10)
    executor.collect()
    several = decode(2, steps=3)
    executor.submit(several)
    assert executor.predicted_duration(several) == pytest.approx(
        3 + 0.1 * 3 + 0.01 * (10 + 11 + 12)
    )
    assert executor.predicted_duration(several, steps=1) == pytest.approx(1 + 0.1 + 0.01 * 10)
    executor.collect()
    with pytest.raises(ExecutorError, match="not in flight"):
        executor.predicted_duration(several)
