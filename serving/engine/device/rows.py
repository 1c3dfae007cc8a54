"""Persistent host state of the batch rows, changed by plans, copied out for the device."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from serving.engine.device.head_programs import HeadKind
from serving.engine.device.mixed_call import mixed_arrays, mixed_length
from serving.engine.device.prefill_calls import PrefillCall
from serving.engine.device.program_shapes import SAMPLING_FIELDS, SEQUENCE_FIELDS
from serving.engine.executor import MixedSize
from serving.engine.plan import Int32, PrefillChunk, StepPlan


class RowState:
    """What the executor knows of each row: table, KV length, sampling parameters, stop tokens.

    Everything handed out is a fresh copy: JAX on CPU may go on reading an array it was given, so
    what a dispatched step reads is never written again. The `*_version` numbers change with the
    state they are named for; whoever keeps a copy compares them.
    """

    def __init__(self, num_rows: int, table_columns: int) -> None:
        # One row more than there are: the padding row, always empty.
        self.padding = num_rows
        self._tables: Int32 = np.zeros((num_rows + 1, table_columns), np.int32)
        self._kv_len: Int32 = np.zeros(num_rows + 1, np.int32)
        self._sampling: Int32 = np.zeros((num_rows + 1, SAMPLING_FIELDS), np.int32)
        self._draws: npt.NDArray[np.bool_] = np.zeros(num_rows + 1, np.bool_)
        self._truncates: npt.NDArray[np.bool_] = np.zeros(num_rows + 1, np.bool_)
        self._wants_logprobs: npt.NDArray[np.bool_] = np.zeros(num_rows + 1, np.bool_)
        self._stops: list[frozenset[int]] = [frozenset()] * (num_rows + 1)
        self.tables_version = 0
        self.lengths_version = 0
        self.sampling_version = 0

    def apply(self, plan: StepPlan) -> None:
        """Take over the plan's assignments and table entries."""
        for assignment in plan.assignments:
            row, sampling = assignment.row, assignment.sampling
            self._kv_len[row] = assignment.kv_len
            self._stops[row] = frozenset(assignment.stop_token_ids)
            self._draws[row] = sampling.temperature > 0
            self._truncates[row] = self._draws[row] and (
                sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
            )
            self._wants_logprobs[row] = sampling.logprobs is not None
            floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32)
            bits = floats.view(np.int32)
            seed = np.array(sampling.seed, np.uint32).view(np.int32)
            self._sampling[row] = (bits[0], sampling.top_k, bits[1], bits[2], seed)
        if plan.assignments:
            self.lengths_version += 1
            self.sampling_version += 1
        update = plan.table
        if update.rows.size:
            self._tables[update.rows, update.columns] = update.slot_bases
            self.tables_version += 1

    def grow(self, rows: Int32, count: int) -> None:
        """Decode rows got `count` more tokens (fewer if negative)."""
        self._kv_len[rows] += count

    def pack_call(self, call: PrefillCall) -> Int32:
        """The call as one array, as `ProgramShapes.prefill_call` says; the rows grow by it.

        The row is given for sequences that sample, else it is that of padding.
        """
        tokens, sequences = call.size.tokens, call.size.sequences
        columns = self._tables.shape[1]
        packed = np.zeros(tokens + sequences * (columns + SEQUENCE_FIELDS), np.int32)
        tables = packed[tokens : tokens + sequences * columns].reshape(sequences, columns)
        starts, counts, sampling = packed[tokens + tables.size :].reshape(SEQUENCE_FIELDS, -1)
        self._pack_chunks(call.chunks, packed, tables, starts, counts)
        drawn = call.sampling_rows()  # the first sequences
        sampling[:] = self.padding
        sampling[: drawn.size] = drawn
        return packed

    def pack_mixed(self, size: MixedSize, plan: StepPlan) -> Int32:
        """The plan as one mixed call, as `mixed_arrays` takes it apart; the rows grow by it."""
        columns = self._tables.shape[1]
        packed = np.zeros(mixed_length(size, columns), np.int32)
        call = mixed_arrays(packed, size, columns)
        decoding, drawing = plan.decode_rows, plan.drawing_rows()
        self.grow(decoding, 1)
        call.rows[:] = call.drawn_rows[:] = self.padding
        call.rows[: decoding.size] = decoding
        call.lengths[: decoding.size] = self._kv_len[decoding]
        call.tables[: decoding.size] = self._tables[decoding]
        call.places[: decoding.size] = np.arange(decoding.size)
        tables, drawn = call.tables[size.rows :], drawing.size
        ends = self._pack_chunks(plan.prefills, call.tokens, tables, call.starts, call.counts)
        call.places[decoding.size : drawn] = [
            size.rows + end - 1
            for chunk, end in zip(plan.prefills, ends, strict=True)
            if chunk.samples
        ]
        call.drawn_rows[:drawn] = drawing
        call.drawn_lengths[:drawn] = self._kv_len[drawing]
        return packed

    def _pack_chunks(
        self,
        chunks: Sequence[PrefillChunk],
        tokens: Int32,
        tables: Int32,
        starts: Int32,
        counts: Int32,
    ) -> list[int]:
        """Write chunks into a call, one behind the other; where each ends. Rows grow by them."""
        ends = []
        end = 0
        for index, chunk in enumerate(chunks):
            begin, end = end, end + chunk.tokens.size
            tokens[begin:end] = chunk.tokens
            tables[index] = self._tables[chunk.row]
            starts[index], counts[index] = chunk.start, chunk.tokens.size
            self._kv_len[chunk.row] = chunk.start + chunk.tokens.size
            ends.append(end)
        self.lengths_version += 1
        return ends

    def tables(self, padded_rows: Int32) -> Int32:
        """Block tables, int32 [rows, columns]."""
        return self._tables[padded_rows]

    def next_lengths(self, padded_rows: Int32) -> Int32:
        """Tokens including the one to be decoded, int32 [rows]; 0 for padding."""
        return np.where(padded_rows == self.padding, 0, self._kv_len[padded_rows] + 1)

    def sampling(self, padded_rows: Int32) -> Int32:
        """Packed sampling parameters, int32 [5, rows]."""
        return np.ascontiguousarray(self._sampling[padded_rows].T)

    def head_kind(self, rows: Int32, masked: bool) -> HeadKind:
        """The cheapest head program that serves these rows."""
        if masked or self._wants_logprobs[rows].any():
            return HeadKind.COMPLETE
        if self._truncates[rows].any():
            return HeadKind.TRUNCATED
        return HeadKind.SAMPLED if self._draws[rows].any() else HeadKind.GREEDY

    def wants_logprobs(self, rows: Int32) -> bool:
        """Whether any of the rows asked for log-probabilities."""
        return bool(self._wants_logprobs[rows].any())

    def any_stops(self, rows: Int32, tokens: Int32) -> bool:
        """Whether any row drew one of its stop tokens; both int32 [n]."""
        return any(
            token in self._stops[row]
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        )


def mask_array(
    rows: Int32, bucket: int, masks: dict[int, npt.NDArray[np.uint32]], vocab_size: int
) -> npt.NDArray[np.uint32]:
    """Masks of a batch, uint32 [bucket, words]; rows without one may draw any token."""
    words = -(-vocab_size // 32)
    packed = np.full((bucket, words), np.iinfo(np.uint32).max, np.uint32)
    for index, row in enumerate(rows.tolist()):
        if row in masks:
            packed[index] = masks[row]
    return packed
