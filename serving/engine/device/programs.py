"""The compiled programs of a replica: what runs on its devices in a step.

A decode step is embed, one call per unit, head; a prefill call, which takes chunks of several
prompts, is embed, one call per unit and, if any of them samples, head; a mixed call does both in
one pass. Where not all rows are greedy, logits and draw stand in place of head. Each kind is
compiled once per bucket; all units share one program, because a unit's place is an argument. Calls
with prompt tokens run their last unit by another, `last`: behind the last layer's keys and values
it computes only the tokens that something is sampled behind, which are few.
Everything runs inside one `shard_map` over the tensor axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from lumen_kernels.paged_attention.options import Arena
from lumen_kernels.reduce_norm import Mailboxes
from lumen_kernels.target import Target

from lumen.sharding import TENSOR_AXIS
from serving.engine.device.compilation import Compiled
from serving.engine.device.head_programs import (
    DRAWN_KINDS,
    HeadKind,
    HeadPrograms,
    draw_size_of,
    draw_sizes,
)
from serving.engine.device.mixed_programs import Description, MixedPrograms
from serving.engine.device.program_shapes import (
    ARENA,
    SEQUENCE_FIELDS,
    WHOLE,
    Place,
    ProgramShapes,
)
from serving.engine.device.step_attention import (
    LastTokens,
    Schedule,
    Step,
    StepAttention,
)
from serving.engine.executor import MixedSize


@dataclass(frozen=True, slots=True)
class Programs:
    """Compiled programs by bucket. Shapes: b rows, c tokens and s sequences of a prefill call, t
    table columns.

    decode_embed[b](embedding, last_tokens [num_rows], rows [b], tables [b, t], lengths [b])
        -> hidden [b, hidden size], step, schedule
    decode_unit[b](unit, hidden, arena, tables, lengths, step, schedule, place) -> hidden, arena
    prefill_embed[c](embedding, call [c + s (t + 3)]) -> hidden [c, hidden size], step, schedule,
        last, rows [s]
    prefill_unit[c](unit, hidden, arena, call, step, schedule, place) -> hidden, arena
    prefill_last[c](unit, hidden, arena, call, step, schedule, place, last)
        -> hidden [s, hidden size], arena
    mixed_embed[size](embedding, last_tokens, packed) -> hidden [size.tokens, hidden size],
        context, step, decode schedule, prefill schedule, last, rows [b]
    mixed_unit[size](unit, hidden, arena, context, step, decode schedule, prefill schedule, place)
        -> hidden, arena
    mixed_last[size](unit, hidden, arena, context, step, decode schedule, prefill schedule, place,
        last) -> hidden [b, hidden size], arena
    head[b](head, hidden, last_tokens, rows, lengths) -> tokens [b], last_tokens, next lengths [b]
    logits[b](head, hidden, rows, lengths, sampling [5, b])
        -> logits [d, vocabulary], drawn [7, d], next lengths [b]
    draw[d, kind](logits, drawn, last_tokens, *masks) -> tokens [d], last_tokens, and for COMPLETE
        chosen [d], ids [d, n], top [d, n]
    zero_arena() -> arena

    step: a `Step`, what all layers need to know about the step's tokens. schedule: how attention
    of this step is cut over the chip, the same for all layers; a tuple, empty where the backend
    needs none. place: a `Place`; the offsets, of each of the unit's layers, are slots of a block
    before those of the layer: scalars, as a GPU would launch a kernel to add to one. rows: num_rows
    marks a padding row. lengths: tokens including the one being run, 0 for padding.
    call: tokens of the sequences one behind the other, then tables [s, t], starts, counts and rows
    [s]; counts are 0 for padding, rows num_rows where nothing is sampled.
    size: a `MixedSize`, whose rows are a batch b that head takes. packed: of a mixed call, see
    `mixed_call.MixedArrays`; context: a `MixedContext`. last: `LastTokens` of the call, and rows:
    those that they are of.
    d: of `draw_sizes`, the smallest that holds b rows. drawn: rows, lengths and sampling, padded.
    masks: uint32 [d, words] for COMPLETE.
    mailboxes: of the devices, if programs sum over them by a kernel; `place` then has addresses.
    arena is donated to the units, and hidden where it has the shape of the result; nothing else is.
    """

    decode_embed: dict[int, Compiled]
    decode_unit: dict[int, Compiled]
    prefill_embed: dict[int, Compiled]
    prefill_unit: dict[int, Compiled]
    prefill_last: dict[int, Compiled]
    head: dict[int, Compiled]
    logits: dict[int, Compiled]
    draw: dict[tuple[int, HeadKind], Compiled]
    zero_arena: Compiled
    mixed_embed: dict[MixedSize, Compiled] = field(default_factory=dict)
    mixed_unit: dict[MixedSize, Compiled] = field(default_factory=dict)
    mixed_last: dict[MixedSize, Compiled] = field(default_factory=dict)
    mailboxes: Mailboxes | None = None

    def awaited(self) -> "Programs":
        """The same, but each call returns when the devices are done with it."""

        def wait(program: Compiled) -> Compiled:
            return lambda *arguments: jax.block_until_ready(program(*arguments))

        kinds: dict[str, Any] = {
            one.name: {place: wait(program) for place, program in found.items()}
            for one in fields(self)
            if isinstance(found := getattr(self, one.name), dict)
        }
        return replace(self, **kinds)


class ProgramBuilder:
    """Describes every program a replica needs, ready to be lowered.

    target: of the kernels; None: that of the mesh. platforms: to lower for, as JAX names them,
    where they are not the mesh's: a mesh of CPUs stands in for GPUs that are not here.
    """

    def __init__(
        self,
        shapes: ProgramShapes,
        target: Target | None = None,
        platforms: tuple[str, ...] | None = None,
    ) -> None:
        self._shapes = shapes
        self._target = target or Target.of(list(shapes.mesh.devices.flat))
        self._platforms = platforms
        self._axis = TENSOR_AXIS if shapes.mesh.size > 1 else None
        self._attention = StepAttention(shapes, self._target)
        self._heads = HeadPrograms(shapes, self._target, self._axis)
        self._mixed = MixedPrograms(
            shapes, self._attention, self._target, self._axis, self._schedule_shape
        )

    def lowerings(
        self,
        decode_buckets: Sequence[int],
        chunk_buckets: Mapping[int, int],
        mixed_sizes: Sequence[MixedSize] = (),
    ) -> dict[tuple[Any, ...], Callable[[], jax.stages.Lowered]]:
        """(field of Programs, bucket, ...) to a function that lowers that program.

        chunk_buckets: tokens of each size of prefill call, and the sequences that it takes.
        """
        found: dict[tuple[Any, ...], Callable[[], jax.stages.Lowered]] = {
            ("zero_arena",): self._zero_arena
        }
        # Units first: they take longest to compile.
        for b in reversed(decode_buckets):
            found["decode_unit", b] = partial(self._decode_unit, b)
        for c, s in sorted(chunk_buckets.items(), reverse=True):
            found["prefill_unit", c] = partial(self._prefill_unit, c, s)
            found["prefill_last", c] = partial(self._prefill_unit, c, s, is_last=True)
        for size in mixed_sizes:
            found["mixed_unit", *size] = partial(self._described, self._mixed.unit, size)
            last = partial(self._mixed.unit, is_last=True)
            found["mixed_last", *size] = partial(self._described, last, size)
        draws = draw_sizes(decode_buckets)
        for d in draws:
            for kind in DRAWN_KINDS:
                found["draw", d, kind] = partial(self._described, self._heads.draw, d, kind)
        for b in decode_buckets:
            d = draw_size_of(draws, b)
            found["logits", b] = partial(self._described, self._heads.logits, b, d)
            found["head", b] = partial(self._described, self._heads.head, b)
            found["decode_embed", b] = partial(self._decode_embed, b)
        for c, s in chunk_buckets.items():
            found["prefill_embed", c] = partial(self._prefill_embed, c, s)
        for size in mixed_sizes:
            found["mixed_embed", *size] = partial(self._described, self._mixed.embed, size)
        return found

    def _described(self, describe: Callable[..., Description], *of: Any) -> jax.stages.Lowered:
        return self._lower(*describe(*of))

    def _zero_arena(self) -> jax.stages.Lowered:
        arena = self._shapes.arena()

        def zero_arena() -> Arena:
            return tuple(jnp.zeros(segment.shape, segment.dtype) for segment in arena)

        shardings = tuple(segment.sharding for segment in arena)
        return jax.jit(zero_arena, out_shardings=shardings).lower()

    def _decode_embed(self, rows: int) -> jax.stages.Lowered:
        shapes = self._shapes
        embedding = shapes.defs.embedding

        def decode_embed(
            weights: Sequence[jax.Array],
            last_tokens: jax.Array,
            rows: jax.Array,
            tables: jax.Array,
            lengths: jax.Array,
        ) -> tuple[jax.Array, Step, Schedule]:
            tokens = last_tokens.at[rows].get(mode="fill", fill_value=0)
            hidden: jax.Array = embedding.merge(weights)(tokens, self._axis)
            step = self._attention.decode_step(tables, lengths)
            return hidden, step, self._attention.decode_schedule(lengths)

        return self._lower(
            decode_embed,
            (
                shapes.weights(embedding),
                shapes.int32(shapes.num_rows),
                shapes.int32(rows),
                shapes.int32(rows, shapes.table_columns),
                shapes.int32(rows),
            ),
            (WHOLE, WHOLE, WHOLE),
        )

    def _decode_unit(self, rows: int) -> jax.stages.Lowered:
        shapes = self._shapes
        unit = shapes.defs.unit

        def decode_unit(
            weights: Sequence[jax.Array],
            hidden: jax.Array,
            arena: Arena,
            tables: jax.Array,
            lengths: jax.Array,
            step: Step,
            schedule: Schedule,
            place: Place,
        ) -> tuple[jax.Array, Arena]:
            attend = self._attention.decode_attend(step, schedule, tables, lengths, place.offsets)
            result: tuple[jax.Array, Arena] = unit.merge(weights)(
                hidden, arena, attend, self._target, self._axis, mail=shapes.mail(place)
            )
            return result

        return self._lower(
            decode_unit,
            (
                shapes.weights(unit), shapes.hidden(rows), shapes.arena(),
                shapes.int32(rows, shapes.table_columns), shapes.int32(rows),
                self._attention.step_shape(rows),
                self._schedule_shape(self._attention.decode_schedule, shapes.int32(rows)),
                shapes.place(),
            ),
            (WHOLE, ARENA),
            donate=(1, 2),
        )  # fmt: skip

    def _prefill_embed(self, tokens: int, sequences: int) -> jax.stages.Lowered:
        shapes = self._shapes
        embedding = shapes.defs.embedding

        def prefill_embed(
            weights: Sequence[jax.Array], call: jax.Array
        ) -> tuple[jax.Array, Step, Schedule, LastTokens, jax.Array]:
            tables, starts, counts, rows = self._unpacked(call, tokens, sequences)
            hidden: jax.Array = embedding.merge(weights)(call[:tokens], self._axis)
            attention = self._attention
            return (
                hidden,
                attention.prefill_step(tables, starts, counts, tokens),
                attention.prefill_schedule(starts, counts, tokens),
                attention.last_of_sequences(tables, starts, counts, rows < shapes.num_rows),
                rows,
            )

        return self._lower(
            prefill_embed,
            (shapes.weights(embedding), shapes.prefill_call(tokens, sequences)),
            (WHOLE,) * 5,
        )

    def _prefill_unit(
        self, tokens: int, sequences: int, *, is_last: bool = False
    ) -> jax.stages.Lowered:
        """The layers of one unit, or of the last one, which takes a `LastTokens` too."""
        shapes, attention = self._shapes, self._attention
        unit = shapes.defs.unit

        def prefill_unit(
            weights: Sequence[jax.Array],
            hidden: jax.Array,
            arena: Arena,
            call: jax.Array,
            step: Step,
            schedule: Schedule,
            place: Place,
            last: LastTokens | None = None,
        ) -> tuple[jax.Array, Arena]:
            tables, starts, counts, _ = self._unpacked(call, tokens, sequences)
            attend = attention.prefill_attend(
                step, schedule, tables, starts, counts, place.offsets, last
            )
            kept = None if last is None else last.places
            result: tuple[jax.Array, Arena] = unit.merge(weights)(
                hidden, arena, attend, self._target, self._axis, kept, shapes.mail(place)
            )
            return result

        sequence_numbers = shapes.int32(sequences)
        arguments = (
            shapes.weights(unit), shapes.hidden(tokens), shapes.arena(),
            shapes.prefill_call(tokens, sequences), attention.step_shape(tokens),
            self._schedule_shape(
                partial(attention.prefill_schedule, tokens=tokens),
                sequence_numbers, sequence_numbers,
            ),
            shapes.place(),
        )  # fmt: skip
        if not is_last:
            return self._lower(prefill_unit, arguments, (WHOLE, ARENA), donate=(1, 2))
        prefill_unit.__name__ = "prefill_last"
        schedule = self._schedule_shape(attention.decode_schedule, sequence_numbers)
        with_last = (*arguments, attention.last_shape(sequences, schedule))
        return self._lower(prefill_unit, with_last, (WHOLE, ARENA), donate=(2,))

    def _schedule_shape(
        self, make: Callable[..., Schedule], *arguments: jax.ShapeDtypeStruct
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(self._shapes.int32(*one.shape) for one in jax.eval_shape(make, *arguments))

    def _unpacked(self, call: jax.Array, tokens: int, sequences: int) -> tuple[jax.Array, ...]:
        """Tables [s, t], starts, counts and rows [s] of a packed prefill call."""
        end = tokens + sequences * self._shapes.table_columns
        tables = call[tokens:end].reshape(sequences, -1)
        return tables, *call[end:].reshape(SEQUENCE_FIELDS, sequences)

    def _lower(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        out_specs: Any,
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Lowered:
        in_specs = jax.tree.map(lambda struct: struct.sharding.spec, arguments)
        sharded = jax.shard_map(
            function, mesh=self._shapes.mesh, in_specs=in_specs, out_specs=out_specs,
            check_vma=False,
        )  # fmt: skip
        sharded.__name__ = function.__name__
        traced = jax.jit(sharded, donate_argnums=donate).trace(*arguments)
        lowered: jax.stages.Lowered = traced.lower(lowering_platforms=self._platforms)
        return lowered
