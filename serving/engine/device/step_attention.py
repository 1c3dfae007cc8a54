"""Attention in a step: what is the same for all layers, and what each layer does with it.

Embed programs make a `Step` once, unit programs take it. Where storing keys and values is one
launch with their rotation, attention only reads afterwards; elsewhere attention stores them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from lumen_kernels import paged_attention, rotary_write
from lumen_kernels.paged_attention.options import Arena
from lumen_kernels.paged_attention.streams import stream_positions, write_places
from lumen_kernels.rotary_write import Projections
from lumen_kernels.target import Target

from lumen.decoder import Attend
from lumen.rope import inverse_frequencies, rotation
from lumen.sharding import HeadLayout
from serving.engine.device.program_shapes import Offsets, ProgramShapes


class Step(NamedTuple):
    """What all layers of a step need to know about its tokens. Shapes for t tokens.

    rotation: float32 [t, head_dim], cosines and sines of their positions. places: int32 [2, t],
    where their keys and values are stored, as `lumen_kernels.rotary_write.write` takes it.
    """

    rotation: jax.Array
    places: jax.Array


Schedule = tuple[jax.Array, ...]
"""What `paged_attention.decode_schedule` or `prefill_schedule` makes, or nothing."""


class MixedContext(NamedTuple):
    """What the tokens of a mixed call attend to, all int32: of r decode rows tables [r, t] and
    lengths [r], of s sequences that chunks belong to tables [s, t], starts and counts [s]."""

    decode_tables: jax.Array
    lengths: jax.Array
    prefill_tables: jax.Array
    starts: jax.Array
    counts: jax.Array


class LastTokens(NamedTuple):
    """Of a call, the r tokens that something is sampled behind: in the last layer they alone attend
    to anything, each as if it were decoded.

    places int32 [r] in the call. tables int32 [r, t], lengths int32 [r]: of their rows, up to and
    with the token; a length of 0 is padding. schedule: `StepAttention.decode_schedule` of these.
    """

    places: jax.Array
    tables: jax.Array
    lengths: jax.Array
    schedule: Schedule


_Read = Callable[..., tuple[jax.Array, jax.Array | None, Arena]]


class StepAttention:
    """Makes a step's arrays, and the `attend` functions that go by them."""

    def __init__(self, shapes: ProgramShapes, target: Target) -> None:
        config = shapes.config
        self._shapes, self._target = shapes, target
        self._heads = HeadLayout(config.num_heads, config.num_kv_heads, shapes.mesh.size)
        columns = (self._heads.q_per_device + 2 * self._heads.kv_per_device) * config.head_dim
        self._stores_first = rotary_write.is_one_launch(
            jax.ShapeDtypeStruct((1, columns), shapes.dtype), shapes.arena(),
            head_dim=config.head_dim, target=target,
        )  # fmt: skip

    def step_shape(self, tokens: int) -> Any:
        """A `Step` of so many tokens, of shape structs."""
        shapes = self._shapes
        shaped: Any = Step  # of shape structs
        return shaped(shapes.float32(tokens, shapes.config.head_dim), shapes.int32(2, tokens))

    def decode_step(self, tables: jax.Array, lengths: jax.Array) -> Step:
        """tables int32 [rows, t], lengths int32 [rows]: with the new token, 0 for padding."""
        rows = jnp.arange(lengths.shape[0], dtype=jnp.int32)
        return self._step(tables, rows, lengths - 1)

    def prefill_step(
        self, tables: jax.Array, starts: jax.Array, counts: jax.Array, tokens: int
    ) -> Step:
        """tables int32 [sequences, t], starts and counts int32 [sequences], of so many tokens."""
        return self._step(tables, *stream_positions(starts, counts, tokens))

    def mixed_step(self, context: MixedContext, prompt_tokens: int) -> Step:
        """Of a mixed call's decode rows, then of its prompt tokens."""
        tables = jnp.concatenate([context.decode_tables, context.prefill_tables])
        return self._step(tables, *self._mixed_rows(context, prompt_tokens))

    def _mixed_rows(self, context: MixedContext, prompt_tokens: int) -> tuple[jax.Array, jax.Array]:
        """Of each token of a mixed call, its place among all tables and its position."""
        count = context.lengths.shape[0]
        rows, positions = stream_positions(context.starts, context.counts, prompt_tokens)
        return (
            jnp.concatenate([jnp.arange(count, dtype=jnp.int32), count + rows]),
            jnp.concatenate([context.lengths - 1, positions]),
        )

    def _step(self, tables: jax.Array, rows: jax.Array, positions: jax.Array) -> Step:
        config, block_size = self._shapes.config, self._shapes.arena_layout.block_size
        table = rotation(jnp.maximum(positions, 0), inverse_frequencies(config))
        return Step(table, write_places(tables, rows, positions, block_size))

    def last_of_sequences(
        self, tables: jax.Array, starts: jax.Array, counts: jax.Array, samples: jax.Array
    ) -> LastTokens:
        """Of a prefill call: one for each sequence, padding where samples, bool [s], is false."""
        places = jnp.maximum(jnp.cumsum(counts, dtype=jnp.int32) - 1, 0)
        lengths = jnp.where(samples, starts + counts, 0)
        return LastTokens(places, tables, lengths, self.decode_schedule(lengths))

    def last_of_mixed(
        self, context: MixedContext, prompt_tokens: int, places: jax.Array, lengths: jax.Array
    ) -> LastTokens:
        """Of a mixed call: places and lengths, int32 [r], as `LastTokens` has them."""
        rows = self._mixed_rows(context, prompt_tokens)[0][places]
        tables = jnp.concatenate([context.decode_tables, context.prefill_tables])[rows]
        return LastTokens(places, tables, lengths, self.decode_schedule(lengths))

    def last_shape(self, rows: int, schedule: Any) -> Any:
        """A `LastTokens` of so many, of shape structs; schedule: of its own, as one of those."""
        shapes = self._shapes
        shaped: Any = LastTokens  # of shape structs
        return shaped(
            shapes.int32(rows), shapes.int32(rows, shapes.table_columns), shapes.int32(rows),
            schedule,
        )  # fmt: skip

    def decode_schedule(self, lengths: jax.Array) -> Schedule:
        """How attention of a decode step is cut over the chip; empty where that needs nothing."""
        made = paged_attention.decode_schedule(
            lengths, self._queries(lengths.shape[0]), self._shapes.arena(), **self._cut()
        )
        return () if made is None else (made,)

    def prefill_schedule(self, starts: jax.Array, counts: jax.Array, tokens: int) -> Schedule:
        """The same of a prefill call of so many tokens."""
        made = paged_attention.prefill_schedule(
            starts, counts, self._queries(tokens), self._shapes.arena(), **self._cut()
        )
        return () if made is None else (made,)

    def _queries(self, tokens: int) -> jax.ShapeDtypeStruct:
        shape = (tokens, self._heads.q_per_device, self._shapes.config.head_dim)
        return jax.ShapeDtypeStruct(shape, self._shapes.dtype)

    def decode_attend(
        self,
        step: Step,
        schedule: Schedule,
        tables: jax.Array,
        lengths: jax.Array,
        offsets: Offsets,
    ) -> Attend:
        """Attention of a unit's layers in a decode step."""
        return self._attend(step, offsets, self._decode_read(schedule, tables, lengths))

    def prefill_attend(
        self,
        step: Step,
        schedule: Schedule,
        tables: jax.Array,
        starts: jax.Array,
        counts: jax.Array,
        offsets: Offsets,
        last: LastTokens | None = None,
    ) -> Attend:
        """Attention of a unit's layers in a prefill call; last: of the last unit's."""
        read = self._prefill_read(schedule, tables, starts, counts)
        return self._attend(step, offsets, read, last)

    def mixed_attend(
        self,
        step: Step,
        decode_schedule: Schedule,
        prefill_schedule: Schedule,
        context: MixedContext,
        offsets: Offsets,
        last: LastTokens | None = None,
    ) -> Attend:
        """Attention of a unit's layers in a mixed call: decode's and prefill's, one for each part.

        No token of one part is in the context of the other. last: of the last unit's.
        """
        count = context.lengths.shape[0]
        parts = (slice(count), slice(count, None))
        decode = self._decode_read(decode_schedule, context.decode_tables, context.lengths)
        prefill = self._prefill_read(
            prefill_schedule, context.prefill_tables, context.starts, context.counts
        )

        def read(q: jax.Array, k: Any, v: Any, arena: Arena, offset: jax.Array) -> Any:
            first, rest = ([x if x is None else x[part] for x in (q, k, v)] for part in parts)
            decoded, _, arena = decode(*first, arena, offset)
            prefilled, _, arena = prefill(*rest, arena, offset)
            return jnp.concatenate([decoded, prefilled]), None, arena

        return self._attend(step, offsets, read, last)

    def _decode_read(self, schedule: Schedule, tables: jax.Array, lengths: jax.Array) -> _Read:
        def read(q: jax.Array, k: Any, v: Any, arena: Arena, offset: jax.Array) -> Any:
            return paged_attention.decode(
                q, k, v, arena, tables, lengths, offset,
                schedule=next(iter(schedule), None), **self._options(),
            )  # fmt: skip

        return read

    def _prefill_read(
        self, schedule: Schedule, tables: jax.Array, starts: jax.Array, counts: jax.Array
    ) -> _Read:
        def read(q: jax.Array, k: Any, v: Any, arena: Arena, offset: jax.Array) -> Any:
            return paged_attention.prefill(
                q, k, v, arena, tables, starts, counts, offset,
                schedule=next(iter(schedule), None), **self._options(),
            )  # fmt: skip

        return read

    def _attend(
        self, step: Step, offsets: Offsets, read: _Read, last: LastTokens | None = None
    ) -> Attend:
        kv_heads, eps = self._heads.kv_per_device, self._shapes.config.rms_norm_eps

        def attend(
            layer_in_unit: int, projections: Projections, arena: Arena
        ) -> tuple[jax.Array, Arena]:
            offset = offsets[layer_in_unit]
            narrows = last if layer_in_unit + 1 == len(offsets) else None
            if not self._stores_first and narrows is None:
                q, k, v = rotary_write.rotate(
                    projections, step.rotation, kv_heads=kv_heads, eps=eps
                )
                out, _, arena = read(q, k, v, arena, offset)
                return out, arena
            q, arena = rotary_write.write(
                projections, step.rotation, arena, step.places, offset,
                kv_heads=kv_heads, eps=eps, target=self._target,
            )  # fmt: skip
            if narrows is None:
                out, _, arena = read(q, None, None, arena, offset)
            else:
                read_last = self._decode_read(narrows.schedule, narrows.tables, narrows.lengths)
                out, _, arena = read_last(q[narrows.places], None, None, arena, offset)
            return out, arena

        return attend

    def _options(self) -> dict[str, Any]:
        return {"scale": self._shapes.config.head_dim**-0.5, **self._cut()}

    def _cut(self) -> dict[str, Any]:
        return {
            "target": self._target,
            "kv_heads": self._heads.kv_per_device,
            "sliding_window": self._shapes.config.sliding_window,
        }
