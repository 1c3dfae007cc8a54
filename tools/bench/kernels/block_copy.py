"""Block copies: random whole blocks of all layers and heads, out of the arena, back and within."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work, WrongResultError
from tools.bench.kernels.operands import hollow
from tools.bench.kernels.pool import Arena, Ints, KvPool
from tools.bench.kernels.timing import Program, side_by_side

_BAR = Bar("TB/s", 3.3, 3.7)
_BARRED_BLOCKS = 64  # and more
_LAUNCH_BYTES = 2 << 30  # copied out by one launch: far more than the L2, and room beside an arena


def cases(bench: Bench, pool: KvPool) -> list[Case]:
    """Gather, scatter and copy of each number of blocks."""
    makers = (_gather, _scatter, _copy)
    return [make(bench, pool, blocks) for blocks in bench.sizes.blocks for make in makers]


def _case(
    pool: KvPool, what: str, blocks: int, program: Program, measure: Callable[..., Measurement]
) -> Case:
    size = pool.block_bytes / 2**20
    name = f"{what} {blocks} blocks of {size:.3g} MiB, page {pool.block_size}"
    bar = _BAR if blocks >= _BARRED_BLOCKS and what != "copy" else Bar("TB/s")
    work = Work(bytes=2 * blocks * pool.block_bytes)
    return Case(name, work, bar, [program], functools.partial(measure, name))


def _calls(pool: KvPool, blocks: int) -> int:
    return int(np.clip(_LAUNCH_BYTES // (blocks * pool.block_bytes), 1, 16))


def _buffer(pool: KvPool, blocks: int) -> jax.ShapeDtypeStruct:
    shape = (blocks, pool.model.slots_per_block, *pool.struct[0].shape[1:])
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _drawn(pool: KvPool, blocks: int, sets: int) -> tuple[jax.Array, ...]:
    """Sets of blocks of which no two share one."""
    bases = pool.bases(np.random.default_rng(1), blocks * sets)
    return tuple(jnp.asarray(one, jnp.int32) for one in np.split(bases, sets))


def _host(bases: tuple[jax.Array, ...]) -> Ints:
    return np.concatenate([np.asarray(one) for one in bases]).astype(np.int64)


def _require_blocks(what: str, arena: Arena, bases: jax.Array, buffer: jax.Array) -> None:
    if not bool(_equal(arena[0], bases, buffer)):
        raise WrongResultError(f"{what}: blocks differ from what was to be copied")


@jax.jit
def _equal(arena: jax.Array, bases: jax.Array, buffer: jax.Array) -> jax.Array:
    """Bit by bit, by XLA's own gather."""
    blocks = _taken(arena, bases, buffer.shape[1])
    ours, theirs = (lax.bitcast_convert_type(x, jnp.uint16) for x in (blocks, buffer))
    return jnp.all(ours == theirs)


@functools.partial(jax.jit, static_argnums=2)
def _taken(arena: jax.Array, bases: jax.Array, slots_per_block: int) -> jax.Array:
    slots = bases[:, None] + jnp.arange(slots_per_block, dtype=jnp.int32)
    return arena.at[slots].get(mode="promise_in_bounds")


def _all_layers(pool: KvPool) -> Ints:
    return np.arange(pool.model.layers) * pool.model.kv_heads


def _gather(bench: Bench, pool: KvPool, blocks: int) -> Case:
    calls = _calls(pool, blocks)
    gather = functools.partial(
        bench.operations.gather, slots_per_block=pool.model.slots_per_block, target=bench.target
    )
    gather_all = side_by_side(gather)

    def launch(old: list[Any], arena: Arena, bases: tuple[jax.Array, ...]) -> list[Any]:
        results: list[Any] = gather_all(old, *((arena, one) for one in bases))
        return results

    ids = (jax.ShapeDtypeStruct((blocks,), jnp.int32),) * calls
    program = Program(launch, [_buffer(pool, blocks)] * calls, (pool.struct, ids), calls)

    def measure(name: str) -> Measurement:
        bases = _drawn(pool, blocks, calls)
        buffers = program(hollow(program.state), pool.arena, bases)
        for one, buffer in zip(bases, buffers, strict=True):
            _require_blocks(name, pool.arena, one, buffer)
        samples_s, _ = bench.timing.samples(program, buffers, pool.arena, bases)
        return Measurement(samples_s)

    return _case(pool, "gather", blocks, program, measure)


def _scatter(bench: Bench, pool: KvPool, blocks: int) -> Case:
    calls = _calls(pool, blocks)
    scatter = jax.jit(functools.partial(bench.operations.scatter, target=bench.target))

    def launch(arena: Arena, bases: tuple[jax.Array, ...], buffers: tuple[Any, ...]) -> Arena:
        for call, one in enumerate(bases):
            arena = scatter(arena, one, buffers[call % len(buffers)])
        return arena

    ids = (jax.ShapeDtypeStruct((blocks,), jnp.int32),) * calls
    sources = min(2, calls)  # a buffer of 64 blocks alone is twice the L2
    arguments = (ids, (_buffer(pool, blocks),) * sources)
    program = Program(launch, pool.struct, arguments, calls)

    def measure(name: str) -> Measurement:
        *bases, taken = _drawn(pool, blocks, calls + 1)
        spb = pool.model.slots_per_block
        first = _taken(pool.arena[0], taken, spb)
        buffers = (first, -first)[:sources]
        before = pool.fingerprint()
        pool.arena = program(pool.arena, tuple(bases), buffers)
        for call, one in enumerate(bases):
            _require_blocks(name, pool.arena, one, buffers[call % sources])
        pool.require_only_written(before, pool.slots(_host(tuple(bases)), _all_layers(pool)))
        samples_s, pool.arena = bench.timing.samples(program, pool.arena, tuple(bases), buffers)
        return Measurement(samples_s)

    return _case(pool, "scatter", blocks, program, measure)


def _copy(bench: Bench, pool: KvPool, blocks: int) -> Case:
    calls = _calls(pool, blocks)
    copy = jax.jit(
        functools.partial(
            bench.operations.copy, slots_per_block=pool.model.slots_per_block, target=bench.target
        )
    )

    def launch(arena: Arena, pairs: tuple[tuple[jax.Array, jax.Array], ...]) -> Arena:
        for source, destination in pairs:
            arena = copy(arena, source, destination)
        return arena

    ids = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    program = Program(launch, pool.struct, (((ids, ids),) * calls,), calls)

    def measure(name: str) -> Measurement:
        drawn = _drawn(pool, blocks, 2 * calls)
        pairs = tuple(zip(drawn[::2], drawn[1::2], strict=True))
        before = pool.fingerprint()
        pool.arena = program(pool.arena, pairs)
        for source, destination in pairs:
            wanted = _taken(pool.arena[0], source, pool.model.slots_per_block)
            _require_blocks(name, pool.arena, destination, wanted)
        written = pool.slots(_host(drawn[1::2]), _all_layers(pool))
        pool.require_only_written(before, written)  # so the sources are what they were
        samples_s, pool.arena = bench.timing.samples(program, pool.arena, pairs)
        return Measurement(samples_s)

    return _case(pool, "copy", blocks, program, measure)
