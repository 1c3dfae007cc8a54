"""The batch: which request owns which row, in persistent arrays that plans are cut from.

Everything a steady decode step does here is a handful of numpy calls on [rows] arrays.
"""

import heapq
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.executor import ExecutorLimits
from serving.engine.memory import KVMemory
from serving.engine.plan import NO_ROWS, NO_TABLE_UPDATE, Int32, RowAssignment, TableUpdate, UInt32
from serving.engine.request import Priority
from serving.errors import InternalError


class Batch:
    """Rows, and for each: how far its KV is planned, what it may still sample, when it last ran.

    Arrays are [rows]: `kv_planned` tokens of KV once all submitted plans ran in full,
    `capacity` tokens its blocks can hold, `left` tokens it may still be planned to sample,
    `masked` how many of its next samples must not stop it, `last_step` the last plan with it.
    """

    def __init__(self, limits: ExecutorLimits, memory: KVMemory) -> None:
        rows = limits.num_rows
        self.requests: list[ActiveRequest | None] = [None] * rows
        self.prefilling: dict[Priority, list[ActiveRequest]] = {p: [] for p in Priority}
        self.running = 0
        self._memory = memory
        self._slots_per_block = limits.slots_per_block
        self._free_rows = list(range(rows))  # a heap: rows stay dense
        self._decoding: npt.NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self._decoding_count = [0] * len(Priority)
        self._kv_planned = np.zeros(rows, np.int64)
        self._capacity = np.zeros(rows, np.int64)
        self._left = np.zeros(rows, np.int64)
        self._masked = np.zeros(rows, np.int64)
        self._last_step = np.zeros(rows, np.int64)
        self._members: tuple[Int32, list[ActiveRequest]] | None = None
        self._assignments: list[RowAssignment] = []
        # Table entries of the next plan, as three flat lists: numpy takes those in fastest.
        self._table: tuple[list[int], list[int], list[int]] = ([], [], [])

    @property
    def has_free_row(self) -> bool:
        """Whether a request could get a row."""
        return bool(self._free_rows)

    def decoding_count(self, priority: Priority) -> int:
        """Rows of a class that can take a decode step."""
        return self._decoding_count[priority]

    def members(self) -> tuple[Int32, list[ActiveRequest]]:
        """The rows that can take a decode step, int32 [n] sorted, and their requests.

        The same objects until the membership changes.
        """
        if self._members is None:
            rows = np.flatnonzero(self._decoding).astype(np.int32)
            rows.setflags(write=False)
            owners = [self.requests[row] for row in rows.tolist()]
            requests = [request for request in owners if request is not None]
            if len(requests) != len(owners):
                raise InternalError("A row decodes but has no request.")
            self._members = (rows, requests)
        return self._members

    def short_of_blocks(self, steps: int) -> list[ActiveRequest]:
        """Decoding requests whose blocks cannot hold so many more tokens, first come first."""
        rows, requests = self.members()
        short = np.flatnonzero(self._kv_planned[rows] + steps > self._capacity[rows])
        if not short.size:
            return []
        return sorted((requests[i] for i in short.tolist()), key=lambda request: request.order)

    def missing_blocks(self, request: ActiveRequest, steps: int) -> int:
        """Blocks a decoding request lacks for so many more tokens."""
        need = self._memory.blocks_for(int(self._kv_planned[request.row]) + steps)
        return max(need - len(request.blocks), 0)

    def fewest_left(self) -> int:
        """The smallest number of tokens that any decoding row may still sample; 0 if none."""
        rows, _ = self.members()
        return int(self._left[rows].min()) if rows.size else 0

    def any_masked(self) -> bool:
        """Whether the next sample of any decoding row needs a mask."""
        rows, _ = self.members()
        return bool((self._masked[rows] > 0).any())

    def masks(self, rows: Int32) -> dict[int, UInt32]:
        """The masks of these rows' next samples."""
        found: dict[int, UInt32] = {}
        for row in rows[self._masked[rows] > 0].tolist():
            mask = self._owner(row).mask
            if mask is not None:
                found[row] = mask
        return found

    def place(self, request: ActiveRequest, matched: list[int]) -> None:
        """Give a waiting request a row, the matched blocks, and blocks for all its context."""
        row = heapq.heappop(self._free_rows)
        self._memory.share(matched)
        total = self._memory.blocks_for(len(request.tokens))
        kv_len = len(matched) * self._memory.block_size
        request.move(RequestState.PREFILLING)
        request.row = row
        request.registered = len(matched)
        request.blocks = list(matched)
        request.context = np.asarray(request.tokens, np.int32)
        request.context.setflags(write=False)
        request.prefilled = kv_len
        if request.cached_tokens < 0:
            request.cached_tokens = min(kv_len, request.prompt_len)
        self.requests[row] = request
        self.running += 1
        self._assignments.append(
            RowAssignment(row, kv_len, request.sampling, tuple(sorted(request.stops)))
        )
        self._enter_blocks(row, 0, matched)
        self.grow(request, total - len(matched))
        self._kv_planned[row] = kv_len
        self._left[row] = request.end_len - len(request.tokens)
        self._masked[row] = 0
        if request.mask is not None:
            self._masked[row] = request.sampling.min_tokens - request.generated
        self._last_step[row] = 0
        queue = self.prefilling[request.priority]
        queue.append(request)
        queue.sort(key=lambda other: other.arrival)

    def grow(self, request: ActiveRequest, count: int) -> None:
        """Add blocks to a request that has a row."""
        new = self._memory.take(count)
        self._enter_blocks(request.row, len(request.blocks), new)
        request.blocks.extend(new)
        self._capacity[request.row] = len(request.blocks) * self._memory.block_size

    def remove(self, request: ActiveRequest) -> None:
        """Take row and blocks from a request; what runs on them keeps them in flight."""
        row = request.row
        request.last_step = int(self._last_step[row])
        self._set_decoding(row, request.priority, False)
        if request in self.prefilling[request.priority]:
            self.prefilling[request.priority].remove(request)
        self._memory.let_go(request)
        self.requests[row] = None
        self.running -= 1
        heapq.heappush(self._free_rows, row)
        request.row = -1
        request.context = NO_ROWS

    def advance_prefill(self, request: ActiveRequest, tokens: int, step_id: int) -> None:
        """A plan computes so many more context tokens; the last of them samples."""
        row = request.row
        request.prefilled += tokens
        self._kv_planned[row] = request.prefilled
        self._last_step[row] = step_id
        if request.prefilled < len(request.context):
            return
        self.prefilling[request.priority].remove(request)
        request.move(RequestState.DECODING)
        request.context = NO_ROWS
        self._left[row] -= 1
        self._masked[row] -= 1
        self._set_decoding(row, request.priority, bool(self._left[row] > 0))

    def advance_decodes(self, rows: Int32, steps: int, step_id: int) -> None:
        """A plan takes decode steps with these rows."""
        self._kv_planned[rows] += steps
        self._left[rows] -= steps
        self._masked[rows] -= steps
        self._last_step[rows] = step_id
        for row in rows[self._left[rows] <= 0].tolist():
            self._set_decoding(row, self._owner(row).priority, False)

    def coast(self, steps: int, step_id: int, before_growth: Callable[[int], None]) -> TableUpdate:
        """So many plans in which all that can decode do; the last of them is `step_id`.

        Blocks come to the rows in the order of plans, and within one to those who came first.
        before_growth is told, before a row gets a block, how many results have come back. Returns
        the table entries of all of it. The caller made sure that there are blocks, and that every
        row may sample as often.
        """
        rows, requests = self.members()
        size = self._memory.block_size
        room = self._capacity[rows] - self._kv_planned[rows]
        growing: list[tuple[int, tuple[int, int], ActiveRequest]] = []
        for index in np.flatnonzero(room < steps).tolist():
            request = requests[index]
            at = range(int(room[index]), steps, size)
            growing += [(step, request.order, request) for step in at]
        growing.sort(key=lambda growth: growth[:2])
        for step, _, request in growing:
            before_growth(step + 1)
            self.grow(request, 1)
        self.advance_decodes(rows, steps, step_id)
        return self.take_changes()[1]

    def blocks_to_coast(self, steps: int) -> int:
        """Blocks that `coast` takes."""
        rows, _ = self.members()
        size = self._memory.block_size
        short = self._kv_planned[rows] + steps - self._capacity[rows]
        return int((-(-np.maximum(short, 0) // size)).sum())

    def give_back(self, request: ActiveRequest, steps: int) -> None:
        """A plan ended so many steps early: the row may sample those tokens again."""
        row = request.row
        self._kv_planned[row] -= steps
        self._left[row] += steps
        self._masked[row] += steps
        self._set_decoding(row, request.priority, True)

    def mask_of_prefill(self, request: ActiveRequest) -> UInt32 | None:
        """The mask of the sample at the end of a prefill, if it needs one."""
        return request.mask if self._masked[request.row] > 0 else None

    def take_changes(self) -> tuple[tuple[RowAssignment, ...], TableUpdate]:
        """Assignments and table entries for the plan that is about to be submitted."""
        assignments = tuple(self._assignments)
        self._assignments = []
        rows, columns, bases = self._table
        if not rows:
            return assignments, NO_TABLE_UPDATE
        self._table = ([], [], [])
        update = TableUpdate(
            np.array(rows, np.int32), np.array(columns, np.int32), np.array(bases, np.int32)
        )
        return assignments, update

    def check(self) -> None:
        """Raises InternalError unless rows, arrays and requests agree."""
        if sorted(self._free_rows) != [r for r, o in enumerate(self.requests) if o is None]:
            raise InternalError("The free rows differ from the rows without a request.")
        if self._assignments or self._table[0]:
            raise InternalError("Changes of the batch did not go out with a plan.")
        if self.running != len(self.requests) - len(self._free_rows):
            raise InternalError("The number of running requests is wrong.")
        counts = [0] * len(Priority)
        # As lists: the simulator does this after every event, and numpy is slow at single values.
        decoding = self._decoding.tolist()
        planned, capacity, left = (
            array.tolist() for array in (self._kv_planned, self._capacity, self._left)
        )
        for row, request in enumerate(self.requests):
            if request is None:
                if decoding[row]:
                    raise InternalError(f"Row {row} decodes but has no request.")
                continue
            counts[request.priority] += decoding[row]
            self._check_row(row, request, decoding[row], planned[row], capacity[row], left[row])
        if counts != self._decoding_count:
            raise InternalError("The number of decoding rows by class is wrong.")
        rows, _ = self.members()
        if rows.tolist() != [row for row, decodes in enumerate(decoding) if decodes]:
            raise InternalError("The decode rows are out of date.")

    def _check_row(
        self,
        row: int,
        request: ActiveRequest,
        decodes: bool,
        planned: int,
        capacity: int,
        left: int,
    ) -> None:
        name = request.request_id
        prefilling = request.state is RequestState.PREFILLING
        if request.row != row or not (prefilling or request.state is RequestState.DECODING):
            raise InternalError(f"{name} is {request.state.value} but owns row {row}.")
        if prefilling != (request in self.prefilling[request.priority]):
            raise InternalError(f"{name} is {request.state.value} against the list of prefills.")
        if capacity != len(request.blocks) * self._memory.block_size:
            raise InternalError(f"{name} has another capacity than its blocks.")
        if not len(request.tokens) - 1 <= planned <= capacity and not prefilling:
            raise InternalError(f"{name} has KV planned outside its context and blocks.")
        if left < 0 or left > request.end_len - len(request.tokens):
            raise InternalError(f"{name} would sample past its end.")
        if not prefilling and decodes != (left > 0):
            raise InternalError(f"{name} decodes against what it may still sample.")

    def _owner(self, row: int) -> ActiveRequest:
        request = self.requests[row]
        if request is None:
            raise InternalError(f"Row {row} has no request.")
        return request

    def _enter_blocks(self, row: int, column: int, blocks: list[int]) -> None:
        rows, columns, bases = self._table
        for block in blocks:
            rows.append(row)
            columns.append(column)
            bases.append(block * self._slots_per_block)
            column += 1

    def _set_decoding(self, row: int, priority: Priority, decoding: bool) -> None:
        if bool(self._decoding[row]) is not decoding:
            self._decoding[row] = decoding
            self._decoding_count[priority] += 1 if decoding else -1
            self._members = None
