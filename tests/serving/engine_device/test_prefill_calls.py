"""How the chunks of a step are cut into calls: every token once, in order, at little cost."""

import numpy as np
import pytest

from serving.engine.device.prefill_calls import CallSize, most_sequences, pack_chunks
from serving.engine.device.rows import RowState
from serving.engine.plan import PrefillChunk, RowAssignment, StepPlan, TableUpdate
from serving.engine.request import SamplingParams

SIZES = tuple(CallSize(tokens, min(tokens // 16, 16)) for tokens in (128, 256, 512, 1024, 2048))


def chunks_of(counts, cut_off=()) -> list[PrefillChunk]:
    """One chunk per row; those of `cut_off` do not reach the end of their prompts."""
    return [
        PrefillChunk(
            row, 10 * row, np.arange(count, dtype=np.int32) + 1000 * row, row not in cut_off
        )
        for row, count in enumerate(counts)
    ]


def sizes_of(counts, sizes=SIZES) -> list[int]:
    return [call.size.tokens for call in pack_chunks(chunks_of(counts), sizes)]


def check(chunks, sizes, calls) -> None:
    """Calls hold what they can, and the rows' tokens follow each other from call to call."""
    at = {chunk.row: chunk.start for chunk in chunks}
    tokens: dict[int, list[int]] = {chunk.row: [] for chunk in chunks}
    ended = []
    for call in calls:
        assert call.size in sizes
        assert 0 < sum(part.tokens.size for part in call.chunks) <= call.size.tokens
        assert 0 < len(call.chunks) <= call.size.sequences
        samples = [part.samples for part in call.chunks]
        assert samples == sorted(samples, reverse=True)
        for part in call.chunks:
            assert part.start == at[part.row]
            assert part.row not in ended
            at[part.row] += part.tokens.size
            tokens[part.row] += part.tokens.tolist()
            ended += [part.row] * part.samples
        assert call.sampling_rows().tolist() == [p.row for p in call.chunks if p.samples]
    assert ended == [chunk.row for chunk in chunks if chunk.samples]
    assert tokens == {chunk.row: chunk.tokens.tolist() for chunk in chunks}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1], [128]),
        ([128], [128]),
        ([700, 800, 548], [2048]),  # all in one, and full
        ([100, 28], [128]),
        ([200], [256]),  # two of 128 would save nothing
        ([1100], [1024, 128]),  # where 2,048 would be half padding
        ([1000, 100], [1024, 128]),  # cut inside the second
        ([1900], [2048]),
        ([2048, 30], [2048, 128]),
        ([3000, 1096], [2048, 2048]),
        ([8] * 8, [128]),
        ([8] * 16, [256]),  # for its sequences
        ([8] * 32, [256, 256]),
        ([8] * 17, [256, 128]),
    ],
)
def test_calls_of_a_step(counts, expected):
    assert sizes_of(counts) == expected


def test_one_chunk_in_one_call_is_handed_on_as_it_is():
    chunks = chunks_of([100, 28])
    (call,) = pack_chunks(chunks, SIZES)
    assert call.chunks == tuple(chunks)
    assert all(part is chunk for part, chunk in zip(call.chunks, chunks, strict=True))


def test_chunks_that_sample_stand_first_in_the_plans_order():
    (call,) = pack_chunks(chunks_of([5, 6, 7, 8], cut_off=(0, 2)), SIZES)
    assert [part.row for part in call.chunks] == [1, 3, 0, 2]
    assert call.sampling_rows().tolist() == [1, 3]


def test_no_chunks_are_no_calls():
    assert pack_chunks([], SIZES) == []


def test_random_steps():
    rng = np.random.default_rng(5)
    for _ in range(300):
        tokens = np.unique(rng.integers(1, 400, rng.integers(1, 6))).tolist()
        sequences = np.sort(rng.integers(1, 9, len(tokens))).tolist()
        sizes = [CallSize(*pair) for pair in zip(tokens, sequences, strict=True)]
        count = int(rng.integers(1, 20))
        cut_off = set(np.flatnonzero(rng.random(count) < 0.2).tolist())
        chunks = chunks_of(rng.integers(1, 300, count).tolist(), cut_off)
        check(chunks, sizes, pack_chunks(chunks, sizes))


def test_sequences_of_a_call_are_a_batch_the_head_takes():
    assert [most_sequences(c, 16, (1, 2, 4, 8, 16, 32)) for c in (8, 16, 48, 64, 256, 4096)] == [
        1, 1, 4, 4, 16, 16,
    ]  # fmt: skip
    assert most_sequences(4096, 16, (1, 2, 4, 6)) == 6  # no more than rows
    assert most_sequences(4096, 3, (1, 2, 4, 6)) == 4


def test_a_packed_call_is_one_array():
    rows = RowState(5, 3)
    update = TableUpdate(*(np.array(a, np.int32) for a in ([4, 4, 1], [0, 1, 0], [60, 70, 80])))
    starts = tuple(RowAssignment(row, 16, SamplingParams(), ()) for row in (1, 4))
    rows.apply(StepPlan(1, assignments=starts, table=update))
    chunks = [
        PrefillChunk(4, 16, np.array([7, 8, 9], np.int32), False),
        PrefillChunk(1, 16, np.array([5, 6], np.int32), True),
    ]
    (call,) = pack_chunks(chunks, [CallSize(8, 4)])
    packed = rows.pack_call(call)
    assert packed.dtype == np.int32
    tokens, tables, starts, counts, samples = np.split(packed, [8, 8 + 4 * 3, 24, 28])
    assert tokens.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert tables.reshape(4, 3).tolist() == [[80, 0, 0], [60, 70, 0], [0] * 3, [0] * 3]
    assert starts.tolist() == [16, 16, 0, 0]
    assert counts.tolist() == [2, 3, 0, 0]
    assert samples.tolist() == [1, 5, 5, 5]
    assert rows.next_lengths(np.array([1, 4, 0, 5], np.int32)).tolist() == [19, 20, 1, 0]
