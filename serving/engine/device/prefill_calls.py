"""Packs the prompt chunks of a step into few calls of the prefill programs.

A call takes a flat stream of tokens, one sequence behind the other, padded to a size that programs
were compiled for. Each further call costs, and so does padding: a stream is cut where the two
together cost least, inside a chunk too, because the calls of a step run one after another.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from serving.engine.plan import Int32, PrefillChunk

_CALL_TOKENS = 90
"""What a call costs beside its tokens, in tokens: of an 8B model on an H200, calls of 1,024 tokens
and more run at 41 k tokens/s and those of 256 at 33 k, that is 2 ms per call."""

_TOKENS_PER_SEQUENCE = 16
"""A call has room for a sequence per so many of its tokens: each costs a part of a tile in
attention, and one more row of the head."""


@dataclass(frozen=True, slots=True)
class CallSize:
    """What one call takes at most: tokens, and sequences that they belong to."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """Chunks that run together. Those that sample stand first, in the plan's order."""

    size: CallSize
    chunks: tuple[PrefillChunk, ...]

    def sampling_rows(self) -> Int32:
        """Rows whose next token is sampled, int32 [n]: those of the first n sequences."""
        return np.array([chunk.row for chunk in self.chunks if chunk.samples], np.int32)


def most_sequences(tokens: int, max_prefills: int, batch_sizes: Sequence[int]) -> int:
    """Sequences of a call of so many tokens: one of the ascending batch sizes the head has."""
    wanted = min(max_prefills, max(tokens // _TOKENS_PER_SEQUENCE, 1))
    return batch_sizes[min(bisect_left(batch_sizes, wanted), len(batch_sizes) - 1)]


def pack_chunks(chunks: Sequence[PrefillChunk], sizes: Sequence[CallSize]) -> list[PrefillCall]:
    """Calls that run all chunks, in order.

    sizes: ascending in tokens, and not descending in sequences. A chunk may be cut in two or more;
    then only the last part samples.
    """
    if not chunks:
        return []
    ends = list(accumulate(chunk.tokens.size for chunk in chunks))
    calls = []
    begin = 0
    for end, size in _cheapest_cuts(ends, sizes, begin)[1]:
        first, last = bisect_right(ends, begin), bisect_left(ends, end)
        parts = [_part(chunks[index], ends[index], begin, end) for index in range(first, last + 1)]
        parts.sort(key=lambda part: not part.samples)
        calls.append(PrefillCall(size, tuple(parts)))
        begin = end
    return calls


_Cuts = tuple[tuple[int, CallSize], ...]
"""Where calls end in the stream, and their sizes."""


def _cheapest_cuts(ends: list[int], sizes: Sequence[CallSize], begin: int) -> tuple[int, _Cuts]:
    """The cost of all from token `begin` on, in tokens, and where to cut it.

    Either one call takes it all, or the call that takes most goes first. ends: of the chunks.
    """
    first = bisect_right(ends, begin)
    longest = begin
    whole = part = None
    for size in sizes:
        last = min(first + size.sequences, len(ends)) - 1
        end = min(begin + size.tokens, ends[last])
        if end == ends[-1]:
            whole = size
            break
        if end > longest:
            longest, part = end, size
    in_one = (whole.tokens + _CALL_TOKENS, ((ends[-1], whole),)) if whole else None
    if part is None or (whole and whole.tokens <= part.tokens + _CALL_TOKENS):
        assert in_one is not None
        return in_one
    cost, cuts = _cheapest_cuts(ends, sizes, longest)
    cost += part.tokens + _CALL_TOKENS
    if in_one is not None and in_one[0] <= cost:
        return in_one
    return cost, ((longest, part), *cuts)


def _part(chunk: PrefillChunk, chunk_end: int, begin: int, end: int) -> PrefillChunk:
    """What of a chunk, which ends at `chunk_end` of the stream, lies in begin .. end."""
    chunk_begin = chunk_end - chunk.tokens.size
    if begin <= chunk_begin and chunk_end <= end:
        return chunk
    skipped, kept = max(begin - chunk_begin, 0), min(end, chunk_end) - chunk_begin
    return PrefillChunk(
        chunk.row,
        chunk.start + skipped,
        chunk.tokens[skipped:kept],
        chunk.samples and chunk_end <= end,
    )
