"""The programs that turn hidden states into tokens, described for a `ProgramBuilder` to lower.

Most batches are greedy: their head is one program per batch size. Whatever draws takes two, the
logits and the draw. Programs that draw take long to compile and are the same for all models, so
there are few of them: a draw is of as many rows as the next larger size it was compiled for, and
logits come padded to that. On an H200, a draw with top-p takes 0.3, 0.7, 1.2, 1.9 and 3.5 ms for 8,
64, 128, 256 and 512 rows, one without a seventh of that: padding costs up to 5 % of a step.
"""

import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from lumen_kernels.target import Target

from lumen.sampling import SamplingArrays, sample, sample_greedy, token_logprobs
from serving.engine.device.mixed_programs import Description
from serving.engine.device.program_shapes import SAMPLING_FIELDS, WHOLE, ProgramShapes

_DRAWN_FIELDS = 2 + SAMPLING_FIELDS
"""Rows of what a draw knows of its rows: number, length, packed sampling parameters."""

_SMALLEST_DRAW = 8
_SMALL_DRAW = 32
"""Up to so many rows a draw is launches more than work, and sizes are farther apart."""


class HeadKind(enum.Enum):
    """What is computed from hidden states. Each does all that those before it do."""

    GREEDY = "greedy"
    SAMPLED = "sampled"  # temperature; top-k, top-p and min-p are not looked at
    TRUNCATED = "truncated"
    COMPLETE = "complete"  # masks and log-probabilities too


DRAWN_KINDS = (HeadKind.SAMPLED, HeadKind.TRUNCATED, HeadKind.COMPLETE)
"""Kinds that take a program for the logits and one for the draw."""


def draw_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes that draws are compiled for, ascending: of those given, also ascending, few that
    are at least twice as large each as the one before."""
    chosen = [batch_sizes[-1]]
    for size in reversed(batch_sizes):
        if chosen[-1] <= _SMALLEST_DRAW:
            break
        if size * (4 if chosen[-1] <= _SMALL_DRAW else 2) <= chosen[-1]:
            chosen.append(size)
    return tuple(reversed(chosen))


def draw_size_of(sizes: Sequence[int], rows: int) -> int:
    """The smallest of the `draw_sizes` that holds so many rows."""
    return next(size for size in sizes if size >= rows)


class HeadPrograms:
    """Describes the head programs of a replica: `serving.engine.device.programs.Programs`."""

    def __init__(self, shapes: ProgramShapes, target: Target, axis: str | None) -> None:
        self._shapes = shapes
        self._target = target
        self._axis = axis

    def head(self, rows: int) -> Description:
        """The best token of each row."""
        shapes = self._shapes

        def head(
            weights: Sequence[jax.Array],
            hidden: jax.Array,
            last_tokens: jax.Array,
            rows: jax.Array,
            lengths: jax.Array,
        ) -> tuple[jax.Array, ...]:
            tokens = sample_greedy(self._logits(weights, hidden))
            return tokens, _noted(last_tokens, rows, tokens), _next(lengths)

        return Description(
            head,
            (
                shapes.weights(shapes.defs.head), shapes.hidden(rows),
                shapes.int32(shapes.num_rows), shapes.int32(rows), shapes.int32(rows),
            ),
            (WHOLE,) * 3,
        )  # fmt: skip

    def logits(self, rows: int, draw_size: int) -> Description:
        """What `draw` of `draw_size` rows takes, of so many rows and padding."""
        shapes = self._shapes
        missing = np.zeros((_DRAWN_FIELDS, draw_size - rows), np.int32)
        missing[0] = shapes.num_rows

        def logits(
            weights: Sequence[jax.Array],
            hidden: jax.Array,
            rows: jax.Array,
            lengths: jax.Array,
            sampling: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits = self._logits(weights, hidden)
            drawn = jnp.concatenate([rows[None], lengths[None], sampling])
            if missing.size:
                logits = jnp.pad(logits, ((0, missing.shape[1]), (0, 0)))
                drawn = jnp.concatenate([drawn, missing], axis=1)
            return logits, drawn, _next(lengths)

        return Description(
            logits,
            (
                shapes.weights(shapes.defs.head), shapes.hidden(rows), shapes.int32(rows),
                shapes.int32(rows), shapes.int32(SAMPLING_FIELDS, rows),
            ),
            (WHOLE,) * 3,
        )  # fmt: skip

    def draw(self, rows: int, kind: HeadKind) -> Description:
        """A token for each row, drawn as one of `DRAWN_KINDS`."""
        shapes = self._shapes
        complete = kind is HeadKind.COMPLETE

        def draw(
            logits: jax.Array, drawn: jax.Array, last_tokens: jax.Array, *masks: jax.Array
        ) -> tuple[jax.Array, ...]:
            # The token being drawn stands right behind the `lengths` tokens seen.
            rows, lengths, sampling = drawn[0], drawn[1], _sampling(drawn[2:])
            tokens = sample(
                logits, lengths, sampling, *masks,
                truncates=kind is not HeadKind.SAMPLED, target=self._target,
            )  # fmt: skip
            logprobs: tuple[jax.Array, ...] = ()
            if complete:
                logprobs = token_logprobs(logits, tokens, shapes.max_logprobs, self._target)
            return tokens, _noted(last_tokens, rows, tokens), *logprobs

        vocab = shapes.config.vocab_size
        masks = (shapes.struct((rows, -(-vocab // 32)), jnp.uint32, WHOLE),) if complete else ()
        return Description(
            draw,
            (
                shapes.float32(rows, vocab), shapes.int32(_DRAWN_FIELDS, rows),
                shapes.int32(shapes.num_rows), *masks,
            ),
            (WHOLE,) * (5 if complete else 2),
        )  # fmt: skip

    def _logits(self, weights: Sequence[jax.Array], hidden: jax.Array) -> jax.Array:
        logits: jax.Array = self._shapes.defs.head.merge(weights)(hidden, self._target, self._axis)
        return logits


def _noted(last_tokens: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """The last tokens of all rows, with those of a batch; padding is dropped."""
    return last_tokens.at[rows].set(tokens, mode="drop")


def _next(lengths: jax.Array) -> jax.Array:
    """Lengths in the step that follows; padding stays padding."""
    return jnp.where(lengths > 0, lengths + 1, 0)


def _sampling(packed: jax.Array) -> SamplingArrays:
    """Sampling parameters from int32 [5, rows]."""
    floats = lax.bitcast_convert_type(packed, jnp.float32)
    seed = lax.bitcast_convert_type(packed[4], jnp.uint32)
    return SamplingArrays(floats[0], packed[1], floats[2], floats[3], seed)
