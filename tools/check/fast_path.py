"""The engine's programs on a device against the same model in plain XLA, position by position.

Both executors load the same weights, one after the other, so that each has the device to itself:
the fast one with the settings and programs it serves with, the reference with few. Each is forced
along the same random texts (`forced`). The reference takes all rows through every step at once. The
fast one takes all prompts, and then for each batch size some steps of so many rows: with a batch
of one, row 0 goes on from where the larger batches left it. Of each size of mixed call it takes as
many steps: the last rows go on, and the ends of the first rows' prompts are run once more.

How large errors of bfloat16 are that nobody can help is shown by the reference itself, run once
more with another batch size.
"""

import contextlib
import dataclasses
import gc
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from lumen_kernels.target import Backend, Target

from lumen.tensor_source import TensorSource
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.executor import Executor, MixedSize
from tools.bench.engine.engine import EngineSettings, devices_of, executor_config
from tools.check.comparison import Errors, errors, picked
from tools.check.forced import ForcedRun, Logprobs, Texts, joined, random_texts

ITSELF = "XLA by itself, decode of few rows against all"

_FEW = 16
"""Rows of the reference's other batch size, and sequences of its prefill calls."""

_PROMPTS = 4
"""That end in one mixed call."""


@dataclass(frozen=True, slots=True)
class Plan:
    """batches: decode batch sizes. steps: of each. shortest, longest: prompts, in tokens. chunk:
    of a prompt in one call of the fast path at most."""

    batches: tuple[int, ...]
    steps: int
    shortest: int
    longest: int
    chunk: int

    def __post_init__(self) -> None:
        """Refuse what checks nothing, or never ends. Raises ValueError."""
        if not self.batches or min(self.batches) < 1:
            raise ValueError("--batches must be whole numbers, each at least 1.")
        if self.steps < 1 or self.chunk < 1:
            raise ValueError("--steps and --chunk must be at least 1.")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError("--shortest must be at least 1 and at most --longest.")

    @property
    def more(self) -> int:
        """Tokens behind the prompts that the longest row is given."""
        return 1 + self.steps * len(self.batches)


class _ReferenceConfig(DeviceExecutorConfig):
    """Two batch sizes: nothing is waited for but what is needed."""

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Few rows and all."""
        return tuple(sorted({min(_FEW, self.num_rows), self.num_rows}))


def check(
    source: TensorSource, settings: EngineSettings, plan: Plan, cache_dir: Path | None
) -> dict[str, Errors]:
    """Errors by what was computed: prefill, each decode batch, each size of mixed call, and
    `ITSELF`, the reference's."""
    rows = max(plan.batches)
    texts = random_texts(rows, plan.shortest, plan.longest, plan.more, source.config.vocab_size)
    fast, places = _fast(source, settings, plan, texts, cache_dir)
    gc.collect()  # an executor is part of cycles: the device is free only now
    table, itself = _reference(source, settings, plan, texts, cache_dir)
    found = {"prefill": errors(fast["prefill"], table[0])}
    for name, steps in places.items():
        reference = joined([picked(table, given, rows) for given, rows in steps])
        found[name] = errors(fast[name], reference)
    few = len(itself[0].chosen)
    first = [Logprobs(one.chosen[:few], one.best_ids[:few], one.best[:few]) for one in table[2:]]
    found[ITSELF] = errors(joined(itself), joined(first[: len(itself)]))
    return found


_Places = list[tuple[list[int], list[int]]]
"""For each step how far the rows were that it took on, and which they were."""


def _fast(
    source: TensorSource,
    settings: EngineSettings,
    plan: Plan,
    texts: Texts,
    cache_dir: Path | None,
) -> tuple[dict[str, Logprobs], dict[str, _Places]]:
    """By name what was computed, and where."""
    executor = _built(
        source, devices_of(settings), executor_config(settings, cache_dir), "fast path"
    )
    run = ForcedRun(executor, texts, plan.chunk)
    found = {"prefill": run.prefill()}
    places: dict[str, _Places] = {}
    for batch in sorted(plan.batches, reverse=True):
        name = f"decode, batch {batch}"
        places[name], parts = [], []
        for _ in range(plan.steps):
            places[name].append((run.given(batch).tolist(), list(range(batch))))
            parts.append(run.decode(batch))
        found[name] = joined(parts)
    for size in executor.limits.mixed_sizes:
        name = f"mixed, {size.tokens} tokens with {size.rows} rows"
        steps = [_mixed_step(run, size, plan, texts.rows) for _ in range(plan.steps)]
        taken = [step for step in steps if step is not None]
        if taken:
            places[name] = [place for place, _ in taken]
            found[name] = joined([part for _, part in taken])
    return found, places


def _mixed_step(
    run: ForcedRun, size: MixedSize, plan: Plan, rows: int
) -> tuple[tuple[list[int], list[int]], Logprobs] | None:
    """Half of the call's rows decode, a few prompts end; None if all rows are at their ends."""
    given = run.given(rows).tolist()
    prompts = list(range(min(_PROMPTS, size.sequences, size.rows // 2, rows // 2)))
    decoding = [row for row in range(len(prompts), rows) if given[row] < plan.more]
    decoding = decoding[-(size.rows // 2) :]
    if not decoding or not prompts:
        return None
    indices = [*(given[row] for row in decoding), *[0] * len(prompts)]
    return (indices, [*decoding, *prompts]), run.mixed(decoding, prompts, size.prompt_tokens)


def _reference(
    source: TensorSource,
    settings: EngineSettings,
    plan: Plan,
    texts: Texts,
    cache_dir: Path | None,
) -> tuple[list[Logprobs], list[Logprobs]]:
    """After each token behind the prompts, of all rows; and steps 2 on of few rows, once more."""
    size = settings.block_size
    longest = plan.longest + plan.more + 1
    needed = sum(-(-(length + plan.more + 1) // size) for length in texts.prompt_lengths)
    config = _ReferenceConfig(
        max_model_len=longest,
        num_rows=texts.rows,
        block_size=size,
        num_blocks=max(needed, -(-longest // size)),
        max_prefill_tokens=settings.prefill_buckets[-1],
        max_prefills=min(_FEW, texts.rows),
        prefill_buckets=settings.prefill_buckets[-1:],
        dtype=settings.dtype,
        compile_threads=settings.compile_threads,
        cache_dir=cache_dir,
    )
    with _plain_xla():
        executor = _built(source, devices_of(settings), config, "reference")
    run = ForcedRun(executor, texts, settings.prefill_buckets[-1], seed=1)
    table = [run.prefill()]
    table += [run.decode(texts.rows) for _ in range(plan.more - 1)]
    few = min(_FEW, texts.rows)
    run.go_back(few)
    itself = [run.decode(few) for _ in range(min(plan.steps, plan.more - 2))]
    return table, itself


def _built(
    source: TensorSource, devices: Sequence[jax.Device], config: DeviceExecutorConfig, name: str
) -> Executor:
    started = time.perf_counter()
    executor = build_device_executor(source, devices, config)
    print(f"{name} ready after {time.perf_counter() - started:.1f} s", flush=True)
    return executor


@contextlib.contextmanager
def _plain_xla() -> Iterator[None]:
    """What is built meanwhile has no kernels of ours, on whatever device."""
    of = Target.of

    def without_kernels(devices: Sequence[jax.Device]) -> Target:
        return dataclasses.replace(of(devices), backend=Backend.XLA)

    with unittest.mock.patch.object(Target, "of", staticmethod(without_kernels)):
        yield
