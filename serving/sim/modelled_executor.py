"""An executor without a device: an arena that remembers what was written where, and a cost model.

Tokens come from what is *read back through the block tables*, so a block that is reused too
early, a wrong table entry or a wrong prefix hit gives other tokens than the reference, and what
no plan may do is recorded as a violation. Nothing sleeps and there is no clock.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from serving.engine.executor import ExecutorLimits
from serving.engine.plan import NO_ROWS, Int32, LogprobArrays, StepPlan, StepResult, UInt32
from serving.engine.request import SamplingParams
from serving.errors import ExecutorError
from serving.sim.footprint import Footprints, RowTables
from serving.sim.token_function import TokenFunction


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step: fixed, per token computed, per token of context read."""

    fixed_s: float = 0.002
    per_token_s: float = 0.00002
    per_context_token_s: float = 0.00000002


class ModelledExecutor:
    """Implements Executor. Plans take effect when they are collected, in order.

    violations: sentences about plans that a real device would have run into garbage with; tests
    assert that it stays empty.
    """

    def __init__(
        self,
        limits: ExecutorLimits,
        cost: StepCost | None = None,
        *,
        eos_token_ids: tuple[int, ...] = (),
        eos_every: int = 0,
    ) -> None:
        self._limits = limits
        self._cost = cost or StepCost()
        self.function = TokenFunction(
            limits.model_revision, limits.vocab_size, eos_token_ids, eos_every
        )
        self.violations: list[str] = []
        self._submitted: deque[StepPlan] = deque()
        self._durations: dict[int, tuple[int, int, int]] = {}
        self._footprints = Footprints(limits, self.violations)
        self._tables = RowTables(limits, self.violations)
        self._arena_tokens: Int32 = np.full(limits.num_blocks * limits.block_size, -1, np.int32)
        self._arena_positions: Int32 = np.full_like(self._arena_tokens, -1)
        # Where a row's tokens lie: column of its table and offset in the block, by position.
        self._positions: Int32 = np.arange(
            limits.max_blocks_per_row * limits.block_size, dtype=np.int32
        )
        self._columns = self._positions // limits.block_size
        self._offsets = self._positions % limits.block_size
        self._last_token: Int32 = np.full(limits.num_rows, -1, np.int32)
        self._sampling = [SamplingParams()] * limits.num_rows
        self._stops: list[frozenset[int]] = [frozenset()] * limits.num_rows
        self._end_after: int | None = None
        self._failure: str | None = None

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        return self._limits

    def submit(self, plan: StepPlan) -> None:
        """Take a plan; its effects come with `collect`."""
        context = self._footprints.submit(plan)
        computed = sum(chunk.tokens.size for chunk in plan.prefills)
        self._durations[plan.step_id] = (plan.decode_rows.size, computed, context)
        self._submitted.append(plan)

    def predicted_duration(self, plan: StepPlan, steps: int | None = None) -> float:
        """Seconds that a submitted, not yet collected plan takes on the device.

        steps: decode steps it takes before it ends early; None for all planned. Raises
        ExecutorError if the plan is not in flight.
        """
        if plan.step_id not in self._durations:
            raise ExecutorError(f"Step {plan.step_id} is not in flight; submit it first.")
        rows, computed, context = self._durations[plan.step_id]
        count = plan.steps if steps is None else steps
        tokens = count * rows + computed
        read = count * context + rows * count * (count - 1) // 2
        return (
            count * self._cost.fixed_s
            + tokens * self._cost.per_token_s
            + read * self._cost.per_context_token_s
        )

    def collect(self) -> StepResult:
        """Run the oldest plan and return what it sampled. Raises ExecutorError if there is none."""
        if not self._submitted:
            raise ExecutorError("There is no plan to collect; submit one first.")
        plan = self._submitted.popleft()
        del self._durations[plan.step_id]
        steps = plan.steps if self._end_after is None else min(plan.steps, self._end_after)
        self._end_after = None
        if self._failure is not None:
            nothing = np.zeros((0, 0), np.int32)
            return StepResult(plan.step_id, NO_ROWS, nothing, error=self._failure)
        result = self._run(plan, steps)
        self._footprints.collected(plan, result.tokens.shape[1])
        return result

    def interrupt(self, steps_taken: int = 0) -> None:
        """End the oldest plan after the step in flight.

        steps_taken: how many it has completed by now, which only whoever keeps the time knows.
        """
        if self._submitted:
            self._end_after = steps_taken + 1

    def fail(self, reason: str) -> None:
        """From now on every result is this error, as after a device fault."""
        self._failure = reason

    def _run(self, plan: StepPlan, steps: int) -> StepResult:
        for assignment in plan.assignments:
            self._sampling[assignment.row] = assignment.sampling
            self._stops[assignment.row] = frozenset(assignment.stop_token_ids)
            self._last_token[assignment.row] = -1
        self._tables.apply(plan)
        for chunk in plan.prefills:
            if chunk.start != self._tables.kv_len[chunk.row]:
                self.violations.append(
                    f"step {plan.step_id}: row {chunk.row} prefills from {chunk.start} but its KV "
                    f"ends at {self._tables.kv_len[chunk.row]}"
                )
            self._write(chunk.row, chunk.tokens)
        decode_rows = plan.decode_rows.tolist()
        sampling_rows = decode_rows + [chunk.row for chunk in plan.prefills if chunk.samples]
        columns: list[list[int]] = []
        contexts: list[list[Int32]] = []
        while len(columns) < steps and sampling_rows:
            for row in decode_rows:
                self._write(row, self._last_token[row : row + 1])
            contexts.append([self._read(row) for row in sampling_rows])
            column = [
                self._sample(row, context, plan.masks.get(row) if not columns else None)
                for row, context in zip(sampling_rows, contexts[-1], strict=True)
            ]
            columns.append(column)
            if any(
                token in self._stops[row] for row, token in zip(sampling_rows, column, strict=True)
            ):
                break
        rows = np.asarray(sampling_rows, np.int32)
        tokens = np.asarray(columns, np.int32).reshape(len(columns), len(sampling_rows)).T
        return StepResult(plan.step_id, rows, tokens, self._logprobs(sampling_rows, contexts))

    def _sample(self, row: int, context: Int32, mask: UInt32 | None) -> int:
        token = self.function.next_token(context, self._sampling[row], mask)
        self._last_token[row] = token
        return token

    def _write(self, row: int, tokens: Int32) -> None:
        """Append tokens to the row's KV, wherever its table says."""
        if tokens.size and tokens[0] < 0:
            self.violations.append(f"row {row} decodes but never sampled a token")
        start = int(self._tables.kv_len[row])
        end = start + tokens.size
        places = self._places(row, start, end)
        self._arena_tokens[places] = tokens
        self._arena_positions[places] = self._positions[start:end]
        self._tables.kv_len[row] += tokens.size

    def _read(self, row: int) -> Int32:
        """The row's context as the arena has it, int32 [kv_len]."""
        end = int(self._tables.kv_len[row])
        places = self._places(row, 0, end)
        wrong = self._arena_positions[places] != self._positions[:end]
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            self.violations.append(
                f"row {row} reads position {first} from block "
                f"{places[first] // self._limits.block_size}, which holds "
                f"position {self._arena_positions[places[first]]}"
            )
        context: Int32 = self._arena_tokens[places]
        return context

    def _places(self, row: int, start: int, end: int) -> Int32:
        """Where the arena has these tokens of a row, int32 [end - start]."""
        assert end <= self._positions.size, f"row {row} is longer than its table"
        blocks: Int32 = self._tables.table[row, self._columns[start:end]]
        if (blocks < 0).any():
            self.violations.append(f"row {row} uses a position without a block in its table")
        places: Int32 = blocks * self._limits.block_size + self._offsets[start:end]
        return places

    def _logprobs(self, rows: list[int], contexts: list[list[Int32]]) -> LogprobArrays | None:
        if all(self._sampling[row].logprobs is None for row in rows):
            return None
        width = self._limits.max_logprobs
        shape = (len(rows), len(contexts))
        chosen = np.zeros(shape, np.float32)
        top_ids = np.zeros((*shape, width), np.int32)
        top = np.zeros((*shape, width), np.float32)
        for step, step_contexts in enumerate(contexts):
            for index, (row, context) in enumerate(zip(rows, step_contexts, strict=True)):
                if self._sampling[row].logprobs is None:
                    continue
                made_up = self.function.logprobs(context, self._sampling[row], width)
                chosen[index, step] = made_up.logprob
                top_ids[index, step] = [token for token, _ in made_up.top]
                top[index, step] = [value for _, value in made_up.top]
        return LogprobArrays(chosen, top_ids, top)
