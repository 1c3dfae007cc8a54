"""What start-up refuses, what it promises, and what a failing device looks like."""

import dataclasses

import jax
import numpy as np
import pytest
from lumen_kernels.target import CPU

from lumen.presets import preset
from lumen.sharding import HeadLayout
from serving.engine.device import DeviceExecutor, DeviceExecutorConfig, build_device_executor
from serving.engine.device.arena import arena_layout
from serving.engine.device.compilation import CompileWatch
from serving.engine.device.config import gpu_mixed_calls
from serving.engine.device.head_programs import draw_size_of, draw_sizes
from serving.engine.device.memory import DeviceMemory
from serving.errors import ConfigurationError, ExecutorError

MIB, GIB = 1 << 20, 1 << 30


def build(weights, **changes):
    settings = {"max_model_len": 128, "num_rows": 1, "max_prefill_tokens": 16, **changes}
    return build_device_executor(
        weights("tiny-smollm"), jax.devices()[:1], DeviceExecutorConfig(**settings)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 0}, "max_model_len is 0; it must be at least 1"),
        ({"num_blocks": 8, "arena_bytes": 8}, "give one of them"),
        ({"memory_fraction": 0.0}, "more than 0"),
        ({"prefill_buckets": (8, 32)}, "end with max_prefill_tokens"),
        ({"mixed_calls": ((16, 2),)}, r"\(16, 2\); rows must be a batch size of decodes, one of"),
        ({"mixed_calls": ((1, 1),)}, "tokens more than them"),
        ({"max_model_len": 513}, "the model goes up to 512 tokens"),
        ({"num_blocks": 7}, r"holds 7 blocks \(112 tokens\), but one request .* needs 8"),
        ({"arena_bytes": 1}, "lower max_model_len to at most 0"),
        ({"num_blocks": 1 << 33}, r"at most \d+ blocks \(\d+ tokens\) fit"),
    ],
)
def test_settings_that_cannot_work_are_refused(weights, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        build(weights, **changes)


def layout(memory, tensor=1, **changes):
    model = preset("tiny-llama")  # 4 layers, 2 KV heads of 16: 16 KiB a block in float32
    settings = {"max_model_len": 128, "num_rows": 2, **changes}
    heads = HeadLayout(model.num_heads, model.num_kv_heads, tensor)
    return arena_layout(model, heads, "float32", DeviceExecutorConfig(**settings), memory, CPU)


def test_the_number_in_the_refusal_is_what_fits():
    memory = DeviceMemory("the host", 8 * MIB, 2 * MIB, shared_with_host=True)
    with pytest.raises(ConfigurationError, match=r"129 blocks takes .* at most 128 blocks"):
        layout(memory, num_blocks=129)
    assert layout(memory, num_blocks=128).num_blocks == 128
    with pytest.raises(ConfigurationError, match="129 blocks"):
        layout(memory, arena_bytes=2 * MIB + 16384)


def test_the_arena_is_sized_for_the_device():
    host = DeviceMemory("the host", 64 * GIB, 32 * GIB, shared_with_host=True)
    assert layout(host).num_blocks == 2 * 8  # every row at full length
    assert layout(host, num_rows=1 << 20).num_blocks == GIB // 16384  # within a GiB
    assert layout(host, tensor=2, arena_bytes=MIB).num_blocks == 128  # half the heads each
    chip = DeviceMemory("chip", 10 * MIB, 6 * MIB, shared_with_host=False)
    assert layout(chip, memory_fraction=0.9).num_blocks == 5 * 64
    with pytest.raises(ConfigurationError, match="holds 0 blocks"):
        layout(chip, memory_fraction=0.3)
    assert layout(None, num_blocks=9).num_blocks == 9
    with pytest.raises(ConfigurationError, match="do not say how much memory"):
        layout(None)


def test_an_arena_beyond_32_bit_rows_is_refused():
    memory = DeviceMemory("chip", 1 << 50, 1 << 50, shared_with_host=False)
    blocks = ((1 << 31) - (1 << 24)) // (8 * 2 * 16)
    assert layout(memory, num_blocks=blocks).num_blocks == blocks
    with pytest.raises(ConfigurationError, match="32-bit"):
        layout(memory, num_blocks=blocks + 1)


def test_buckets_cover_every_size():
    config = DeviceExecutorConfig(max_model_len=8, num_rows=12, max_prefill_tokens=100)
    assert config.decode_buckets == (1, 2, 4, 8, 12)
    assert config.chunk_buckets == {16: 1, 32: 2, 64: 4, 100: 8}
    few = dataclasses.replace(config, max_prefill_tokens=512, max_prefills=3)
    assert few.chunk_buckets == {16: 1, 32: 2, 64: 4, 128: 4, 256: 4, 512: 4}


def test_mixed_calls_take_as_many_sequences_as_their_prompt_tokens_allow():
    config = DeviceExecutorConfig(
        max_model_len=8, num_rows=128, mixed_calls=gpu_mixed_calls(128, 512)
    )
    assert config.mixed_sizes == ((256, 64, 16), (512, 64, 16), (512, 128, 16))
    assert dataclasses.replace(config, max_prefills=32).mixed_sizes[1:] == (
        (512, 64, 32), (512, 128, 32),
    )  # fmt: skip
    assert config.mixed_sizes[0].prompt_tokens == 192


def test_gpu_mixed_calls_are_no_larger_than_rows_and_prefill_calls():
    assert gpu_mixed_calls(16, 4096) == ((256, 16), (512, 16), (1024, 16))
    assert gpu_mixed_calls(100, 256) == ((256, 64),)
    assert gpu_mixed_calls(100, 128) == ()


def test_batch_sizes_grow_in_smaller_steps_the_larger_they_are():
    config = DeviceExecutorConfig(max_model_len=8, num_rows=512)
    assert config.decode_buckets == (
        1, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512,
    )  # fmt: skip
    assert dataclasses.replace(config, num_rows=48).decode_buckets == (1, 2, 4, 8, 16, 32, 48)
    assert dataclasses.replace(config, num_rows=64).decode_buckets == (1, 8, 16, 32, 48, 64)
    assert dataclasses.replace(config, num_rows=100).decode_buckets[-3:] == (64, 96, 100)
    assert dataclasses.replace(config, num_rows=1).decode_buckets == (1,)


def test_draws_have_few_sizes():
    config = DeviceExecutorConfig(max_model_len=8, num_rows=512)
    sizes = draw_sizes(config.decode_buckets)
    assert sizes == (8, 32, 64, 128, 256, 512)
    assert [draw_size_of(sizes, rows) for rows in (1, 8, 9, 96, 512)] == [8, 8, 32, 128, 512]
    assert draw_sizes((1, 3, 48, 96, 100, 300)) == (3, 48, 100, 300)
    assert draw_sizes((1, 2, 4)) == (4,)
    assert draw_sizes((1,)) == (1,)


def test_batch_sizes_may_be_named():
    config = DeviceExecutorConfig(max_model_len=8, num_rows=128, batch_sizes=(1, 32, 128))
    assert config.decode_buckets == (1, 32, 128)
    assert config.chunk_buckets[512] == 32
    for sizes in ((), (0, 128), (32, 1, 128), (1, 32)):
        with pytest.raises(ConfigurationError, match=r"batch_sizes is .* end with num_rows"):
            dataclasses.replace(config, batch_sizes=sizes)


def test_progress_counts_weights_and_programs(executor, build_steps):
    total = build_steps[0][1]
    assert [step[:2] for step in build_steps] == [(n, total) for n in range(1, total + 1)]
    names = [name for _, _, name in build_steps]
    assert names[:5] == ["weights"] * 5  # 3 units, embedding, head
    assert {"decode_unit 4", "prefill_unit 8 of 1", "head 1", "logits 2"} <= set(names)
    assert {name for name in names if name.startswith("draw")} == {
        f"draw 4 {kind}" for kind in ("sampled", "truncated", "complete")
    }


def test_programs_update_the_arena_in_place(executor):
    limits = executor.limits
    arena = limits.num_blocks * limits.slots_per_block * 2 * limits.block_size * 8 * 4
    programs = executor._passes.programs
    for unit in (*programs.decode_unit.values(), *programs.prefill_unit.values()):
        memory = unit.memory_analysis()
        assert memory.alias_size_in_bytes >= arena
        assert memory.temp_size_in_bytes < arena / 4


def test_the_watch_sees_a_compilation():
    watch = CompileWatch()
    jax.jit(lambda x: x * 3 + 1)(np.arange(7)).block_until_ready()
    assert watch.count == 0
    with watch:
        jax.jit(lambda x: x * 5 + 2)(np.arange(7)).block_until_ready()
    assert watch.count >= 1


def test_a_failing_device_is_reported_once_and_for_all(executor, drive, prompt):
    programs = executor._passes.programs

    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    heads = dict.fromkeys(programs.head, broken)
    failing = DeviceExecutor(
        executor._passes.model,
        dataclasses.replace(programs, head=heads),
        executor.limits,
        programs.zero_arena(),
    )
    driver = drive(failing)
    part = driver.plan(decode_rows=np.array([0], np.int32))
    failing.submit(part)
    failing.submit(driver.plan())
    for step_id in (1, 2):
        result = failing.collect()
        assert result.step_id == step_id
        assert result.error == "JaxRuntimeError: INTERNAL: the device is gone"
        assert result.rows.size == 0


def test_collecting_nothing_is_an_error(executor):
    with pytest.raises(ExecutorError, match="submit one first"):
        executor.collect()


def test_every_program_has_run_once_before_the_first_request(executor):
    """And has left the arena and the rows' state alone."""
    ran = []

    def noted(name, program):
        def run(*arguments):
            ran.append(name)
            return program(*arguments)

        return run

    tables = {
        field.name: getattr(executor._passes.programs, field.name)
        for field in dataclasses.fields(executor._passes.programs)
    }
    noting = {
        kind: {key: noted((kind, key), program) for key, program in table.items()}
        for kind, table in tables.items()
        if isinstance(table, dict)
    }
    programs = dataclasses.replace(executor._passes.programs, **noting)
    arena = executor._passes.programs.zero_arena()
    fresh = DeviceExecutor(executor._passes.model, programs, executor.limits, arena)
    fresh.rehearse()
    expected = {(kind, key) for kind, table in tables.items() if kind in noting for key in table}
    assert set(ran) == expected
    assert not any(np.asarray(segment).any() for segment in fresh._passes.arena)
    assert not fresh._passes.rows._kv_len.any()
    assert not np.asarray(fresh._passes.last_tokens).any()
