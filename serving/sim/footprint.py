"""What plans do to blocks, and which of it would be a race on a device.

An in-order executor hides a block that is handed on too early: the next plan overwrites it
later. Transfers do not wait their turn, so the rule is stricter: nobody writes a block that a
plan in flight touches for another request, and nobody reads one that it writes.
"""

from collections import deque

import numpy as np

from serving.engine.executor import ExecutorLimits
from serving.engine.plan import Int32, StepPlan


class RowTables:
    """Block tables and KV lengths of all rows, kept up to date from plans.

    table: int32 [rows, max blocks per row], block ids, -1 where nothing was entered since the row
    was assigned. kv_len: int64 [rows]. owner: int64 [rows], a number that changes with each
    assignment.
    """

    def __init__(self, limits: ExecutorLimits, violations: list[str]) -> None:
        self._limits = limits
        self._violations = violations
        self._owners = 0
        self.table: Int32 = np.full((limits.num_rows, limits.max_blocks_per_row), -1, np.int32)
        self.kv_len = np.zeros(limits.num_rows, np.int64)
        self.owner = np.zeros(limits.num_rows, np.int64)

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's assignments and table entries."""
        for assignment in plan.assignments:
            self._owners += 1
            self.table[assignment.row] = -1
            self.kv_len[assignment.row] = assignment.kv_len
            self.owner[assignment.row] = self._owners
            if assignment.kv_len % self._limits.block_size:
                self._violations.append(f"row {assignment.row} starts inside a block")
        update = plan.table
        if not update.rows.size:
            return
        if (update.slot_bases % self._limits.slots_per_block).any():
            self._violations.append(f"step {plan.step_id} enters a slot that begins no block")
        self.table[update.rows, update.columns] = update.slot_bases // self._limits.slots_per_block

    def blocks(self, row: int, kv_end: int) -> Int32:
        """The blocks of a row's first `kv_end` tokens."""
        return self.table[row, : -(-kv_end // self._limits.block_size)]


class _Footprint:
    """The blocks that one plan touches: `touches` counts rows by block, `writer` is the owner that
    writes a block, `blocks_of` has the blocks by owner.
    """

    def __init__(self) -> None:
        self.touches: dict[int, int] = {}
        self.writer: dict[int, int] = {}
        self.blocks_of: dict[int, frozenset[int]] = {}


class Footprints:
    """Checks each plan as it is submitted against those still in flight and the seam's rules."""

    def __init__(self, limits: ExecutorLimits, violations: list[str]) -> None:
        self._limits = limits
        self._violations = violations
        self._tables = RowTables(limits, violations)
        self._in_flight: deque[_Footprint] = deque()

    def submit(self, plan: StepPlan) -> int:
        """Check a plan; returns the context tokens that its first step reads."""
        self._check_rules(plan)
        self._tables.apply(plan)
        footprint = _Footprint()
        context = 0
        for chunk in plan.prefills:
            context += self._touch(plan, footprint, chunk.row, chunk.tokens.size)
        for row in plan.decode_rows.tolist():
            context += self._touch(plan, footprint, row, plan.steps)
        self._in_flight.append(footprint)
        return context

    def collected(self, plan: StepPlan, taken: int) -> None:
        """The oldest plan is over; it may have taken fewer steps than planned."""
        footprint = self._in_flight.popleft()
        for row in plan.decode_rows.tolist():
            if int(self._tables.owner[row]) in footprint.blocks_of:
                self._tables.kv_len[row] -= plan.steps - taken

    def _touch(self, plan: StepPlan, footprint: _Footprint, row: int, tokens: int) -> int:
        start = int(self._tables.kv_len[row])
        blocks: list[int] = self._tables.blocks(row, start + tokens).tolist()
        self._tables.kv_len[row] += tokens
        if min(blocks, default=0) < 0:
            self._violations.append(f"step {plan.step_id}: row {row} lacks blocks in its table")
            return start
        owner = int(self._tables.owner[row])
        written = blocks[start // self._limits.block_size :]
        for other in (*self._in_flight, footprint):
            if any(other.writer.get(block, owner) != owner for block in blocks):
                self._report(plan, row, "touches a block that another request is still writing")
            mine = other.blocks_of.get(owner, frozenset())
            for block in written:
                if other.touches.get(block, 0) - (block in mine) > 0:
                    self._report(plan, row, f"writes block {block}, which is still being read")
        for block in set(blocks):
            footprint.touches[block] = footprint.touches.get(block, 0) + 1
        footprint.writer.update(dict.fromkeys(written, owner))
        footprint.blocks_of[owner] = frozenset(blocks)
        return start

    def _check_rules(self, plan: StepPlan) -> None:
        limits = self._limits
        rows = plan.decode_rows.tolist()
        prefill_rows = [chunk.row for chunk in plan.prefills]
        if rows != sorted(set(rows)) or set(rows) & set(prefill_rows):
            self._report(plan, -1, "names a row twice or out of order")
        if len(set(prefill_rows)) != len(prefill_rows) or len(prefill_rows) > limits.max_prefills:
            self._report(plan, -1, "has too many prefills")
        if any(not 0 < chunk.tokens.size <= limits.max_prefill_tokens for chunk in plan.prefills):
            self._report(plan, -1, "has a prefill that is empty or too long")
        if plan.steps < 1 or (plan.steps > 1 and (plan.prefills or plan.masks)):
            self._report(plan, -1, "takes several steps beside prefills or masks")
        if not set(plan.masks) <= {*rows, *(c.row for c in plan.prefills if c.samples)}:
            self._report(plan, -1, "masks a row that does not sample")

    def _report(self, plan: StepPlan, row: int, what: str) -> None:
        where = f"row {row}" if row >= 0 else "the plan"
        self._violations.append(f"step {plan.step_id}: {where} {what}")
