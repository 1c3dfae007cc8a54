"""The grid of steps that a cost model is fitted to, and their times on a device.

Contexts are made of blocks that nobody filled: a row is told that its KV is there, so that long
ones cost nothing to prepare. No block belongs to two rows: what several read would come from a
cache of the device, and serving seldom does that.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.executor import Executor, ExecutorLimits, MixedSize
from serving.engine.plan import (
    NO_ROWS,
    NO_TABLE_UPDATE,
    PrefillChunk,
    RowAssignment,
    StepPlan,
    TableUpdate,
)
from serving.engine.request import SamplingParams
from serving.errors import ExecutorError
from serving.sim.cost_fit import Measured
from serving.sim.cost_model import StepWork
from serving.sim.plan_work import PlanWork

_DEPTH = 2  # plans submitted at a time, as in serving
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class GridPoint:
    """A step to measure: so many rows that decode behind so many tokens each, and prompt chunks.

    chunks: (tokens before it, its own), of rows of their own. held_out: not for the fit.
    """

    rows: int = 0
    context: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    held_out: bool = False

    def name(self) -> str:
        """For people."""
        parts = []
        if self.rows:
            parts.append(f"{self.rows} rows behind {self.context}")
        if self.chunks:
            start, tokens = self.chunks[0]
            times = f"{len(self.chunks)} x " if len(self.chunks) > 1 else ""
            parts.append(f"{times}{tokens} tokens behind {start}")
        return ", ".join(parts) + (" (held out)" if self.held_out else "")


@dataclass(frozen=True, slots=True)
class GridTimes:
    """A point, its work as the cost model sees it, and seconds of every repetition."""

    point: GridPoint
    measured: Measured


def grid(config: DeviceExecutorConfig, limits: ExecutorLimits) -> list[GridPoint]:
    """Every size of batch and call at two to four contexts, and others between them, held out."""
    points = [*_decodes(config), *_prefills(config), *_mixed(config), *_both(config)]
    fitting = [point for point in dict.fromkeys(points) if _fits(point, limits, steps=64)]
    assert fitting, "the smallest batch has room in every arena"
    return fitting


def _decodes(config: DeviceExecutorConfig) -> Iterator[GridPoint]:
    sizes = config.decode_buckets
    longest = config.max_model_len - 128
    for rows in sizes:
        for context in (64, 1088, 4096, longest):
            yield GridPoint(rows, context)
        # Half of the longest is what 512 rows have room for, when 4,096 is too much.
        yield GridPoint(rows, 1600)
        yield GridPoint(rows, 600, held_out=True)
        yield GridPoint(rows, 2500, held_out=True)
    for smaller, larger in pairwise(sizes):
        if larger - smaller > 8:
            yield GridPoint((smaller + larger) // 2, 1400, held_out=True)


def _prefills(config: DeviceExecutorConfig) -> Iterator[GridPoint]:
    for tokens, sequences in config.chunk_buckets.items():
        for start in (0, 4096, 12288):
            yield GridPoint(chunks=((start, tokens),))
        yield GridPoint(chunks=((1024, tokens),), held_out=True)
        if sequences > 1 and tokens // sequences:
            yield GridPoint(chunks=((0, tokens // sequences),) * sequences)
            few = max(sequences // 4, 2)
            yield GridPoint(chunks=((256, tokens // few),) * few, held_out=True)
    most = config.max_prefill_tokens
    yield GridPoint(chunks=((0, most * 5 // 8),), held_out=True)


def _mixed(config: DeviceExecutorConfig) -> Iterator[GridPoint]:
    for size in config.mixed_sizes:
        rows = size.rows - 1  # the prompt that ends draws a token, too
        for context, start in ((64, 0), (2048, 0), (64, 4096)):
            yield GridPoint(rows, context, ((start, size.prompt_tokens),))
        yield GridPoint(
            max(rows // 2, 1), 1088, ((512, size.prompt_tokens * 3 // 4),), held_out=True
        )
        yield GridPoint(rows, 1088, _halves(size), held_out=True)


def _halves(size: MixedSize) -> tuple[tuple[int, int], ...]:
    several = 2 if size.sequences > 1 else 1
    # The second prompt goes on, so that one token is drawn as before.
    return ((0, size.prompt_tokens // several),) * several


def _both(config: DeviceExecutorConfig) -> Iterator[GridPoint]:
    """Steps of a pass for the decodes and one for the prompts: the sum of the two, it is hoped."""
    for rows in (config.num_rows // 8, config.num_rows // 2):
        if rows:
            chunks = ((0, config.max_prefill_tokens),)
            yield GridPoint(rows, 1088, chunks, held_out=True)


def _fits(point: GridPoint, limits: ExecutorLimits, steps: int) -> bool:
    size = limits.block_size
    longest = max([point.context + steps, *(sum(chunk) + 1 for chunk in point.chunks)])
    blocks = point.rows * -(-(point.context + steps) // size)
    blocks += sum(-(-(sum(chunk) + 1) // size) for chunk in point.chunks)
    return (
        longest <= limits.max_model_len
        and blocks <= limits.num_blocks
        and point.rows + len(point.chunks) <= limits.num_rows
        and len(point.chunks) <= limits.max_prefills
        and all(tokens and start % size == 0 for start, tokens in point.chunks)
        and sum(tokens for _, tokens in point.chunks) <= limits.max_prefill_tokens
    )


@dataclass
class GridClock:
    """Measures points on an executor: the time from one step's end to the next one's.

    seconds: what a point may take; at least `fewest`, at most `most` repetitions.
    """

    executor: Executor
    config: DeviceExecutorConfig
    seconds: float = 0.15
    fewest: int = 4
    most: int = 20
    warm_up: int = 3
    _step: int = 0
    _work: PlanWork = field(init=False)

    def __post_init__(self) -> None:
        self._work = PlanWork(self.config)

    def measure(self, point: GridPoint) -> GridTimes:
        """Repeat a step. Raises ExecutorError if the executor fails."""
        first, again = self._plans(point)
        work = self._work(first, self._context(point))
        pending: deque[StepPlan] = deque()
        samples: list[float] = []
        submitted = 0
        spent = before = 0.0
        while (
            not samples
            or len(samples) < self.fewest
            or (spent < self.seconds and len(samples) < self.most)
        ):
            while len(pending) < _DEPTH:
                plan = first if not submitted else again
                self._step += 1
                table = plan.table if not submitted else NO_TABLE_UPDATE
                plan = replace(plan, step_id=self._step, table=table)
                self.executor.submit(plan)
                pending.append(plan)
                submitted += 1
            self._collect(pending)
            now = time.perf_counter()
            if submitted - len(pending) > self.warm_up:
                samples.append(now - before)
                spent += now - before
            before = now
        while pending:
            self._collect(pending)
        # Rows grow by a token per step, so contexts are those of the middle.
        middle = self.warm_up + len(samples) // 2
        work = _later(work, middle) if not point.chunks else work
        return GridTimes(point, Measured(work, tuple(samples), point.held_out))

    def _collect(self, pending: deque[StepPlan]) -> None:
        pending.popleft()
        result = self.executor.collect()
        if result.error is not None:
            raise ExecutorError(result.error)

    def _context(self, point: GridPoint) -> int:
        return point.rows * self._begin(point.context)

    def _begin(self, context: int) -> int:
        """A row's KV begins at a whole block."""
        return context // self.executor.limits.block_size * self.executor.limits.block_size

    def _plans(self, point: GridPoint) -> tuple[StepPlan, StepPlan]:
        """The first step, which gives rows their blocks, and the one that is repeated.

        A step with chunks is the same each time: all its rows are assigned anew.
        """
        limits = self.executor.limits
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        assignments: list[RowAssignment] = []
        prefills: list[PrefillChunk] = []

        def place(row: int, kv_len: int, tokens: int) -> None:
            count = -(-tokens // limits.block_size)
            rows.extend([row] * count)
            columns.extend(range(count))
            blocks.extend(range(len(blocks), len(blocks) + count))
            assignments.append(RowAssignment(row, kv_len, _GREEDY, ()))

        for row in range(point.rows):
            begin = self._begin(point.context)
            place(row, begin, begin + self.most + self.warm_up + _DEPTH + 1)
        random = np.random.default_rng(0)
        for index, (start, tokens) in enumerate(point.chunks):
            row = point.rows + index
            place(row, start, start + tokens + 1)
            drawn = random.integers(0, limits.vocab_size, tokens).astype(np.int32)
            # Every prompt ends in a call of prompts; beside decodes one does, for its room is kept.
            samples = not point.rows or index == 0
            prefills.append(PrefillChunk(row, start, drawn, samples))
        bases = np.array(blocks, np.int32) * np.int32(limits.slots_per_block)
        table = TableUpdate(np.array(rows, np.int32), np.array(columns, np.int32), bases)
        decoding = np.arange(point.rows, dtype=np.int32) if point.rows else NO_ROWS
        plan = StepPlan(0, decoding, tuple(prefills), tuple(assignments), table)
        again = plan if prefills else StepPlan(0, decoding)
        return plan, again


def _later(work: StepWork, steps: int) -> StepWork:
    return replace(work, context=work.context + steps * work.decoding)


def grid_table(times: Sequence[GridTimes], foretold: Sequence[float]) -> str:
    """Points, medians, and what the model says, one a line."""
    lines = [f"{'step':58} {'median ms':>10} {'model ms':>10} {'error':>7}"]
    for one, seconds in zip(times, foretold, strict=True):
        median = one.measured.seconds
        error = seconds / median - 1
        lines.append(
            f"{one.point.name():58} {1e3 * median:10.3f} {1e3 * seconds:10.3f} {error:+7.1%}"
        )
    return "\n".join(lines)
