"""What runs on the devices of a replica: passes over its weights, and the state they leave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lumen_kernels.paged_attention.options import Arena
from lumen_kernels.reduce_norm.mailbox import addresses, mailboxes

from lumen.model import LoadedModel
from serving.engine.device.compilation import Compiled
from serving.engine.device.decode_batch import DecodeBatch, DecodeBatches
from serving.engine.device.head_programs import HeadKind, draw_size_of
from serving.engine.device.prefill_calls import CallSize, PrefillCall, most_sequences
from serving.engine.device.program_shapes import Place
from serving.engine.device.programs import Programs
from serving.engine.device.rows import RowState, mask_array
from serving.engine.device.step_attention import LastTokens
from serving.engine.executor import ExecutorLimits, MixedSize
from serving.engine.plan import NO_ROWS, Int32, StepPlan

Masks = dict[int, np.ndarray[tuple[int, ...], np.dtype[np.uint32]]]
"""Of rows, the tokens they may draw: one bit each."""


@dataclass(slots=True)
class Sampled:
    """What a head program, or a draw, found for `count` rows, on its way to the host.

    after: (last tokens, lengths) on the device once this was drawn, to return to.
    """

    count: int
    tokens: jax.Array
    logprobs: tuple[jax.Array, ...]
    after: tuple[jax.Array, jax.Array]

    def on_host(self) -> Int32:
        """Wait for the tokens, int32 [count]."""
        return np.asarray(self.tokens)[: self.count]


class DevicePasses:
    """Runs passes: all return at once, results follow on the devices.

    model, programs: as they were built. arena: donated from pass to pass. last_tokens: int32
    [num_rows], the token last drawn for each row, the input of its next step. rows: what the host
    knows of each row. call_sizes: of prefill calls, ascending.
    """

    def __init__(
        self, model: LoadedModel, programs: Programs, limits: ExecutorLimits, arena: Arena
    ) -> None:
        self.model = model
        self.programs = programs
        self.arena = arena
        self.rows = RowState(limits.num_rows, limits.max_blocks_per_row)
        self._limits = limits
        self._everywhere = NamedSharding(model.mesh, PartitionSpec())
        self.last_tokens = self._put(np.zeros(limits.num_rows, np.int32))
        mail: tuple[jax.Array, ...] = ()
        if programs.mailboxes is not None:
            self._mailboxes = mailboxes(programs.mailboxes, model.mesh)  # kept: kernels store there
            mail = (addresses(programs.mailboxes, self._mailboxes),)
        self._places = [
            Place(tuple(self._put(offset) for offset in _layer_offsets(model, unit)), mail)
            for unit in range(len(model.units))
        ]
        self._decode_buckets = sorted(programs.decode_unit)
        self.call_sizes = [
            CallSize(tokens, most_sequences(tokens, limits.max_prefills, self._decode_buckets))
            for tokens in sorted(programs.prefill_unit)
        ]
        self._draw_sizes = sorted({size for size, _ in programs.draw})
        self._no_masks = {
            size: self._put(mask_array(NO_ROWS, size, {}, limits.vocab_size))
            for size in self._draw_sizes
        }
        self._batches = DecodeBatches(self.rows, self._decode_buckets, self._put)

    def rehearse(self) -> None:
        """See `DeviceExecutor.rehearse`.

        Several devices wait for each program: while one is given new kernels, no other may be in a
        kernel that waits for it, as loading may wait for what runs.
        """
        programs = self.programs
        if self.model.mesh.size > 1:
            self.programs = programs.awaited()
        try:
            self._rehearse()
        finally:
            self.programs = programs

    def _rehearse(self) -> None:
        padding = self.rows.padding
        done: list[jax.Array] = []
        for bucket in self._decode_buckets:
            batch = self._batches.of(np.full(bucket, padding, np.int32))
            hidden = self._run_decode(batch)
            # Each draw once, by the batch of its own size; logits of every size need one.
            kinds = HeadKind if bucket in self._draw_sizes else (HeadKind.GREEDY, HeadKind.SAMPLED)
            done += (self._sample_batch(kind, batch, hidden, {}).tokens for kind in kinds)
        for size in self.call_sizes:
            done += self._run_prefill(PrefillCall(size, ()))
        for mixed in self._limits.mixed_sizes:
            done += self._run_mixed(mixed, StepPlan(0))
        self._batches.forget()
        jax.block_until_ready((done, self.arena))

    def decode(self, rows: Int32, masks: Masks) -> Sampled:
        """One decode step of these rows, which grow by it."""
        batch = self._batches.of(rows)
        hidden = self._run_decode(batch)
        sampled = self._sample_batch(
            HeadKind.COMPLETE if masks else batch.kind, batch, hidden, masks
        )
        batch.lengths = sampled.after[1]
        self.rows.grow(batch.rows, 1)
        return sampled

    def forget(self, rows: Int32, steps: int, after: tuple[jax.Array, jax.Array]) -> None:
        """Take back the last `steps` decode steps of these rows; after: what to return to."""
        self.last_tokens, lengths = after
        self.rows.grow(rows, -steps)
        self._batches.of(rows).lengths = lengths

    def prefill(self, call: PrefillCall, masks: Masks) -> Sampled | jax.Array:
        """Chunks of one or more prompts, and the tokens that follow those that sample.

        masks: of any rows. Where none samples, something to wait for.
        """
        hidden, drawn, lengths = self._run_prefill(call)
        rows = call.sampling_rows()
        if not rows.size:
            return hidden
        mine = {row: masks[row] for row in rows.tolist() if row in masks}
        return self._sample_rows(rows, call.size.sequences, hidden, drawn, lengths, mine)

    def mixed(self, size: MixedSize, plan: StepPlan) -> Sampled:
        """All of a plan in one call: its decode rows and then those whose prompts end."""
        hidden, drawn, lengths = self._run_mixed(size, plan)
        rows = plan.drawing_rows()
        return self._sample_rows(rows, size.rows, hidden, drawn, lengths, dict(plan.masks))

    def _run_decode(self, batch: DecodeBatch) -> jax.Array:
        """The hidden states of a batch's next tokens."""
        programs = self.programs
        hidden: jax.Array
        hidden, step, schedule = programs.decode_embed[batch.bucket](
            self.model.embedding, self.last_tokens, batch.device_rows, batch.tables, batch.lengths
        )
        unit = programs.decode_unit[batch.bucket]
        for weights, place in zip(self.model.units, self._places, strict=True):
            hidden, self.arena = unit(
                weights, hidden, self.arena, batch.tables, batch.lengths, step, schedule, place
            )
        return hidden

    def _run_prefill(self, call: PrefillCall) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What head takes of a call: the hidden states of its sequences' ends, rows and lengths."""
        programs, tokens = self.programs, call.size.tokens
        packed = self._put(self.rows.pack_call(call))
        hidden, *context, last, rows = programs.prefill_embed[tokens](self.model.embedding, packed)
        units = programs.prefill_unit[tokens], programs.prefill_last[tokens]
        hidden = self._run_units(*units, hidden, (packed, *context), last)
        return hidden, rows, last.lengths

    def _run_mixed(self, size: MixedSize, plan: StepPlan) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What head takes: the hidden states that something is sampled behind, rows and lengths."""
        programs = self.programs
        packed = self._put(self.rows.pack_mixed(size, plan))
        hidden, *context, last, rows = programs.mixed_embed[size](
            self.model.embedding, self.last_tokens, packed
        )
        units = programs.mixed_unit[size], programs.mixed_last[size]
        hidden = self._run_units(*units, hidden, context, last)
        return hidden, rows, last.lengths

    def _run_units(
        self,
        unit: Compiled,
        last_unit: Compiled,
        hidden: jax.Array,
        context: Sequence[Any],
        last: LastTokens,
    ) -> jax.Array:
        """All layers of a call with prompt tokens: the hidden states of its last tokens."""
        *front, final = zip(self.model.units, self._places, strict=True)
        for weights, place in front:
            hidden, self.arena = unit(weights, hidden, self.arena, *context, place)
        weights, place = final
        hidden, self.arena = last_unit(weights, hidden, self.arena, *context, place, last)
        return hidden

    def _sample_batch(
        self, kind: HeadKind, batch: DecodeBatch, hidden: jax.Array, masks: Masks
    ) -> Sampled:
        return self._sample(
            kind, batch.rows, batch.bucket, hidden, batch.device_rows, batch.lengths,
            batch.sampling, masks,
        )  # fmt: skip

    def _sample_rows(
        self,
        rows: Int32,
        bucket: int,
        hidden: jax.Array,
        device_rows: jax.Array,
        lengths: jax.Array,
        masks: Masks,
    ) -> Sampled:
        padded: Int32 = np.full(bucket, self.rows.padding, np.int32)
        padded[: rows.size] = rows
        kind = self.rows.head_kind(rows, masked=bool(masks))
        sampling = self._put(self.rows.sampling(padded))
        return self._sample(kind, rows, bucket, hidden, device_rows, lengths, sampling, masks)

    def _sample(
        self,
        kind: HeadKind,
        rows: Int32,
        bucket: int,
        hidden: jax.Array,
        device_rows: jax.Array,
        lengths: jax.Array,
        sampling: jax.Array,
        masks: Masks,
    ) -> Sampled:
        programs, weights = self.programs, self.model.head
        logprobs: list[jax.Array] = []
        if kind is HeadKind.GREEDY:
            tokens, self.last_tokens, lengths = programs.head[bucket](
                weights, hidden, self.last_tokens, device_rows, lengths
            )
        else:
            size = draw_size_of(self._draw_sizes, bucket)
            logits, drawn, lengths = programs.logits[bucket](
                weights, hidden, device_rows, lengths, sampling
            )
            more: tuple[jax.Array, ...] = ()
            if kind is HeadKind.COMPLETE:
                vocab_size = self._limits.vocab_size
                more = (
                    self._put(mask_array(rows, size, masks, vocab_size))
                    if masks
                    else self._no_masks[size],
                )
            tokens, self.last_tokens, *logprobs = programs.draw[size, kind](
                logits, drawn, self.last_tokens, *more
            )
        for array in (tokens, *logprobs):
            array.copy_to_host_async()
        return Sampled(rows.size, tokens, tuple(logprobs), (self.last_tokens, lengths))

    def _put(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> jax.Array:
        """Copy to every device of the mesh. The array must not be written afterwards."""
        placed: jax.Array = jax.device_put(array, self._everywhere)
        return placed


def _layer_offsets(model: LoadedModel, unit: int) -> list[Int32]:
    """Slots of a block before those of each layer of a unit, int32 scalars."""
    heads, layers = model.heads.kv_per_device, model.config.unit_layers
    first = unit * layers
    return [np.array(layer * heads, np.int32) for layer in range(first, first + layers)]
