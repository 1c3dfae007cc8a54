"""KV write on TPU (Pallas Mosaic TPU): pages are read, merged and written back 16 rows at a time.

A TPU cannot store one bfloat16 row: two share a sublane, and vector access wants whole tiles. So
the unit is a slab: 16 positions of a block, of every head, K and V. The tokens of a slab stand
next to each other in the stream (one sequence, in order of position), which makes them a *run*:
one copy brings them in, already at their rows of the slab, and the slab's other rows come from
the arena. A slab written whole is not read. Several slabs are in flight.

New rows travel as 32-bit words, K in the low half and V in the high half, because picking one
head of many tokens out of a packed bfloat16 tile is not possible, and of a 32-bit tile is a
strided load. Rows are merged as words too, so that what is not written keeps its bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.target import Target

SLAB = 16
"""Rows of a slab: a whole tile of bfloat16 on every generation (8 rows would do before tpu7x)."""

_LANES = 128

_IN_FLIGHT = 4
"""Slabs on their way. Not measured: nothing has run on a TPU."""

_TOKENS = 65536
"""Tokens per kernel call: three words of each lie in scalar memory, 1 MiB on every generation."""


def supports(shape: ArenaShape, dtype: jnp.dtype) -> bool:
    """Whether this kernel can write such an arena."""
    rows, width = shape.page_shape[1:]
    return rows % SLAB == 0 and width % _LANES == 0 and dtype.itemsize in (2, 4)


def write(
    k: jax.Array,
    v: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.kv_write.write`; layer_offset int32."""
    for first in range(0, k.shape[0], _TOKENS):
        some = slice(first, first + _TOKENS)
        words = _words(k[some], v[some], shape)
        arena = _write(
            words, arena, slots[some], offsets[some], layer_offset, k.shape[1], shape, target
        )
    return arena


def _words(k: jax.Array, v: jax.Array, shape: ArenaShape) -> jax.Array:
    """New rows as uint32 [tokens, rows, 128 lanes].

    16-bit split arenas: K | V << 16, a row per head (head_dim 256: two). 16-bit packed arenas:
    zero extended, a row per head. 32-bit arenas: a row per head, page and 128 lanes.
    """
    if k.dtype.itemsize == 4:
        words = jnp.concatenate([k, v], 2) if shape.packed else jnp.stack([k, v], 2)
        words = lax.bitcast_convert_type(words, jnp.uint32)
    else:
        k, v = (lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) for x in (k, v))
        words = jnp.concatenate([k, v], 2) if shape.packed else k | v << 16
    return words.reshape(k.shape[0], -1, _LANES)


def runs(slots: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether a token continues the run before it, one past the last token of its run).

    A run is consecutive tokens of one slab, or consecutive tokens that are not stored.
    """
    tokens = slots.shape[0]
    index = jnp.arange(tokens, dtype=jnp.int32)
    stored = slots >= 0
    before = functools.partial(jnp.roll, shift=1)
    next_row = (slots == before(slots)) & (offsets == before(offsets) + 1) & (offsets % SLAB != 0)
    goes_on = (index > 0) & (stored == before(stored)) & (next_row | ~stored)
    starts = jnp.where(goes_on, tokens, index)
    later = jnp.append(starts[1:], jnp.int32(tokens))
    return goes_on, lax.cummin(later, reverse=True)


def _write(
    words: jax.Array,
    arena: tuple[jax.Array, ...],
    slots: jax.Array,
    offsets: jax.Array,
    layer_offset: jax.Array,
    heads: int,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """Write at most `_TOKENS` tokens."""
    tokens = words.shape[0]
    goes_on, ends = runs(slots, offsets)
    # Each core starts at the first run that begins in its part of the stream.
    cuts = jnp.array([tokens * core // target.cores for core in range(target.cores)], jnp.int32)
    cuts = jnp.append(jnp.where(goes_on[cuts], ends[cuts], cuts), jnp.int32(tokens))
    pages, _, width = shape.page_shape
    slab = (heads, pages, SLAB, width)
    scalars = (slots, offsets, ends, cuts, layer_offset.reshape(1))
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, shape=shape, heads=heads),
            out_shape=[jax.ShapeDtypeStruct(segment.shape, segment.dtype) for segment in arena],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(target.cores,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(arena)),
                out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arena),
                scratch_shapes=[
                    pltpu.VMEM((_IN_FLIGHT, SLAB, *words.shape[1:]), jnp.uint32),
                    pltpu.VMEM((_IN_FLIGHT, *slab), arena[0].dtype),
                    pltpu.SemaphoreType.DMA((_IN_FLIGHT,)),
                    pltpu.SemaphoreType.DMA((_IN_FLIGHT,)),
                ],
            ),
            input_output_aliases={len(scalars) + 1 + i: i for i in range(len(arena))},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), disable_bounds_checks=True
            ),
            interpret=pltpu.InterpretParams() if target.interpret else False,
            name="kv_write",
        )(*scalars, words, *arena)
    )


def _kernel(
    slots_ref: Any,
    offsets_ref: Any,
    ends_ref: Any,
    cuts_ref: Any,
    layer_ref: Any,
    words_ref: Any,
    *refs: Any,
    shape: ArenaShape,
    heads: int,
) -> None:
    """Walk over the runs of this core: `front` is the next to fetch, `back` the next to write."""
    segments = refs[len(shape.slots) : 2 * len(shape.slots)]
    fresh_ref, slab_ref, fetched, written = refs[2 * len(shape.slots) :]
    core = pl.program_id(0)
    end = cuts_ref[core + 1]
    last = jnp.maximum(end - 1, 0)  # readable even if this core has nothing to do

    def stored_from(token: jax.Array) -> jax.Array:
        """The token, or the next run's if it is not stored (two such runs never meet)."""
        at = jnp.minimum(token, last)
        return jnp.where((token < end) & (slots_ref[at] < 0), ends_ref[at], token)

    def run_at(token: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.rem(offsets_ref[token], SLAB), ends_ref[token] - token

    def fresh(token: jax.Array, buffer: jax.Array) -> Any:
        row, count = run_at(token)
        return pltpu.make_async_copy(
            words_ref.at[pl.ds(token, count)],
            fresh_ref.at[buffer, pl.ds(row, count)],
            fetched.at[buffer],
        )

    def places(token: jax.Array) -> list[tuple[jax.Array, Any]]:
        """For each segment, whether the run's slab lies in it, and the slab."""
        slot = slots_ref[token] + layer_ref[0]
        row = pl.multiple_of(lax.div(offsets_ref[token], SLAB) * SLAB, SLAB)
        return [
            (
                (slot >= first) & (slot < first + slots),
                segment.at[pl.ds(slot - first, heads), :, pl.ds(row, SLAB)],
            )
            for segment, first, slots in zip(segments, shape.first_slots, shape.slots, strict=True)
        ]

    def fetch(token: jax.Array, turn: jax.Array) -> None:
        buffer = lax.rem(turn, _IN_FLIGHT)

        @pl.when(turn >= _IN_FLIGHT)
        def _() -> None:
            stored(buffer).wait()

        fresh(token, buffer).start()
        count = run_at(token)[1]
        for here, place in places(token):

            @pl.when(here & (count < SLAB))
            def _(place: Any = place) -> None:
                pltpu.make_async_copy(place, slab_ref.at[buffer], fetched.at[buffer]).start()

    def some_slab() -> Any:
        """A wait counts bytes: any slab of the arena stands for the one copied."""
        return segments[0].at[pl.ds(0, heads), :, pl.ds(0, SLAB)]

    def stored(buffer: jax.Array) -> Any:
        return pltpu.make_async_copy(slab_ref.at[buffer], some_slab(), written.at[buffer])

    def finish(token: jax.Array, turn: jax.Array) -> None:
        buffer = lax.rem(turn, _IN_FLIGHT)
        row, count = run_at(token)
        fresh(token, buffer).wait()

        @pl.when(count < SLAB)
        def _() -> None:
            pltpu.make_async_copy(some_slab(), slab_ref.at[buffer], fetched.at[buffer]).wait()

        _merge(fresh_ref.at[buffer], slab_ref.at[buffer], row, count)
        for here, place in places(token):

            @pl.when(here)
            def _(place: Any = place) -> None:
                pltpu.make_async_copy(slab_ref.at[buffer], place, written.at[buffer]).start()

    def fetch_next(front: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        @pl.when(front < end)
        def _() -> None:
            fetch(front, turn)

        after = stored_from(ends_ref[jnp.minimum(front, last)])
        return jnp.where(front < end, after, front), turn + (front < end).astype(jnp.int32)

    first = stored_from(cuts_ref[core])
    front, fetches = first, jnp.int32(0)
    for _turn in range(_IN_FLIGHT - 1):
        front, fetches = fetch_next(front, fetches)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        front, fetches, back, finished = state
        front, fetches = fetch_next(front, fetches)
        finish(back, finished)
        return front, fetches, stored_from(ends_ref[back]), finished + 1

    state = (front, fetches, first, jnp.int32(0))
    *_, finished = lax.while_loop(lambda state: state[2] < end, step, state)
    for buffer in range(_IN_FLIGHT):

        @pl.when(buffer < finished)
        def _(buffer: int = buffer) -> None:
            stored(jnp.int32(buffer)).wait()


def _merge(fresh_ref: Any, slab_ref: Any, row: jax.Array, count: jax.Array) -> None:
    """Put the fresh rows [SLAB, rows, 128 lanes] row .. row + count - 1 into the slab."""
    heads, pages, _, width = slab_ref.shape
    pieces = width // _LANES

    def taken(rows: jax.Array) -> jax.Array:
        return (rows >= row) & (rows < row + count)

    if slab_ref.dtype.itemsize == 4:
        take = taken(lax.broadcasted_iota(jnp.int32, (SLAB, _LANES), 0))
        for index, (head, page, piece) in enumerate(np.ndindex(heads, pages, pieces)):
            place = (head, page, slice(None), pl.ds(piece * _LANES, _LANES))
            new = pltpu.bitcast(fresh_ref[:, index], slab_ref.dtype)
            slab_ref[place] = jnp.where(take, new, slab_ref[place])
        return
    # Two neighbouring rows of 16-bit values are the halves of one word.
    even = 2 * lax.broadcasted_iota(jnp.int32, (SLAB // 2, _LANES), 0)
    low, high = jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000)
    take = jnp.where(taken(even), low, 0) | jnp.where(taken(even + 1), high, 0)
    for index, (head, piece) in enumerate(np.ndindex(heads, pieces)):
        evens = fresh_ref[pl.ds(0, SLAB // 2, 2), index]
        odds = fresh_ref[pl.ds(1, SLAB // 2, 2), index]
        fresh = [(evens & low) | (odds << 16), (evens >> 16) | (odds & high)]
        for page in range(pages):
            place = (head, page, slice(None), pl.ds(piece * _LANES, _LANES))
            old = pltpu.bitcast(slab_ref[place], jnp.uint32)
            merged = (fresh[page] & take) | (old & ~take)
            slab_ref[place] = pltpu.bitcast(merged, slab_ref.dtype)
