"""The values that cross the executor seam: step plans down, step results up.

A plan is a delta on state that the executor keeps between steps: per batch row its KV length,
its block table, its sampling parameters and (on the device) the last token sampled. A steady
decode step therefore names its rows and whatever changed, nothing more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.engine.request import SamplingParams

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
UInt32 = npt.NDArray[np.uint32]

NO_ROWS: Int32 = np.zeros(0, np.int32)
NO_ROWS.setflags(write=False)


@dataclass(frozen=True, slots=True)
class RowAssignment:
    """A batch row now belongs to another request. Applied before everything else of the plan.

    kv_len: tokens whose KV is already in the arena (a prefix-cache hit), a multiple of the
        block size.
    stop_token_ids: tokens that end the request, the model's own included unless ignored; the
        executor only uses them to end a multi-step plan early.
    """

    row: int
    kv_len: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """New entries of the block tables: table[rows[i], columns[i]] = slot_bases[i].

    A slot base is the first slot of a block; layer l, head h of it is slot base + l*stride + h.
    Arrays are int32 [n].
    """

    rows: Int32
    columns: Int32
    slot_bases: Int32


NO_TABLE_UPDATE = TableUpdate(NO_ROWS, NO_ROWS, NO_ROWS)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive context tokens of one row to run through the model.

    tokens: int32 [n], at positions start .. start+n-1; start equals the row's KV length.
    samples: the chunk reaches the end of the context, so the next token is sampled.
    """

    row: int
    start: int
    tokens: Int32
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One call of the executor.

    decode_rows: int32 [n], sorted, each row at most once and none that prefills in this plan.
        A decode row's input is the token last sampled for it, which never left the device. Its
        KV length grows by one per step.
    steps: decode steps to take without a return to the host. More than 1 only without prefills
        and masks, with blocks for all of them already in the tables; the executor ends early,
        after a whole step, when a row samples one of its stop tokens or `interrupt()` is called.
    masks: row -> allowed tokens, uint32 [ceil(vocab / 32)], bit i % 32 of word i // 32 set if
        token i may be drawn. For this plan's first sample of the row only.
    """

    step_id: int
    decode_rows: Int32 = field(default_factory=lambda: NO_ROWS)
    prefills: tuple[PrefillChunk, ...] = ()
    assignments: tuple[RowAssignment, ...] = ()
    table: TableUpdate = NO_TABLE_UPDATE
    steps: int = 1
    masks: Mapping[int, UInt32] = field(default_factory=dict)

    def drawing_rows(self) -> Int32:
        """Rows of the result, int32 [n]: decode rows, then those whose prompts end, in order."""
        ended = [chunk.row for chunk in self.prefills if chunk.samples]
        return np.concatenate([self.decode_rows, np.asarray(ended, np.int32)])


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Log-probabilities that go with the tokens of a result; rows that did not ask are garbage.

    chosen: float32 [rows, steps]; top_ids int32 and top float32 [rows, steps, n], best first.
    """

    chosen: Float32
    top_ids: Int32
    top: Float32


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan produced: a run of tokens for each row that sampled.

    rows: int32 [n]: the decode rows, then the rows of prefills that sample, in plan order.
    tokens: int32 [n, steps taken], 1 <= steps taken <= plan.steps (0 wide if nothing sampled).
    error: set if the step failed; the executor is then unusable.
    """

    step_id: int
    rows: Int32
    tokens: Int32
    logprobs: LogprobArrays | None = None
    error: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # timings for metrics, never decisions
