"""What plans ask for is what comes back, whatever the batch, the chunking and the step count."""

import jax
import numpy as np
import pytest

from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.masks import mask_without
from serving.engine.plan import PrefillChunk, RowAssignment
from serving.engine.request import SamplingParams

DRAW = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=7)


def test_chunked_prefill_equals_whole_prefill(driver, prompt):
    tokens = prompt(32)
    whole = driver.generate(0, tokens, 8)
    for chunk in (5, 8, 31):
        assert driver.generate(0, tokens, 8, chunk=chunk) == whole


def test_a_request_does_not_see_its_batch(driver, prompt):
    prompts = [prompt(n, seed=n) for n in (3, 17, 40, 9)]
    alone = [driver.generate(0, tokens, 10, room=16) for tokens in prompts]
    batch = type(driver)(driver.executor, seed=1)
    first = [int(batch.start(row, p, room=16).tokens[0, 0]) for row, p in enumerate(prompts)]
    rest = batch.decode(range(4), 9)
    assert [[head, *tail] for head, tail in zip(first, rest.tolist(), strict=True)] == alone


def test_rows_come_and_go_between_steps(driver, prompt):
    prompts = [prompt(n, seed=n) for n in (12, 30, 5)]
    alone = [driver.generate(0, tokens, 9, DRAW, room=16) for tokens in prompts]
    batch = type(driver)(driver.executor, seed=2)
    a = [int(batch.start(1, prompts[0], DRAW, room=16).tokens[0, 0])]
    a += batch.decode([1], 3)[0].tolist()
    b = [int(batch.start(3, prompts[1], DRAW, room=16).tokens[0, 0])]
    both = batch.decode([1, 3], 5)
    assert [*a, *both[0].tolist()] == alone[0]
    b += both[1].tolist()
    c = [int(batch.start(1, prompts[2], DRAW, room=16).tokens[0, 0])]  # the row of the first
    both = batch.decode([1, 3], 3)
    assert [*b, *both[1].tolist()] == alone[1]
    c += [*both[0].tolist(), *batch.decode([1], 5)[0].tolist()]
    assert c == alone[2]


def test_decode_and_prefill_in_one_plan(driver, prompt):
    first, second = prompt(10, seed=1), prompt(20, seed=2)
    alone = [driver.generate(0, tokens, 4, room=16) for tokens in (first, second)]
    batch = type(driver)(driver.executor, seed=3)
    begun = int(batch.start(0, first, room=16).tokens[0, 0])
    result = batch.run(
        decode_rows=np.array([0], np.int32),
        prefills=(PrefillChunk(2, 0, second, True),),
        assignments=(RowAssignment(2, 0, SamplingParams(temperature=0.0), ()),),
        table=batch.table(2, batch.take_blocks(36)),
    )
    assert result.rows.tolist() == [0, 2]
    both = [result.tokens, *(batch.run(decode_rows=result.rows).tokens for _ in range(2))]
    both = np.concatenate(both, axis=1)
    assert [begun, *both[0].tolist()] == alone[0]
    assert both[1].tolist() == alone[1][:3]


def test_a_shared_prefix_is_not_computed_again(driver, prompt):
    shared = prompt(32)
    block_size = driver.limits.block_size
    blocks = driver.take_blocks(32)
    expected = {}
    for seed in (1, 2):
        tokens = np.concatenate([shared, prompt(9, seed=seed)])
        expected[seed] = driver.generate(0, tokens, 6)
    driver.start(1, shared, blocks=blocks)
    for row, seed in ((0, 1), (1, 2)):
        tokens = np.concatenate([shared, prompt(9, seed=seed)])
        own = [*blocks, *driver.take_blocks(16 + block_size)]
        assert driver.generate(row, tokens, 6, blocks=own, kv_len=32) == expected[seed]


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), DRAW])
def test_many_steps_in_one_plan_equal_single_steps(driver, prompt, sampling):
    tokens = prompt(11)
    single = driver.generate(0, tokens, 16, sampling)
    driver.start(0, tokens, sampling)
    rows = np.array([0], np.int32)
    parts = [driver.run(decode_rows=rows, steps=n).tokens[0] for n in (1, 4, 2, 8)]
    assert np.concatenate(parts).tolist() == single[1:]


def test_a_stop_token_ends_the_plan_and_leaves_no_trace(driver, prompt):
    prompts = [prompt(11, seed=5), prompt(23, seed=6)]
    single = [driver.generate(0, tokens, 14, DRAW, room=16) for tokens in prompts]
    stop = single[0][4]
    assert stop not in single[0][:4]
    batch = type(driver)(driver.executor, seed=4)
    batch.start(0, prompts[0], DRAW, stops=(stop,), room=16)
    batch.start(1, prompts[1], DRAW, room=16)
    result = batch.run(decode_rows=np.array([0, 1], np.int32), steps=12)
    assert result.tokens.tolist() == [single[0][1:5], single[1][1:5]]
    # The other row, and even this one, go on as if nothing had been run past the stop.
    rest = batch.decode([0, 1], 9)
    assert rest.tolist() == [single[0][5:], single[1][5:]]


def test_an_interrupt_ends_the_plan_after_the_steps_in_flight(driver, prompt):
    tokens = prompt(11)
    single = driver.generate(0, tokens, 20)
    driver.start(0, tokens)
    rows = np.array([0], np.int32)
    driver.executor.interrupt()
    taken = driver.run(decode_rows=rows, steps=12).tokens[0].tolist()
    assert 1 <= len(taken) <= 2
    assert taken == single[1 : 1 + len(taken)]
    assert driver.decode(rows, 5)[0].tolist() == single[1 + len(taken) : 6 + len(taken)]
    assert driver.run(decode_rows=rows, steps=6).tokens.shape == (1, 6)  # only the one plan ends


def test_plans_queue_behind_a_plan_of_many_steps(driver, prompt):
    tokens = prompt(11)
    single = driver.generate(0, tokens, 12)
    driver.start(0, tokens)
    rows = np.array([0], np.int32)
    plans = [driver.plan(decode_rows=rows, steps=n) for n in (5, 1, 4)]
    for plan in plans:
        driver.executor.submit(plan)
    results = [driver.executor.collect() for _ in plans]
    assert [result.step_id for result in results] == [plan.step_id for plan in plans]
    assert [t for result in results for t in result.tokens[0].tolist()] == single[1:11]


def test_a_mask_rules_one_sample_only(driver, prompt):
    tokens = prompt(11)
    free = driver.generate(0, tokens, 5)
    mask = mask_without(driver.limits.vocab_size, [free[0]])
    masked = driver.start(0, tokens, masks={0: mask})
    assert masked.tokens[0, 0] != free[0]
    driver.start(0, tokens)
    driver.start(1, tokens)
    rows = np.array([0, 1], np.int32)
    mask = mask_without(driver.limits.vocab_size, [free[1]])
    result = driver.run(decode_rows=rows, masks={1: mask})
    assert result.tokens[0, 0] == free[1]
    assert result.tokens[1, 0] != free[1]
    assert driver.decode(rows, 1)[0, 0] == free[2]


def test_logprobs_come_for_who_asks(driver, prompt):
    driver.start(0, prompt(9), SamplingParams(temperature=0.0, logprobs=2))
    driver.start(1, prompt(14))
    both = driver.run(decode_rows=np.array([0, 1], np.int32), steps=3)
    assert both.logprobs.chosen.shape == (2, 3)
    assert both.logprobs.top_ids.shape == both.logprobs.top.shape == (2, 3, 20)
    np.testing.assert_array_equal(both.logprobs.top_ids[0, :, 0], both.tokens[0])
    np.testing.assert_array_equal(both.logprobs.top[0, :, 0], both.logprobs.chosen[0])
    assert driver.run(decode_rows=np.array([1], np.int32)).logprobs is None


def test_draws_depend_on_seed_and_position_only(driver, prompt):
    tokens = prompt(15)
    drawn = driver.generate(0, tokens, 10, DRAW)
    assert driver.generate(2, tokens, 10, DRAW, chunk=4) == drawn
    other = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=8)
    assert driver.generate(0, tokens, 10, other) != drawn
    # A restart from prompt + emitted tokens goes on with the same draws.
    assert driver.generate(0, np.concatenate([tokens, drawn[:4]]), 6, DRAW) == drawn[4:]


def test_draws_do_not_depend_on_how_the_batch_is_sampled(driver, prompt):
    plain = SamplingParams(temperature=1.0, seed=3)
    kinds = [plain, DRAW, SamplingParams(temperature=0.0), SamplingParams(seed=4, logprobs=2)]
    prompts = [prompt(n, seed=n) for n in (6, 11, 16, 21)]
    alone = [driver.generate(0, p, 8, kind) for p, kind in zip(prompts, kinds, strict=True)]
    # One row more at a time: sampled, truncated, truncated, complete.
    for rows in range(1, 5):
        batch = type(driver)(driver.executor, seed=rows)
        first = [
            int(batch.start(row, prompts[row], kinds[row]).tokens[0, 0]) for row in range(rows)
        ]
        rest = batch.decode(range(rows), 7).tolist()
        assert [[head, *tail] for head, tail in zip(first, rest, strict=True)] == alone[:rows]


def test_two_devices_give_the_tokens_of_one(driver, drive, weights, prompt, cache_dir):
    config = DeviceExecutorConfig(
        max_model_len=128,
        num_rows=2,
        num_blocks=32,
        max_prefill_tokens=32,
        prefill_buckets=(32,),
        cache_dir=cache_dir,
    )
    executor = build_device_executor(weights("tiny-smollm"), jax.devices()[2:4], config)
    assert executor.limits.slots_per_block == 3 * 2  # 3 KV heads over 2 devices: 2 each
    assert executor.limits.model_revision != driver.limits.model_revision
    two = drive(executor)
    for sampling in (SamplingParams(temperature=0.0), DRAW):
        for seed in range(3):
            tokens = prompt(40, seed)
            assert two.generate(1, tokens, 12, sampling, room=16, blocks=[3, 9, 30, 0]) == (
                driver.generate(0, tokens, 12, sampling, room=16, blocks=[3, 9, 30, 0])
            )
    assert executor.compilations_since_start() == 0
