"""Runs step plans on the devices of one replica."""

import threading
from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lumen_kernels.paged_attention.options import Arena

from lumen.model import LoadedModel
from serving.engine.device.compilation import CompileWatch
from serving.engine.device.decode_batch import DecodeBatch, DecodeBatches
from serving.engine.device.mixed_call import mixed_size_of
from serving.engine.device.prefill_calls import (
    CallSize,
    PrefillCall,
    most_sequences,
    pack_chunks,
)
from serving.engine.device.programs import HeadKind, Programs
from serving.engine.device.rows import RowState, mask_array
from serving.engine.executor import ExecutorLimits, MixedSize
from serving.engine.plan import NO_ROWS, Int32, LogprobArrays, StepPlan, StepResult
from serving.errors import ExecutorError

_Masks = dict[int, np.ndarray[tuple[int, ...], np.dtype[np.uint32]]]
"""Of rows, the tokens they may draw: one bit each."""

_STEPS_AHEAD = 2  # decode steps of one plan on the device at a time: one runs, one waits


@dataclass(slots=True)
class _Sampled:
    """One call of a head program: what it drew for `count` rows, on its way to the host.

    after: (last tokens, lengths) on the device once this was drawn, to return to.
    """

    count: int
    tokens: jax.Array
    logprobs: tuple[jax.Array, ...]
    after: tuple[jax.Array, jax.Array]


@dataclass(slots=True)
class _InFlight:
    """A submitted plan. Decode steps are dispatched one by one, `prefilled` waits for the rest."""

    plan: StepPlan
    steps: list[_Sampled] = field(default_factory=list)
    prefills: list[_Sampled] = field(default_factory=list)
    prefilled: list[jax.Array] = field(default_factory=list)


class DeviceExecutor:
    """Runs plans on the devices of one replica: `serving.engine.executor.Executor` with JAX.

    All programs are compiled before; the arena is donated from call to call and never copied. The
    token last drawn for each row stays on the device and is the input of the row's next step.
    A plan of several steps is dispatched `_STEPS_AHEAD` steps ahead of its stop tokens; steps
    dispatched past the end of the plan are undone by forgetting them: what they wrote to the
    arena lies beyond the rows' lengths. Plans submitted behind it wait until its end is known.

    Made by `build_device_executor`.
    """

    def __init__(
        self, model: LoadedModel, programs: Programs, limits: ExecutorLimits, arena: Arena
    ) -> None:
        self._model = model
        self._programs = programs
        self._limits = limits
        self._arena = arena
        self._everywhere = NamedSharding(model.mesh, PartitionSpec())
        self._offsets = [
            tuple(self._put(offset) for offset in _layer_offsets(model, unit))
            for unit in range(len(model.units))
        ]
        self._rows = RowState(limits.num_rows, limits.max_blocks_per_row)
        self._last_tokens = self._put(np.zeros(limits.num_rows, np.int32))
        self._decode_buckets = sorted(programs.decode_unit)
        self._call_sizes = [
            CallSize(tokens, most_sequences(tokens, limits.max_prefills, self._decode_buckets))
            for tokens in sorted(programs.prefill_unit)
        ]
        self._no_masks = {
            bucket: self._put(mask_array(NO_ROWS, bucket, {}, limits.vocab_size))
            for bucket in self._decode_buckets
        }
        self._batches = DecodeBatches(self._rows, self._decode_buckets, self._put)
        self._in_flight: deque[_InFlight] = deque()
        self._waiting: deque[StepPlan] = deque()
        self._interrupted = threading.Event()
        self._failure: str | None = None
        self._watch = CompileWatch()

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        return self._limits

    def compilations_since_start(self) -> int:
        """Programs compiled inside `submit` and `collect`: none, or serving has a gap."""
        return self._watch.count

    def interrupt(self) -> None:
        """End the multi-step plan in progress, or the next one, after the steps in flight.

        Any thread may call this. An interrupt that finds no such plan shortens the next: the plan
        may just be on its way.
        """
        self._interrupted.set()

    def rehearse(self) -> None:
        """Run every program once, on padding, and wait for it.

        A GPU loads a program's kernels when it first runs: some milliseconds that no request should
        wait for. Raises what the device raises.
        """
        padding = self._rows.padding
        done: list[jax.Array] = []
        for bucket in self._decode_buckets:
            batch = self._batches.of(np.full(bucket, padding, np.int32))
            hidden = self._run_decode(batch)
            done += (self._sample_batch(kind, batch, hidden, {}).tokens for kind in HeadKind)
        for size in self._call_sizes:
            packed, hidden = self._run_prefill(PrefillCall(size, ()))
            done += self._programs.prefill_last[size.tokens](hidden, packed)
        for mixed in self._limits.mixed_sizes:
            done += self._run_mixed(mixed, StepPlan(0))
        self._batches.forget()
        jax.block_until_ready((done, self._arena))

    def submit(self, plan: StepPlan) -> None:
        """Dispatch the plan and return without waiting for the device."""
        with self._watch:
            self._waiting.append(plan)
            self._start_waiting()

    def collect(self) -> StepResult:
        """Wait for the oldest plan not yet collected.

        A failure of the device comes back as `StepResult.error`; everything after it fails too.
        Raises ExecutorError if no plan was submitted.
        """
        if not self._in_flight:
            raise ExecutorError("collect() was called without a submitted plan; submit one first.")
        with self._watch:
            flight = self._in_flight[0]
            try:
                result = self._finish(flight) if self._failure is None else None
            except Exception as error:  # whatever it was, the device state is unknown now
                self._fail(error)
                result = None
            self._in_flight.popleft()
            self._start_waiting()
        if result is None:
            nothing = np.zeros((0, 0), np.int32)
            return StepResult(flight.plan.step_id, NO_ROWS, nothing, error=self._failure)
        return result

    def _fail(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"

    def _start_waiting(self) -> None:
        """Dispatch plans in order, none past a multi-step plan whose end is open."""
        while self._waiting and not (self._in_flight and self._in_flight[-1].plan.steps > 1):
            flight = _InFlight(self._waiting.popleft())
            self._in_flight.append(flight)
            if self._failure is not None:
                continue
            try:
                self._start(flight)
            except Exception as error:  # reported by collect
                self._fail(error)

    def _start(self, flight: _InFlight) -> None:
        plan = flight.plan
        self._rows.apply(plan)
        if mixed := mixed_size_of(plan, self._limits.mixed_sizes):
            self._dispatch_mixed(flight, mixed)
            return
        if plan.decode_rows.size:
            self._dispatch_decode(flight)
            if plan.steps > 1 and not self._interrupted.is_set():
                self._dispatch_decode(flight)
        for call in pack_chunks(plan.prefills, self._call_sizes):
            self._dispatch_prefill(flight, call)

    def _dispatch_decode(self, flight: _InFlight) -> None:
        """One decode step of the plan's rows."""
        batch = self._batches.of(flight.plan.decode_rows)
        hidden = self._run_decode(batch)
        masks = flight.plan.masks if not flight.steps else {}
        sampled = self._sample_batch(
            HeadKind.COMPLETE if masks else batch.kind, batch, hidden, dict(masks)
        )
        batch.lengths = sampled.after[1]
        self._rows.grow(batch.rows, 1)
        flight.steps.append(sampled)

    def _run_decode(self, batch: DecodeBatch) -> jax.Array:
        """The hidden states of a batch's next tokens."""
        programs = self._programs
        hidden: jax.Array
        hidden, step, schedule = programs.decode_embed[batch.bucket](
            self._model.embedding, self._last_tokens, batch.device_rows, batch.tables, batch.lengths
        )
        unit = programs.decode_unit[batch.bucket]
        for weights, offsets in zip(self._model.units, self._offsets, strict=True):
            hidden, self._arena = unit(
                weights, hidden, self._arena, batch.tables, batch.lengths, step, schedule, offsets
            )
        return hidden

    def _sample_batch(
        self, kind: HeadKind, batch: DecodeBatch, hidden: jax.Array, masks: _Masks
    ) -> _Sampled:
        return self._sample(
            kind, batch.rows, batch.bucket, hidden, batch.device_rows, batch.lengths,
            batch.sampling, masks,
        )  # fmt: skip

    def _dispatch_prefill(self, flight: _InFlight, call: PrefillCall) -> None:
        """Chunks of one or more prompts, and the tokens that follow those that sample."""
        packed, hidden = self._run_prefill(call)
        rows = call.sampling_rows()
        if not rows.size:
            flight.prefilled.append(hidden)
            return
        size = call.size
        last, device_rows, lengths = self._programs.prefill_last[size.tokens](hidden, packed)
        masks = {row: flight.plan.masks[row] for row in rows.tolist() if row in flight.plan.masks}
        kind = self._rows.head_kind(rows, masked=bool(masks))
        padded: Int32 = np.full(size.sequences, self._rows.padding, np.int32)
        padded[: rows.size] = rows
        sampling = self._put(self._rows.sampling(padded))
        flight.prefills.append(
            self._sample(kind, rows, size.sequences, last, device_rows, lengths, sampling, masks)
        )

    def _run_prefill(self, call: PrefillCall) -> tuple[jax.Array, jax.Array]:
        """A call on the device, and the hidden states of its tokens."""
        programs, tokens = self._programs, call.size.tokens
        packed = self._put(self._rows.pack_call(call))
        hidden, step, schedule = programs.prefill_embed[tokens](self._model.embedding, packed)
        unit = programs.prefill_unit[tokens]
        for weights, offsets in zip(self._model.units, self._offsets, strict=True):
            hidden, self._arena = unit(
                weights, hidden, self._arena, packed, step, schedule, offsets
            )
        return packed, hidden

    def _dispatch_mixed(self, flight: _InFlight, size: MixedSize) -> None:
        """All of a plan in one call."""
        plan = flight.plan
        hidden, device_rows, lengths = self._run_mixed(size, plan)
        rows = plan.drawing_rows()
        kind = self._rows.head_kind(rows, masked=bool(plan.masks))
        padded: Int32 = np.full(size.rows, self._rows.padding, np.int32)
        padded[: rows.size] = rows
        sampling = self._put(self._rows.sampling(padded))
        flight.steps.append(
            self._sample(
                kind, rows, size.rows, hidden, device_rows, lengths, sampling, dict(plan.masks)
            )
        )

    def _run_mixed(self, size: MixedSize, plan: StepPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What head takes: the hidden states that something is sampled behind, rows and lengths."""
        programs = self._programs
        packed = self._put(self._rows.pack_mixed(size, plan))
        hidden, *step, (places, rows, lengths) = programs.mixed_embed[size](
            self._model.embedding, self._last_tokens, packed
        )
        unit = programs.mixed_unit[size]
        for weights, offsets in zip(self._model.units, self._offsets, strict=True):
            hidden, self._arena = unit(weights, hidden, self._arena, *step, offsets)
        return programs.mixed_last[size](hidden, places), rows, lengths

    def _sample(
        self,
        kind: HeadKind,
        rows: Int32,
        bucket: int,
        hidden: jax.Array,
        device_rows: jax.Array,
        lengths: jax.Array,
        sampling: jax.Array,
        masks: _Masks,
    ) -> _Sampled:
        more: tuple[jax.Array, ...] = ()
        if kind is not HeadKind.GREEDY:
            more = (sampling,)
        if kind is HeadKind.COMPLETE:
            vocab_size = self._limits.vocab_size
            more += (
                self._put(mask_array(rows, bucket, masks, vocab_size))
                if masks
                else self._no_masks[bucket],
            )
        tokens, self._last_tokens, lengths, *logprobs = self._programs.head[bucket, kind](
            self._model.head, hidden, self._last_tokens, device_rows, lengths, *more
        )
        for array in (tokens, *logprobs):
            array.copy_to_host_async()
        return _Sampled(rows.size, tokens, tuple(logprobs), (self._last_tokens, lengths))

    def _finish(self, flight: _InFlight) -> StepResult:
        """Read what the plan drew; a multi-step plan is driven to its end."""
        plan = flight.plan
        jax.block_until_ready(flight.prefilled)
        columns = [
            np.concatenate([_tokens(part) for part in (*flight.steps[:1], *flight.prefills)])
            if flight.steps or flight.prefills
            else NO_ROWS
        ]
        while plan.steps > 1:
            taken = len(columns)
            if taken == plan.steps or self._rows.any_stops(plan.decode_rows, columns[-1]):
                self._undo(flight, taken)
                break
            if len(flight.steps) < plan.steps and not self._interrupted.is_set():
                self._dispatch_decode(flight)
            if len(flight.steps) == taken:
                break
            columns.append(_tokens(flight.steps[taken]))
        if plan.steps > 1:
            self._interrupted.clear()
        drew = plan.drawing_rows()
        if not drew.size:
            return StepResult(plan.step_id, NO_ROWS, np.zeros((0, 0), np.int32))
        tokens = np.stack(columns, axis=1)
        return StepResult(plan.step_id, drew, tokens, self._logprobs(flight, drew, len(columns)))

    def _undo(self, flight: _InFlight, taken: int) -> None:
        """Forget the steps dispatched after the first `taken`."""
        extra = len(flight.steps) - taken
        if not extra:
            return
        self._last_tokens, lengths = flight.steps[taken - 1].after
        self._rows.grow(flight.plan.decode_rows, -extra)
        self._batches.of(flight.plan.decode_rows).lengths = lengths
        del flight.steps[taken:]

    def _logprobs(self, flight: _InFlight, rows: Int32, steps: int) -> LogprobArrays | None:
        """Log-probabilities of everything drawn, if any row asked; zeros for rows without."""
        if not self._rows.wants_logprobs(rows):
            return None
        best = self._limits.max_logprobs
        chosen = np.zeros((rows.size, steps), np.float32)
        top_ids = np.zeros((rows.size, steps, best), np.int32)
        top = np.zeros((rows.size, steps, best), np.float32)
        first = 0
        groups = [flight.steps, *([part] for part in flight.prefills)]
        for group in groups:
            for step, part in enumerate(group):
                if part.logprobs:
                    found = [np.asarray(array)[: part.count] for array in part.logprobs]
                    place = slice(first, first + part.count)
                    chosen[place, step], top_ids[place, step], top[place, step] = found
            first += group[0].count if group else 0
        return LogprobArrays(chosen, top_ids, top)

    def _put(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> jax.Array:
        """Copy to every device of the mesh. The array must not be written afterwards."""
        placed: jax.Array = jax.device_put(array, self._everywhere)
        return placed


def _layer_offsets(model: LoadedModel, unit: int) -> list[Int32]:
    """Slots of a block before those of each layer of a unit, int32 scalars."""
    heads, layers = model.heads.kv_per_device, model.config.unit_layers
    first = unit * layers
    return [np.array(layer * heads, np.int32) for layer in range(first, first + layers)]


def _tokens(part: _Sampled) -> Int32:
    """Wait for the tokens of one head call, int32 [count]."""
    return np.asarray(part.tokens)[: part.count]
