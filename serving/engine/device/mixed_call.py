"""A mixed call: decode rows and prompt chunks of a step in one pass over the weights.

What it takes travels as one array. Its tokens are those of the decode rows, padded, and behind them
a flat stream of chunks, one sequence behind the other.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from serving.engine.executor import MixedSize
from serving.engine.plan import StepPlan


class MixedArrays(NamedTuple):
    """The parts of a packed mixed call: views of it, all int32. Of r rows and s sequences.

    tokens [prompt tokens]: of the chunks. tables [r + s, t]: of the decode rows, then of the
    sequences. starts, counts [s]: of the sequences; 0 for padding. rows, lengths [r]: of the decode
    rows, as decode programs take them. places, drawn_rows, drawn_lengths [r]: of what is sampled,
    the call's token that it follows, its row, and the row's tokens up to there; padding is that of
    rows and lengths.
    """

    tokens: Any
    tables: Any
    starts: Any
    counts: Any
    rows: Any
    lengths: Any
    places: Any
    drawn_rows: Any
    drawn_lengths: Any


def mixed_arrays(packed: Any, size: MixedSize, columns: int) -> MixedArrays:
    """Take a packed call apart, of NumPy or JAX; columns: of a row's table."""
    parts = []
    end = 0
    for shape in _shapes(size, columns):
        begin, end = end, end + math.prod(shape)
        parts.append(packed[begin:end].reshape(shape))
    return MixedArrays(*parts)


def mixed_length(size: MixedSize, columns: int) -> int:
    """Numbers of a packed call."""
    return sum(math.prod(shape) for shape in _shapes(size, columns))


def mixed_size_of(plan: StepPlan, sizes: Sequence[MixedSize]) -> MixedSize | None:
    """The smallest size that runs all of a plan in one call; None if it takes several.

    sizes: ascending. A plan with nothing to decode, or no chunks, needs no mixed call.
    """
    if not sizes or not plan.prefills or not plan.decode_rows.size:
        return None
    drawing = plan.decode_rows.size + sum(chunk.samples for chunk in plan.prefills)
    tokens = sum(chunk.tokens.size for chunk in plan.prefills)
    for size in sizes:
        if (
            drawing <= size.rows
            and tokens <= size.prompt_tokens
            and len(plan.prefills) <= size.sequences
        ):
            return size
    return None


def _shapes(size: MixedSize, columns: int) -> tuple[tuple[int, ...], ...]:
    rows, sequences = size.rows, size.sequences
    tables = (rows + sequences, columns)
    return ((size.prompt_tokens,), tables, (sequences,), (sequences,), *((rows,),) * 5)
