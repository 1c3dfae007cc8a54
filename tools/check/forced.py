"""Runs an executor on given texts and keeps the log-probabilities of every next token.

Texts are forced: each step draws under a mask that allows the text's next token only. So two
executors see the same context at every position, however their logits differ.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.engine.executor import Executor
from serving.engine.plan import (
    NO_TABLE_UPDATE,
    Float32,
    Int32,
    LogprobArrays,
    PrefillChunk,
    RowAssignment,
    StepPlan,
    TableUpdate,
    UInt32,
)
from serving.engine.request import SamplingParams
from serving.errors import ExecutorError

BEST = 20
"""Alternatives kept per position."""

_SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=BEST)


@dataclass(frozen=True, slots=True)
class Texts:
    """What rows are forced to say: row r has prompt_lengths[r] tokens, then `more` further ones.

    tokens: int32 [rows, longest prompt + more], what lies past a row's end is not looked at.
    """

    tokens: Int32
    prompt_lengths: tuple[int, ...]
    more: int

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.prompt_lengths)

    def generated(self, row: int, index: int) -> int:
        """Token `index` after the prompt."""
        return int(self.tokens[row, self.prompt_lengths[row] + index])


def random_texts(rows: int, shortest: int, longest: int, more: int, vocab_size: int) -> Texts:
    """Prompts of mixed lengths, log-uniform from shortest to longest; row 0 has the longest."""
    random = np.random.default_rng(7)
    spread = np.exp(random.uniform(np.log(shortest), np.log(longest), rows))
    lengths = tuple(np.clip(spread.astype(int), shortest, longest).tolist())
    tokens = random.integers(0, vocab_size, (rows, longest + more + 1), np.int32)
    return Texts(tokens, (longest, *lengths[1:]), more)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the model's own distribution at n positions: of the token forced there, float32 [n], and
    of the best ones, int32 and float32 [n, BEST], best first."""

    chosen: Float32
    best_ids: Int32
    best: Float32


class ForcedRun:
    """One executor taking texts through prompt and decode steps; rows keep what they have read.

    chunk_tokens: of a prompt in one call at most. seed: of the order in which blocks are handed
    out, which are scattered over the arena. Raises ExecutorError if the executor fails, or draws
    what it was forbidden to.
    """

    def __init__(self, executor: Executor, texts: Texts, chunk_tokens: int, seed: int = 0) -> None:
        self._executor = executor
        self._limits = executor.limits
        self._texts = texts
        self._chunk_tokens = min(chunk_tokens, self._limits.max_prefill_tokens)
        self._step_id = 0
        self._done = np.zeros(texts.rows, np.int32)  # generated tokens each row has been given
        size = self._limits.block_size
        counts = [-(-(length + texts.more + 1) // size) for length in texts.prompt_lengths]
        if sum(counts) > self._limits.num_blocks:
            raise ExecutorError(
                f"The texts need {sum(counts)} blocks; there are {self._limits.num_blocks}."
            )
        order = np.random.default_rng(seed).permutation(self._limits.num_blocks)
        ends = np.cumsum(counts)
        self._blocks = np.split(order[: ends[-1]].astype(np.int32), ends[:-1])

    def prefill(self) -> Logprobs:
        """Run all prompts, several in a call; what follows each, in the order of rows."""
        found: dict[int, Logprobs] = {}
        for chunks in self._packed():
            first = [chunk.row for chunk in chunks if chunk.start == 0]
            ending = [chunk.row for chunk in chunks if chunk.samples]
            result = self._run(
                ending,
                prefills=tuple(chunks),
                assignments=tuple(RowAssignment(row, 0, _SAMPLING, ()) for row in first),
                table=self._table(first),
            )
            found.update((row, _taken(result, index)) for index, row in enumerate(ending))
        return joined([found[row] for row in range(self._texts.rows)])

    def decode(self, rows: int) -> Logprobs:
        """One step of the first so many rows."""
        every: Int32 = np.arange(rows, dtype=np.int32)
        result = self._run(every.tolist(), decode_rows=every)
        return _taken(result, slice(0, rows))

    def mixed(self, decoding: Sequence[int], prompts: Sequence[int], tokens: int) -> Logprobs:
        """One step in which rows decode and other rows' prompts end, in this order.

        decoding: ascending. prompts: rows whose prompts have run; of each the end runs once more,
        of all together at most so many tokens, and the row is put back behind it.
        """
        each = tokens // len(prompts)
        chunks = []
        for row in prompts:
            length = self._texts.prompt_lengths[row]
            start = max(length - each, 0)
            chunks.append(PrefillChunk(row, start, self._texts.tokens[row, start:length], True))
        self._done[list(prompts)] = 0
        result = self._run(
            [*decoding, *prompts],
            decode_rows=np.array(decoding, np.int32),
            prefills=tuple(chunks),
            assignments=tuple(
                RowAssignment(chunk.row, chunk.start, _SAMPLING, ()) for chunk in chunks
            ),
        )
        return _taken(result, slice(0, len(decoding) + len(prompts)))

    def given(self, rows: int) -> Int32:
        """Tokens behind the prompt that the first so many rows have been given: int32 [rows]."""
        return self._done[:rows].copy()

    def go_back(self, rows: int) -> None:
        """Put the first so many rows back behind the first token that followed their prompts.

        That token is run as a prompt's chunk, so that it is the input of the next decode step.
        """
        lengths = self._texts.prompt_lengths
        for first in range(0, rows, self._limits.max_prefills):
            some = range(first, min(first + self._limits.max_prefills, rows))
            self._done[some.start : some.stop] = 1
            self._run(
                some,
                prefills=tuple(
                    PrefillChunk(
                        row, lengths[row], self._texts.tokens[row, lengths[row] :][:1], samples=True
                    )
                    for row in some
                ),
                assignments=tuple(RowAssignment(row, lengths[row], _SAMPLING, ()) for row in some),
            )

    def _run(self, drawing: Sequence[int], **fields: Any) -> LogprobArrays | None:
        """A plan in which these rows draw, in this order; moves them on by the token they draw."""
        wanted = [self._texts.generated(row, int(self._done[row])) for row in drawing]
        masks = {
            row: _only(token, self._limits.vocab_size)
            for row, token in zip(drawing, wanted, strict=True)
        }
        self._step_id += 1
        plan = dataclasses.replace(StepPlan(self._step_id, masks=masks), **fields)
        self._executor.submit(plan)
        result = self._executor.collect()
        if result.error is not None:
            raise ExecutorError(result.error)
        if result.tokens.reshape(-1).tolist() != wanted:
            raise ExecutorError("A masked step drew a token that its mask forbids.")
        self._done[list(drawing)] += 1
        return result.logprobs

    def _packed(self) -> Iterator[list[PrefillChunk]]:
        """Chunks of all prompts in order, as many in a plan as one call takes."""
        plan: list[PrefillChunk] = []
        room = self._limits.max_prefill_tokens
        for row, length in enumerate(self._texts.prompt_lengths):
            start = 0
            while start < length:
                count = min(length - start, self._chunk_tokens, room)
                tokens = self._texts.tokens[row, start : start + count]
                plan.append(PrefillChunk(row, start, tokens, start + count == length))
                start += count
                room -= count
                # A row's next chunk waits for the next plan, as in the engine.
                if start < length or not room or len(plan) == self._limits.max_prefills:
                    yield plan
                    plan, room = [], self._limits.max_prefill_tokens
        if plan:
            yield plan

    def _table(self, rows: Sequence[int]) -> TableUpdate:
        if not rows:
            return NO_TABLE_UPDATE
        blocks = [self._blocks[row] for row in rows]
        return TableUpdate(
            np.repeat(rows, [len(mine) for mine in blocks]).astype(np.int32),
            np.concatenate([np.arange(len(mine), dtype=np.int32) for mine in blocks]),
            np.concatenate(blocks) * np.int32(self._limits.slots_per_block),
        )


def joined(parts: Sequence[Logprobs]) -> Logprobs:
    """One behind the other."""
    return Logprobs(
        np.concatenate([part.chosen for part in parts]),
        np.concatenate([part.best_ids for part in parts]),
        np.concatenate([part.best for part in parts]),
    )


def _taken(logprobs: LogprobArrays | None, rows: int | slice) -> Logprobs:
    assert logprobs is not None  # every row asked for them
    which = slice(rows, rows + 1) if isinstance(rows, int) else rows
    return Logprobs(
        logprobs.chosen[which, 0],
        logprobs.top_ids[which, 0, :BEST],
        logprobs.top[which, 0, :BEST],
    )


def _only(token: int, vocab_size: int) -> UInt32:
    words: npt.NDArray[np.uint32] = np.zeros(-(-vocab_size // 32), np.uint32)
    words[token // 32] = np.uint32(1) << np.uint32(token % 32)
    return words
