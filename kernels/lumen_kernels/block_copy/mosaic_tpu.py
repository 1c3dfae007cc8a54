"""Block copies on TPU (Pallas Mosaic TPU): one DMA per block from HBM to HBM, several in flight.

Nothing passes through a core: a block is contiguous on both sides. On a device of two cores each
core sees to every other block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lumen_kernels.arena import ArenaShape
from lumen_kernels.target import Target

_IN_FLIGHT = 8
"""Copies on their way per core. Not measured: nothing has run on a TPU."""

MOST_BLOCKS = 65536
"""Blocks per call: their ids, two lists at most, lie in scalar memory (1 MiB everywhere)."""


def gather(
    arena: tuple[jax.Array, ...],
    bases: jax.Array,
    slots_per_block: int,
    shape: ArenaShape,
    target: Target,
) -> jax.Array:
    """See `lumen_kernels.block_copy.gather`."""
    blocks = bases.shape[0]
    buffer = jax.ShapeDtypeStruct((blocks, slots_per_block, *shape.page_shape), arena[0].dtype)

    def kernel(bases_ref: Any, *refs: Any) -> None:
        *segments, buffer_ref, arrived = refs
        one = segments[0].at[pl.ds(0, slots_per_block)]

        def moves(block: jax.Array) -> jax.Array:
            return _exists(bases_ref[block], shape)

        def start(block: jax.Array, semaphore: Any) -> None:
            for here, place in _places(segments, shape, bases_ref[block], slots_per_block):

                @pl.when(here)
                def _(place: Any = place) -> None:
                    pltpu.make_async_copy(place, buffer_ref.at[block], semaphore).start()

        _run(blocks, target, moves, start, one, arrived)

    (gathered,) = _call(kernel, (bases,), arena, (buffer,), {}, target)
    return gathered


def scatter(
    arena: tuple[jax.Array, ...],
    bases: jax.Array,
    buffer: jax.Array,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.scatter`."""
    blocks, slots_per_block = buffer.shape[:2]

    def kernel(bases_ref: Any, buffer_ref: Any, *refs: Any) -> None:
        segments, arrived = refs[len(arena) : -1], refs[-1]

        def moves(block: jax.Array) -> jax.Array:
            return _exists(bases_ref[block], shape)

        def start(block: jax.Array, semaphore: Any) -> None:
            for here, place in _places(segments, shape, bases_ref[block], slots_per_block):

                @pl.when(here)
                def _(place: Any = place) -> None:
                    pltpu.make_async_copy(buffer_ref.at[block], place, semaphore).start()

        _run(blocks, target, moves, start, buffer_ref.at[0], arrived)

    aliases = {2 + index: index for index in range(len(arena))}
    return _call(kernel, (bases,), (buffer, *arena), arena, aliases, target)


def copy(
    arena: tuple[jax.Array, ...],
    sources: jax.Array,
    destinations: jax.Array,
    slots_per_block: int,
    shape: ArenaShape,
    target: Target,
) -> tuple[jax.Array, ...]:
    """See `lumen_kernels.block_copy.copy`."""
    blocks = sources.shape[0]

    def kernel(sources_ref: Any, destinations_ref: Any, *refs: Any) -> None:
        segments, arrived = refs[len(arena) : -1], refs[-1]
        one = segments[0].at[pl.ds(0, slots_per_block)]

        def moves(block: jax.Array) -> jax.Array:
            return _exists(sources_ref[block], shape) & _exists(destinations_ref[block], shape)

        def start(block: jax.Array, semaphore: Any) -> None:
            sources = _places(segments, shape, sources_ref[block], slots_per_block)
            destinations = _places(segments, shape, destinations_ref[block], slots_per_block)
            for reads, source in sources:
                for writes, destination in destinations:

                    @pl.when(reads & writes)
                    def _(source: Any = source, destination: Any = destination) -> None:
                        pltpu.make_async_copy(source, destination, semaphore).start()

        _run(blocks, target, moves, start, one, arrived)

    aliases = {2 + index: index for index in range(len(arena))}
    return _call(kernel, (sources, destinations), arena, arena, aliases, target)


def _exists(base: jax.Array, shape: ArenaShape) -> jax.Array:
    return (base >= 0) & (base < sum(shape.slots))


def _places(
    segments: Any, shape: ArenaShape, base: jax.Array, slots_per_block: int
) -> list[tuple[jax.Array, Any]]:
    """For each segment, whether the block lies in it, and the block."""
    return [
        (
            (base >= first) & (base < first + slots),
            segment.at[pl.ds(base - first, slots_per_block)],
        )
        for segment, first, slots in zip(segments, shape.first_slots, shape.slots, strict=True)
    ]


def _run(blocks: int, target: Target, moves: Any, start: Any, one: Any, arrived: Any) -> None:
    """Start this core's copies, `_IN_FLIGHT` of them ahead of the waits.

    moves(block): whether it is copied at all. start(block, semaphore). one: any block; a wait
    counts bytes only.
    """
    core = pl.program_id(0)
    turns = lax.div(blocks - core + target.cores - 1, target.cores)

    def finish(turn: jax.Array) -> None:
        @pl.when((turn >= 0) & moves(core + jnp.maximum(turn, 0) * target.cores))
        def _() -> None:
            pltpu.make_async_copy(one, one, arrived.at[lax.rem(turn, _IN_FLIGHT)]).wait()

    @pl.loop(0, turns)
    def _(turn: jax.Array) -> None:
        block = core + turn * target.cores
        finish(turn - _IN_FLIGHT)

        @pl.when(moves(block))
        def _() -> None:
            start(block, arrived.at[lax.rem(turn, _IN_FLIGHT)])

    @pl.loop(jnp.maximum(turns - _IN_FLIGHT, 0), turns)
    def _(turn: jax.Array) -> None:
        finish(turn)


def _call(
    kernel: Any,
    ids: tuple[jax.Array, ...],
    operands: tuple[jax.Array, ...],
    results: Any,
    aliases: dict[int, int],
    target: Target,
) -> tuple[jax.Array, ...]:
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    outs = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ids),
            grid=(target.cores,),
            in_specs=[hbm] * len(operands),
            out_specs=[hbm] * len(results),
            scratch_shapes=[pltpu.SemaphoreType.DMA((_IN_FLIGHT,))],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=pltpu.InterpretParams() if target.interpret else False,
        name="block_copy",
    )(*ids, *operands)
    return tuple(outs)
