"""One executor for most tests, and a driver that allocates blocks and builds plans."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from lumen.presets import preset
from lumen.random_weights import RandomWeights
from serving.engine.device import DeviceExecutor, DeviceExecutorConfig, build_device_executor
from serving.engine.plan import (
    PrefillChunk,
    RowAssignment,
    StepPlan,
    StepResult,
    TableUpdate,
)
from serving.engine.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MODEL = "tiny-smollm"


def source(name: str = MODEL) -> RandomWeights:
    return RandomWeights(preset(name), name)


class Driver:
    """Runs requests on an executor the way the engine does, with scattered blocks."""

    def __init__(self, executor: DeviceExecutor, seed: int = 0) -> None:
        self.executor = executor
        self.limits = executor.limits
        self._free = np.random.default_rng(seed).permutation(self.limits.num_blocks).tolist()
        self._step_id = 0

    def take_blocks(self, tokens: int) -> list[int]:
        """Blocks for so many tokens; the oldest taken come back when all are used up."""
        count = -(-tokens // self.limits.block_size)
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count
        self._free += taken
        return taken

    def plan(self, **fields) -> StepPlan:
        self._step_id += 1
        return StepPlan(self._step_id, **fields)

    def run(self, **fields) -> StepResult:
        plan = self.plan(**fields)
        self.executor.submit(plan)
        result = self.executor.collect()
        assert result.error is None
        assert result.step_id == plan.step_id
        return result

    def table(self, row: int, blocks: list[int]) -> TableUpdate:
        count = len(blocks)
        return TableUpdate(
            np.full(count, row, np.int32),
            np.arange(count, dtype=np.int32),
            np.array(blocks, np.int32) * self.limits.slots_per_block,
        )

    def start(
        self,
        row: int,
        prompt,
        sampling: SamplingParams = GREEDY,
        *,
        chunk: int | None = None,
        room: int = 20,
        blocks: list[int] | None = None,
        kv_len: int = 0,
        stops: tuple[int, ...] = (),
        masks=None,
    ) -> StepResult:
        """Prefill a prompt; the result of the chunk that samples."""
        prompt = np.asarray(prompt, np.int32)
        blocks = self.take_blocks(len(prompt) + room) if blocks is None else blocks
        chunk = chunk or self.limits.max_prefill_tokens
        fields = {
            "assignments": (RowAssignment(row, kv_len, sampling, stops),),
            "table": self.table(row, blocks),
        }
        for at in range(kv_len, len(prompt), chunk):
            end = min(at + chunk, len(prompt))
            last = end == len(prompt)
            part = PrefillChunk(row, at, prompt[at:end], last)
            result = self.run(prefills=(part,), masks=(masks or {}) if last else {}, **fields)
            fields = {}
        return result

    def start_together(
        self, prompts, samplings: dict[int, SamplingParams] | None = None, *, room=20, **fields
    ) -> StepResult:
        """Prefill the prompts of rows 0, 1, ... in one plan."""
        tables = [
            self.table(row, self.take_blocks(len(tokens) + room))
            for row, tokens in enumerate(prompts)
        ]
        parts = zip(*((one.rows, one.columns, one.slot_bases) for one in tables), strict=True)
        chunks = tuple(PrefillChunk(row, 0, tokens, True) for row, tokens in enumerate(prompts))
        return self.run(
            prefills=chunks,
            assignments=tuple(
                RowAssignment(row, 0, (samplings or {}).get(row, GREEDY), ())
                for row in range(len(prompts))
            ),
            table=TableUpdate(*(np.concatenate(part) for part in parts)),
            **fields,
        )

    def decode(self, rows, count: int) -> np.ndarray:
        """Tokens [rows, count], one plan per step."""
        rows = np.array(rows, np.int32)
        return np.concatenate([self.run(decode_rows=rows).tokens for _ in range(count)], axis=1)

    def generate(self, row: int, prompt, count: int, *arguments, **options) -> list[int]:
        """Tokens of one request that runs alone."""
        first = self.start(row, prompt, *arguments, **options).tokens[0, 0]
        return [int(first), *self.decode([row], count - 1)[0].tolist()]


@pytest.fixture(scope="session")
def weights():
    """Name of a preset to its random weights."""
    return source


@pytest.fixture(scope="session")
def prompt():
    """(length, seed) to tokens."""

    def tokens(length: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 500, length).astype(np.int32)

    return tokens


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def build_steps() -> list[tuple[int, int, str]]:
    """What the progress callback of `executor` was told."""
    return []


@pytest.fixture(scope="session")
def executor(cache_dir, build_steps) -> DeviceExecutor:
    """A replica on a device that is not the first one."""
    config = DeviceExecutorConfig(
        max_model_len=128,
        num_rows=4,
        num_blocks=1024,  # 9 MiB: a copy of it would show
        max_prefill_tokens=32,
        prefill_buckets=(8, 32),
        cache_dir=cache_dir,
    )
    return build_device_executor(
        source(), jax.devices()[1:2], config, lambda *step: build_steps.append(step)
    )


@pytest.fixture
def drive():
    """The driver class, for other executors than the shared one."""
    return Driver


@pytest.fixture
def driver(executor) -> Iterator[Driver]:
    yield Driver(executor)
    assert executor.compilations_since_start() == 0
