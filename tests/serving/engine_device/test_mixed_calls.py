"""Decode rows and prompt chunks in one call give what each gives by itself."""

import dataclasses

import jax
import numpy as np
import pytest

from serving.engine.device import DeviceExecutor, DeviceExecutorConfig, build_device_executor
from serving.engine.device.mixed_call import mixed_arrays, mixed_size_of
from serving.engine.device.rows import RowState
from serving.engine.executor import MixedSize
from serving.engine.masks import mask_without
from serving.engine.plan import (
    PrefillChunk,
    RowAssignment,
    StepPlan,
    TableUpdate,
)
from serving.engine.request import SamplingParams
from tests.serving.engine_device.engine_runs import (
    CountingExecutor,
    assert_same_greedy,
    generate,
)

GREEDY = SamplingParams(temperature=0.0)
DRAW = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, seed=7)
COUNT = 24
SIZE = MixedSize(36, 4, 2)
LOOP = {"pipeline_depth": 2, "prefix_caching": False}


def built(weights, devices, cache_dir, num_blocks):
    """An executor whose steps with a few chunks are mixed calls."""
    config = DeviceExecutorConfig(
        max_model_len=128, num_rows=4, num_blocks=num_blocks, max_prefill_tokens=32,
        prefill_buckets=(8, 32), mixed_calls=((36, 4),), cache_dir=cache_dir,
    )  # fmt: skip
    return build_device_executor(weights(), devices, config)


@pytest.fixture(scope="module")
def mixing(weights, cache_dir):
    """Like the shared executor, whose programs it finds in the cache."""
    return built(weights, jax.devices()[1:2], cache_dir, 1024)


def counted(executor):
    """The executor again, and a list that grows with the programs it runs."""
    made: list[str] = []

    def noted(kind, program):
        def run(*arguments):
            made.append(kind)
            return program(*arguments)

        return run

    kinds = ("mixed_embed", "decode_embed", "prefill_embed")
    programs = dataclasses.replace(
        executor._passes.programs,
        **{
            kind: {
                key: noted(kind, program)
                for key, program in getattr(executor._passes.programs, kind).items()
            }
            for kind in kinds
        },
    )
    again = DeviceExecutor(executor._passes.model, programs, executor.limits, programs.zero_arena())
    return again, made


@pytest.fixture
def mixed(mixing):
    """(executor, programs it ran)."""
    executor, made = counted(mixing)
    yield executor, made
    assert executor.compilations_since_start() == 0


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(11)
    return [rng.integers(0, 500, n).tolist() for n in (3, 16, 40, 61, 75, 33)]


@pytest.fixture(scope="module")
def reference(executor, prompts):
    """Each request alone, on an executor without mixed calls."""
    plain = {"pipeline_depth": 1, "prefix_caching": False}
    return generate(CountingExecutor(executor), prompts, COUNT, together=False, **plain)


def check(reference, outputs):
    for expected, output in zip(reference, outputs, strict=True):
        assert_same_greedy(expected, output)


@pytest.mark.parametrize(
    ("loop", "limits"),
    [
        (LOOP, {}),
        # A planner that does not know of them: smaller steps, which fit all the same.
        ({**LOOP, "pipeline_depth": 1, "min_prefill_tokens": 5}, {"mixed_sizes": ()}),
        ({**LOOP, "decode_steps": 4}, {"max_prefill_tokens": 5}),
        (LOOP, {"num_blocks": 9}),  # preempts
        ({"pipeline_depth": 2, "spread_steps": 1}, {"max_prefill_tokens": 8, "mixed_sizes": ()}),
    ],
)
def test_greedy_output_is_the_same(mixed, prompts, reference, loop, limits):
    executor, made = mixed
    counting = CountingExecutor(executor, **limits)
    check(reference, generate(counting, prompts, COUNT, **loop))
    assert "mixed_embed" in made
    if "num_blocks" in limits:
        assert counting.assignments > len(prompts), "nobody was preempted"


def test_prefix_hits(mixed, prompts, reference):
    executor, made = mixed
    outputs = generate(CountingExecutor(executor), [*prompts, *prompts], COUNT, pipeline_depth=2)
    check([*reference, *reference], outputs)
    assert sum(output.cached_tokens > 0 for output in outputs) > 2
    assert "mixed_embed" in made


def test_two_devices(prompts, reference, weights, cache_dir):
    executor, made = counted(built(weights, jax.devices()[2:4], cache_dir, 64))
    check(reference, generate(CountingExecutor(executor), prompts, COUNT, **LOOP))
    assert "mixed_embed" in made
    assert executor.compilations_since_start() == 0


def begin(driver, prompts, row, sampling=GREEDY):
    """Give a row to a request whose chunks are still to come."""
    table = driver.table(row, driver.take_blocks(len(prompts[row]) + 8))
    driver.run(assignments=(RowAssignment(row, 0, sampling, ()),), table=table)


def test_what_is_drawn_has_the_plans_order_and_its_own_parameters(mixed, drive, prompt):
    executor, made = mixed
    driver = drive(executor)
    prompts = [prompt(length, seed) for seed, length in enumerate((10, 9, 20, 14))]
    samplings = [GREEDY, DRAW, dataclasses.replace(DRAW, seed=8, logprobs=3), GREEDY]
    alone = [
        driver.generate(0, tokens, 4, sampling)
        for tokens, sampling in zip(prompts, samplings, strict=True)
    ]
    own = driver.start(0, prompts[2], samplings[2])
    driver = drive(executor, seed=1)
    first = [driver.start(row, prompts[row], samplings[row]).tokens[0, 0] for row in (1, 3)]
    assert first == [alone[1][0], alone[3][0]]
    for row in (0, 2):
        begin(driver, prompts, row, samplings[row])
    forbidden = {
        0: mask_without(driver.limits.vocab_size, [alone[0][0]]),
        3: mask_without(driver.limits.vocab_size, [alone[3][1]]),
    }
    made.clear()
    result = driver.run(
        decode_rows=np.array([1, 3], np.int32),
        prefills=tuple(PrefillChunk(row, 0, prompts[row], True) for row in (2, 0)),
        masks=forbidden,
    )
    assert made == ["mixed_embed"]
    assert result.rows.tolist() == [1, 3, 2, 0]
    tokens = result.tokens[:, 0].tolist()
    assert (tokens[0], tokens[2]) == (alone[1][1], alone[2][0])
    assert tokens[1] != alone[3][1]
    assert tokens[3] != alone[0][0]
    np.testing.assert_allclose(result.logprobs.chosen[2], own.logprobs.chosen[0], atol=1e-4)
    np.testing.assert_array_equal(result.logprobs.top_ids[2], own.logprobs.top_ids[0])
    # The rows went on by what they drew: the next plain step takes that up.
    assert driver.decode([1, 2], 2).tolist() == [alone[1][2:4], alone[2][1:3]]


def test_a_prompt_goes_on_from_call_to_call(mixed, drive, prompt):
    executor, made = mixed
    driver = drive(executor)
    prompts = [prompt(10), prompt(40, 1)]
    alone = [driver.generate(0, tokens, 6) for tokens in prompts]
    driver = drive(executor, seed=1)
    got = [int(driver.start(0, prompts[0]).tokens[0, 0])]
    got += driver.decode([0], 1)[0].tolist()
    begin(driver, prompts, 1)
    made.clear()
    row = np.array([0], np.int32)
    for begun, end in ((0, 5), (5, 37)):
        chunk = PrefillChunk(1, begun, prompts[1][begun:end], False)
        result = driver.run(decode_rows=row, prefills=(chunk,))
        assert result.rows.tolist() == [0]
        got.append(int(result.tokens[0, 0]))
    chunk = PrefillChunk(1, 37, prompts[1][37:], True)
    result = driver.run(decode_rows=row, prefills=(chunk,))
    assert made == ["mixed_embed"] * 3
    assert result.tokens[:, 0].tolist() == [alone[0][4], alone[1][0]]
    assert [*got, int(result.tokens[0, 0])] == alone[0][:5]
    assert driver.decode([0, 1], 1)[:, 0].tolist() == [alone[0][5], alone[1][1]]


def test_the_arena_stays_where_it_is(mixing):
    limits = mixing.limits
    arena = limits.num_blocks * limits.slots_per_block * 2 * limits.block_size * 8 * 4
    (unit,) = mixing._passes.programs.mixed_unit.values()
    memory = unit.memory_analysis()
    assert memory.alias_size_in_bytes >= arena
    assert memory.temp_size_in_bytes < arena / 4


def test_every_mixed_program_has_run_before_the_first_request(mixed):
    """And has left the arena and the rows' state alone."""
    executor, made = mixed
    executor.rehearse()
    assert made.count("mixed_embed") == len(executor.limits.mixed_sizes)
    assert not any(np.asarray(segment).any() for segment in executor._passes.arena)
    assert not executor._passes.rows._kv_len.any()
    assert not np.asarray(executor._passes.last_tokens).any()


def plan_of(decoding, counts, ended):
    chunks = tuple(
        PrefillChunk(100 + index, 0, np.zeros(count, np.int32), index < ended)
        for index, count in enumerate(counts)
    )
    return StepPlan(1, np.arange(decoding, dtype=np.int32), chunks)


@pytest.mark.parametrize(
    ("decoding", "counts", "ended", "expected"),
    [
        (1, (1,), 1, 16),
        (4, (12,), 0, 16),
        (4, (12,), 1, 32),  # one more is drawn than the smaller has rows
        (3, (6, 6), 1, 16),
        (3, (4, 4, 4), 0, 32),  # sequences
        (3, (13,), 0, 32),
        (8, (24,), 0, 32),
        (8, (24,), 1, None),
        (9, (1,), 0, None),
        (1, (25,), 0, None),
        (0, (4,), 1, None),  # nothing to mix
        (4, (), 0, None),
    ],
)
def test_sizes_of_plans(decoding, counts, ended, expected):
    sizes = (MixedSize(16, 4, 2), MixedSize(32, 8, 4))
    found = mixed_size_of(plan_of(decoding, counts, ended), sizes)
    assert (found and found.tokens) == expected
    assert mixed_size_of(plan_of(decoding, counts, ended), ()) is None


def test_a_packed_call_is_one_array():
    rows = RowState(5, 3)
    update = TableUpdate(*(np.array(a, np.int32) for a in ([4, 4, 1], [0, 1, 0], [60, 70, 80])))
    begun = tuple(RowAssignment(row, 16, SamplingParams(), ()) for row in (1, 2, 4))
    rows.apply(StepPlan(1, assignments=begun, table=update))
    version = rows.lengths_version
    chunks = (
        PrefillChunk(4, 16, np.array([7, 8, 9], np.int32), False),
        PrefillChunk(2, 16, np.array([5, 6], np.int32), True),
    )
    size = MixedSize(10, 3, 4)
    call = mixed_arrays(
        rows.pack_mixed(size, StepPlan(2, np.array([1], np.int32), chunks)), size, 3
    )
    assert call.tokens.tolist() == [7, 8, 9, 5, 6, 0, 0]
    assert call.tables.tolist() == [[80, 0, 0], [0] * 3, [0] * 3, [60, 70, 0], *[[0] * 3] * 3]
    assert (call.starts.tolist(), call.counts.tolist()) == ([16, 16, 0, 0], [3, 2, 0, 0])
    assert (call.rows.tolist(), call.lengths.tolist()) == ([1, 5, 5], [17, 0, 0])
    assert call.places.tolist() == [0, 7, 0]
    assert (call.drawn_rows.tolist(), call.drawn_lengths.tolist()) == ([1, 2, 5], [17, 18, 0])
    assert rows.next_lengths(np.array([1, 4, 2, 5], np.int32)).tolist() == [18, 20, 19, 0]
    assert rows.lengths_version != version
