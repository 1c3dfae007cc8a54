"""Prompts prefilled in one call give what each gives alone."""

import dataclasses

import jax
import numpy as np
import pytest

from serving.engine.device import DeviceExecutor, DeviceExecutorConfig, build_device_executor
from serving.engine.masks import mask_without
from serving.engine.plan import PrefillChunk, RowAssignment, StepPlan
from serving.engine.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
DRAW = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def wide(weights, cache_dir):
    """An executor whose prefill calls take four sequences, else like the shared one."""
    config = DeviceExecutorConfig(
        max_model_len=128, num_rows=4, num_blocks=1024, max_prefill_tokens=64,
        prefill_buckets=(64,), cache_dir=cache_dir,
    )  # fmt: skip
    return build_device_executor(weights(), jax.devices()[1:2], config)


@pytest.fixture
def calls(wide):
    """The executor of `wide` again, and a list that grows with each prefill call it makes."""
    made: list[int] = []
    programs = wide._passes.programs
    ((size, program),) = programs.prefill_embed.items()

    def counted(*arguments):
        made.append(size)
        return program(*arguments)

    programs = dataclasses.replace(programs, prefill_embed={size: counted})
    return DeviceExecutor(wide._passes.model, programs, wide.limits, programs.zero_arena()), made


def alone(driver, prompts, count, samplings=None):
    return [
        driver.generate(0, tokens, count, (samplings or {}).get(row, GREEDY), room=count)
        for row, tokens in enumerate(prompts)
    ]


def together(driver, prompts, count, samplings=None):
    first = driver.start_together(prompts, samplings, room=count)
    assert first.rows.tolist() == list(range(len(prompts)))
    rest = driver.decode(range(len(prompts)), count - 1)
    return np.concatenate([first.tokens, rest], axis=1).tolist()


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ((3, 17, 40, 4), 1),  # exactly full, exactly as many as it takes
        ((5, 20), 1),
        ((40, 30, 1, 16), 2),  # the second prompt is cut
        ((90, 80, 100), 5),
    ],
)
def test_prompts_in_one_plan(calls, drive, prompt, lengths, count):
    executor, made = calls
    driver = drive(executor)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    expected = alone(driver, prompts, 8)
    made.clear()
    assert together(drive(executor, seed=1), prompts, 8) == expected
    assert len(made) == count
    assert executor.compilations_since_start() == 0


def test_more_sequences_than_a_call_takes(driver, prompt):
    """Calls of the shared executor take one or two."""
    prompts = [prompt(length, seed) for seed, length in enumerate((3, 17, 9, 31))]
    expected = alone(driver, prompts, 10)
    assert together(type(driver)(driver.executor, seed=1), prompts, 10) == expected


def test_each_prompt_is_sampled_its_own_way(wide, drive, prompt):
    driver = drive(wide)
    prompts = [prompt(length, seed) for seed, length in enumerate((20, 8, 33, 12))]
    samplings = {1: DRAW, 3: dataclasses.replace(DRAW, seed=8, logprobs=3)}
    expected = alone(driver, prompts, 6, samplings)
    driver = drive(wide, seed=1)
    assert together(driver, prompts, 6, samplings) == expected

    mask = mask_without(driver.limits.vocab_size, [expected[0][0]])
    result = driver.start_together(prompts, samplings, masks={0: mask})
    assert result.tokens[0, 0] != expected[0][0]
    assert result.tokens[1:, 0].tolist() == [tokens[0] for tokens in expected[1:]]
    own = driver.start(0, prompts[3], samplings[3])
    np.testing.assert_allclose(result.logprobs.chosen[3], own.logprobs.chosen[0], atol=1e-4)
    np.testing.assert_array_equal(result.logprobs.top_ids[3], own.logprobs.top_ids[0])
    np.testing.assert_allclose(result.logprobs.top[3], own.logprobs.top[0], atol=1e-4)
    assert wide.compilations_since_start() == 0


def test_chunks_cross_steps_beside_decodes(wide, drive, prompt):
    """Row 0 decodes all along; 1 and 3 end their prompts in the step that begins the one of 2."""
    driver = drive(wide)
    prompts = [prompt(length, seed) for seed, length in enumerate((10, 70, 50, 40))]
    expected = alone(driver, prompts, 6)
    driver = drive(wide, seed=1)
    got = [[int(driver.start(0, prompts[0]).tokens[0, 0])], [], [], []]

    def step(decode_rows, *chunks) -> None:
        for row in (row for row, begin, _ in chunks if begin == 0):
            table = driver.table(row, driver.take_blocks(len(prompts[row]) + 8))
            driver.run(assignments=(RowAssignment(row, 0, GREEDY, ()),), table=table)
        parts = tuple(
            PrefillChunk(row, begin, prompts[row][begin:end], end == len(prompts[row]))
            for row, begin, end in chunks
        )
        result = driver.run(decode_rows=np.array(decode_rows, np.int32), prefills=parts)
        ended = [chunk.row for chunk in parts if chunk.samples]
        assert result.rows.tolist() == [*decode_rows, *ended]
        for row, token in zip(result.rows.tolist(), result.tokens[:, 0].tolist(), strict=True):
            got[row].append(token)

    step([0], (1, 0, 44), (3, 0, 16))  # nothing ends
    step([0], (2, 0, 20), (1, 44, 70), (3, 16, 40))
    step([0, 1, 3], (2, 20, 50))
    step([0, 1, 2, 3])
    step([0, 1, 2, 3])
    assert got == [expected[0], expected[1][:4], expected[2][:3], expected[3][:4]]
    assert wide.compilations_since_start() == 0


def test_padding_writes_nothing(wide, drive, prompt):
    """Block 0, which empty tables point at, keeps what its owner wrote."""
    driver = drive(wide)
    tokens = prompt(14)
    expected = driver.generate(0, tokens, 12)
    begun = driver.start(3, tokens, blocks=[0, 3])
    first = int(begun.tokens[0, 0])
    for seed in range(3):  # calls with empty sequences and spare tokens
        driver.start(1, prompt(40, seed), blocks=[20, 21, 22, 23])
    assert [first, *driver.decode([3], 11)[0].tolist()] == expected


def test_a_failing_call_fails_the_plan(wide, prompt):
    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    lasts = dict.fromkeys(wide._passes.programs.prefill_last, broken)
    programs = dataclasses.replace(wide._passes.programs, prefill_last=lasts)
    failing = DeviceExecutor(wide._passes.model, programs, wide.limits, programs.zero_arena())
    chunks = tuple(PrefillChunk(row, 0, prompt(9, row), True) for row in range(3))
    failing.submit(StepPlan(1, prefills=chunks))
    result = failing.collect()
    assert result.error == "JaxRuntimeError: INTERNAL: the device is gone"
    assert result.rows.size == 0
