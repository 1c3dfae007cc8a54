"""Decides what the next step does: who decodes, who prefills, who is admitted or preempted."""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from serving.engine.active import ActiveRequest, RequestState
from serving.engine.batch import Batch
from serving.engine.config import EngineConfig
from serving.engine.executor import ExecutorLimits
from serving.engine.memory import KVMemory
from serving.engine.plan import PrefillChunk, StepPlan
from serving.engine.request import Priority
from serving.engine.waiting import WaitingQueues


@dataclass(frozen=True, slots=True)
class SubmittedPlan:
    """A plan on its way, and whose tokens it brings.

    sampling: the requests of the result's rows, in order. chunks: for each prefill chunk its
    request and the context tokens computed when it ends.
    """

    plan: StepPlan
    sampling: list[ActiveRequest]
    chunks: tuple[tuple[ActiveRequest, int], ...]


@dataclass(slots=True)
class _Draft:
    """A plan in the making.

    budget: tokens the step still has room for; prefill_budget: those of prompts among them.
    left_out: decoding requests that sit this step out, by row. stalled_blocks: blocks that such
    requests wait for and that are in flight now. room_coming: a waiting request has preempted
    others, whose blocks it gets when the step in flight ends.
    """

    budget: int
    prefill_budget: int
    left_out: dict[int, ActiveRequest] = field(default_factory=dict)
    chunks: list[tuple[ActiveRequest, int]] = field(default_factory=list)
    stalled_blocks: int = 0
    room_coming: bool = False


class Planner:
    """Plans from the requests' state, class by class.

    Within a class: decodes first, then prefills under way, then admissions in order of arrival.
    A lower class gets what the higher one leaves; decodes of class batch alone wait for prompts
    that fill whole calls. When blocks run short, the latest arrival of
    the lowest class is preempted and computes its KV again later; that can be the request in
    need itself, so the oldest request of the highest class always gets on.
    """

    def __init__(
        self,
        limits: ExecutorLimits,
        config: EngineConfig,
        batch: Batch,
        waiting: WaitingQueues,
        memory: KVMemory,
    ) -> None:
        self._limits = limits
        self._budget = config.step_tokens(limits)
        # Whole calls of the executor: a few tokens more than fill one would cost another.
        calls = self._budget // limits.max_prefill_tokens
        self._prefill_budget = max(calls, 1) * limits.max_prefill_tokens
        self._spread_steps = config.spread_steps
        self._least_prefill = config.min_prefill_tokens
        self._prefill_first = config.prefill_first
        self._kv_tokens = limits.num_blocks * limits.block_size
        self._waited_tokens = 0  # of prompts that filled one step after the other
        self._decode_steps = config.decode_steps
        self._watermark = math.ceil(limits.num_blocks * config.watermark)
        self._batch = batch
        self._waiting = waiting
        self._memory = memory

    def plan(self, step_id: int) -> SubmittedPlan | None:
        """The next step, or None if nothing can be done before a running step comes back."""
        steps = self._steps()
        draft = _Draft(self._budget, self._prefill_tokens())
        short = self._batch.short_of_blocks(steps)
        for priority in Priority:
            if short:
                self._grow(draft, [r for r in short if r.priority is priority], steps)
            self._take_decodes(draft, priority)
            for request in self._batch.prefilling[priority]:
                self._take_chunk(draft, request)
            self._admit(draft, priority)
        if self._decodes_wait(draft):
            draft.left_out = {request.row: request for request in self._batch.members()[1]}
        return self._seal(draft, step_id, steps)

    def is_stuck(self) -> bool:
        """Whether, as long as nothing ends or is let go of, no step will start what waits.

        May be False though it is so: the question is cheap, not exact.
        """
        for priority in Priority:
            request = self._waiting.head(priority)
            if request is None:
                continue
            lower = [p for p in Priority if p > priority]
            if any(self._batch.decoding_count(p) for p in lower):
                return False
            if not self._batch.has_free_row:
                return True
            return not self._memory.caches_prefixes and not self._fits(request, [])
        return True

    def _prefill_tokens(self) -> int:
        """Prompt tokens this step has room for: fewer where somebody waits for each token.

        That is where requests of the highest class decode. Then it is a power of two, as calls are,
        of at least the smallest amount; or what a mixed call of so many tokens, or the next larger
        one, has room for beside the decodes.
        """
        left = self._waiting.tokens
        for queue in self._batch.prefilling.values():
            for request in queue:
                left += len(request.context) - request.prefilled
        if not left or self._spread_steps == 1 or not self._batch.decoding_count(Priority.HIGH):
            return self._prefill_budget
        share = max(-(-left // self._spread_steps), self._least_prefill)
        tokens = min(1 << (share - 1).bit_length(), self._prefill_budget)
        decoding = len(self._batch.members()[1])
        for size in self._limits.mixed_sizes:
            if size.tokens >= tokens and size.rows >= decoding:
                return min(size.prompt_tokens, self._prefill_budget)
        return tokens

    def _steps(self) -> int:
        """Several decode steps at once only when nothing waits and memory is there for all."""
        batch = self._batch
        if self._decode_steps == 1 or len(self._waiting) or any(batch.prefilling.values()):
            return 1
        steps = min(self._decode_steps, batch.fewest_left())
        if steps <= 1 or batch.any_masked():
            return 1
        short = batch.short_of_blocks(steps)
        missing = sum(batch.missing_blocks(request, steps) for request in short)
        return steps if missing <= self._memory.available else 1

    def _grow(self, draft: _Draft, short: list[ActiveRequest], steps: int) -> None:
        """Blocks for decodes that need one more, at the expense of who came last."""
        for request in short:
            if request.state is not RequestState.DECODING:
                continue  # preempted for one before it
            count = self._batch.missing_blocks(request, steps)
            while self._memory.available < count or draft.room_coming:
                if draft.room_coming or self._memory.in_flight >= draft.stalled_blocks + count:
                    draft.stalled_blocks += count
                    draft.left_out[request.row] = request
                    break
                victim = self._last_running()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                self._batch.grow(request, count)

    def _take_decodes(self, draft: _Draft, priority: Priority) -> None:
        """Charge the budget for decodes; the last to come sit out if it does not reach."""
        count = self._batch.decoding_count(priority)
        count -= sum(request.priority is priority for request in draft.left_out.values())
        if count > draft.budget:
            _, members = self._batch.members()
            mine = [r for r in members if r.priority is priority and r.row not in draft.left_out]
            mine.sort(key=lambda request: request.arrival)
            draft.left_out.update((r.row, r) for r in mine[draft.budget :])
            count = draft.budget
        draft.budget -= count

    def _decodes_wait(self, draft: _Draft) -> bool:
        """Whether this step is for prompts alone, as nobody waits for the next token.

        Not for long: each prompt that ends adds a row, and rows and memory admit so many. Prompts
        that leave nothing to decode add none, so nobody waits for them. Those that end otherwise
        make room for more: then no longer than such prompts would take to fill the memory once, and
        not again before a step has room left.
        """
        if not self._prefill_first or self._batch.decoding_count(Priority.HIGH):
            return False
        tokens = sum(
            tokens for request, tokens in draft.chunks if request.end_len - len(request.tokens) > 1
        )
        fills = tokens >= self._limits.max_prefill_tokens
        self._waited_tokens = self._waited_tokens + tokens if fills else 0
        return fills and self._waited_tokens <= self._kv_tokens

    def _take_chunk(self, draft: _Draft, request: ActiveRequest) -> None:
        """The next chunk of a prefill, as far as the step still has room."""
        tokens = min(
            len(request.context) - request.prefilled,
            self._limits.max_prefill_tokens,
            draft.budget,
            draft.prefill_budget,
        )
        if tokens > 0 and len(draft.chunks) < self._limits.max_prefills:
            draft.chunks.append((request, tokens))
            draft.budget -= tokens
            draft.prefill_budget -= tokens

    def _admit(self, draft: _Draft, priority: Priority) -> None:
        """Start waiting requests of a class, in order, while there is room for the next one."""
        room = min(draft.budget, draft.prefill_budget)
        while len(draft.chunks) < self._limits.max_prefills and room > 0:
            if draft.stalled_blocks or self._waiting.higher_waits(priority):
                return
            request = self._waiting.head(priority)
            # A preempted request first gets the token that its last plan still computes.
            if request is None or request.last_step > self._memory.collected_step:
                return
            matched = self._memory.match(request)
            if not self._fits(request, matched):
                if not self._make_room(request, matched):
                    return
                if not self._fits(request, matched):
                    draft.room_coming = True
                    return
            self._waiting.remove(request)
            self._batch.place(request, matched)
            self._take_chunk(draft, request)
            room = min(draft.budget, draft.prefill_budget)

    def _blocks_to_start(self, request: ActiveRequest, matched: list[int], running: int) -> int:
        """Available blocks that admission asks for: the context's, and the watermark."""
        need = self._memory.blocks_for(len(request.tokens)) - len(matched)
        return need + (self._watermark if running else 0)

    def _fits(self, request: ActiveRequest, matched: list[int]) -> bool:
        need = self._blocks_to_start(request, matched, self._batch.running)
        return self._batch.has_free_row and self._memory.available_beside(matched) >= need

    def _make_room(self, request: ActiveRequest, matched: list[int]) -> bool:
        """Preempt requests of lower classes, the last first, if that lets this one start.

        If it does not help even to preempt them all, none is: what this request waits for is
        then held by its own class.
        """
        lower = [r for r in self._batch.requests if r and r.priority > request.priority]
        lower.sort(key=lambda other: other.order, reverse=True)
        room = self._memory.available_beside(matched) + self._memory.in_flight_beside(matched)
        let_go: Counter[int] = Counter()
        running = self._batch.running
        victims: list[ActiveRequest] = []
        while not (
            (victims or self._batch.has_free_row)
            and room >= self._blocks_to_start(request, matched, running - len(victims))
        ):
            if len(victims) == len(lower):
                return False
            victim = lower[len(victims)]
            victims.append(victim)
            room += self._memory.gain(victim.blocks, set(matched), let_go)
        for victim in victims:
            self._preempt(victim)
        return True

    def _last_running(self) -> ActiveRequest:
        """Who is preempted first: the latest arrival of the lowest class."""
        running = [request for request in self._batch.requests if request is not None]
        return max(running, key=lambda request: request.order)

    def _preempt(self, request: ActiveRequest) -> None:
        """Take a request's row and blocks; its context so far is computed again later."""
        self._batch.remove(request)
        request.move(RequestState.WAITING)
        self._waiting.add(request)

    def _seal(self, draft: _Draft, step_id: int, steps: int) -> SubmittedPlan | None:
        """Turn the draft into a plan and advance the batch by it."""
        batch = self._batch
        rows, requests = batch.members()
        if draft.left_out:
            out = np.fromiter(sorted(draft.left_out), np.int32)
            rows = rows[~np.isin(rows, out)]
            requests = [request for request in requests if request.row not in draft.left_out]
        if not rows.size and not draft.chunks:
            return None
        masks = batch.masks(rows)
        prefills: list[PrefillChunk] = []
        sampling = requests if not draft.chunks else list(requests)
        for request, count in draft.chunks:
            start, end = request.prefilled, request.prefilled + count
            samples = end == len(request.context)
            prefills.append(PrefillChunk(request.row, start, request.context[start:end], samples))
            if samples:
                sampling.append(request)
                mask = batch.mask_of_prefill(request)
                if mask is not None:
                    masks[request.row] = mask
        assignments, table = batch.take_changes()
        plan = StepPlan(step_id, rows, tuple(prefills), assignments, table, steps, masks)
        chunks = tuple((request, request.prefilled + count) for request, count in draft.chunks)
        batch.advance_decodes(rows, steps, step_id)
        for request, count in draft.chunks:
            batch.advance_prefill(request, count, step_id)
        return SubmittedPlan(plan, sampling, chunks)
