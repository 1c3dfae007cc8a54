"""The programs of mixed calls, described for a `ProgramBuilder` to lower."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from lumen_kernels.paged_attention.options import Arena
from lumen_kernels.target import Target

from serving.engine.device.mixed_call import MixedArrays, mixed_arrays, mixed_length
from serving.engine.device.program_shapes import ARENA, WHOLE, Place, ProgramShapes
from serving.engine.device.step_attention import (
    LastTokens,
    MixedContext,
    Schedule,
    Step,
    StepAttention,
)
from serving.engine.executor import MixedSize


class Description(NamedTuple):
    """A program: what it computes on one device, the shapes it takes, how its results lie there,
    and which arguments it may use up."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_specs: Any
    donate: tuple[int, ...] = ()


class MixedPrograms:
    """Describes the programs of mixed calls: `serving.engine.device.programs.Programs`.

    schedule_shape: from a function that makes a schedule, and shapes for it, to that of what it
    makes.
    """

    def __init__(
        self,
        shapes: ProgramShapes,
        attention: StepAttention,
        target: Target,
        axis: str | None,
        schedule_shape: Callable[..., Any],
    ) -> None:
        self._shapes = shapes
        self._attention = attention
        self._target = target
        self._axis = axis
        self._schedule_shape = schedule_shape

    def embed(self, size: MixedSize) -> Description:
        """From a packed call to all that the other programs take of it."""
        shapes, attention = self._shapes, self._attention
        embedding = shapes.defs.embedding

        def mixed_embed(
            weights: Sequence[jax.Array], last_tokens: jax.Array, packed: jax.Array
        ) -> tuple[jax.Array, MixedContext, Step, Schedule, Schedule, LastTokens, jax.Array]:
            call: MixedArrays = mixed_arrays(packed, size, shapes.table_columns)
            decoded = last_tokens.at[call.rows].get(mode="fill", fill_value=0)
            tokens = jnp.concatenate([decoded, call.tokens])
            hidden: jax.Array = embedding.merge(weights)(tokens, self._axis)
            context = MixedContext(
                call.tables[: size.rows], call.lengths,
                call.tables[size.rows :], call.starts, call.counts,
            )  # fmt: skip
            return (
                hidden,
                context,
                attention.mixed_step(context, size.prompt_tokens),
                attention.decode_schedule(call.lengths),
                attention.prefill_schedule(call.starts, call.counts, size.prompt_tokens),
                attention.last_of_mixed(
                    context, size.prompt_tokens, call.places, call.drawn_lengths
                ),
                call.drawn_rows,
            )

        packed = shapes.int32(mixed_length(size, shapes.table_columns))
        return Description(
            mixed_embed,
            (shapes.weights(embedding), shapes.int32(shapes.num_rows), packed),
            (WHOLE,) * 7,
        )

    def unit(self, size: MixedSize, *, is_last: bool = False) -> Description:
        """The layers of one unit, or of the last one, which takes a `LastTokens` too and ends with
        what something is sampled behind."""
        shapes, attention = self._shapes, self._attention
        unit = shapes.defs.unit

        def mixed_unit(
            weights: Sequence[jax.Array],
            hidden: jax.Array,
            arena: Arena,
            context: MixedContext,
            step: Step,
            decode_schedule: Schedule,
            prefill_schedule: Schedule,
            place: Place,
            last: LastTokens | None = None,
        ) -> tuple[jax.Array, Arena]:
            attend = attention.mixed_attend(
                step, decode_schedule, prefill_schedule, context, place.offsets, last
            )
            kept = None if last is None else last.places
            result: tuple[jax.Array, Arena] = unit.merge(weights)(
                hidden, arena, attend, self._target, self._axis, kept, shapes.mail(place)
            )
            return result

        rows, sequences, columns = size.rows, size.sequences, shapes.table_columns
        sequence_numbers = shapes.int32(sequences)
        # Of the decode rows, and of the last tokens, which are as many.
        decode_schedule = self._schedule_shape(attention.decode_schedule, shapes.int32(rows))
        shaped: Any = MixedContext  # of shape structs
        context = shaped(
            shapes.int32(rows, columns), shapes.int32(rows),
            shapes.int32(sequences, columns), sequence_numbers, sequence_numbers,
        )  # fmt: skip
        arguments = (
            shapes.weights(unit), shapes.hidden(size.tokens), shapes.arena(), context,
            attention.step_shape(size.tokens),
            decode_schedule,
            self._schedule_shape(
                partial(attention.prefill_schedule, tokens=size.prompt_tokens),
                sequence_numbers, sequence_numbers,
            ),
            shapes.place(),
        )  # fmt: skip
        if not is_last:
            return Description(mixed_unit, arguments, (WHOLE, ARENA), donate=(1, 2))
        mixed_unit.__name__ = "mixed_last"
        with_last = (*arguments, attention.last_shape(rows, decode_schedule))
        return Description(mixed_unit, with_last, (WHOLE, ARENA), donate=(2,))
