"""KV write: the new tokens of a step into the arena, in every layer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.kernels import reference
from tools.bench.kernels.attention import layer_offsets
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import random_bf16
from tools.bench.kernels.pool import Arena, Ints, KvPool
from tools.bench.kernels.timing import Program

_PAIRS = 16  # K and V arrays written in turn
_STEPS = 4  # of one launch, each into other blocks: a layer alone takes microseconds
_DECODE_TOKENS = 256  # up to this many are of a decode step, each in a block of its own
_BARS = {256: Bar("us", 7.0, 4.0), 8192: Bar("us", 30.0, 20.0)}


class Places(NamedTuple):
    """Where a step's tokens go: block bases and offsets inside the blocks, [tokens]."""

    bases: Ints
    offsets: Ints


def cases(bench: Bench, pool: KvPool) -> list[Case]:
    """One per number of tokens."""
    return [_case(bench, pool, tokens) for tokens in bench.sizes.writes]


def _case(bench: Bench, pool: KvPool, tokens: int) -> Case:
    write = jax.jit(functools.partial(bench.operations.kv_write, target=bench.target))

    def launch(
        arena: Arena, pairs: Any, places: list[tuple[jax.Array, jax.Array]], offsets: Any
    ) -> Arena:
        call = 0
        for slots, inside in places:
            for offset in offsets:
                k, v = pairs[call % len(pairs)]
                arena = write(k, v, arena, slots, inside, offset)
                call += 1
        return arena

    model = pool.model
    new = jax.ShapeDtypeStruct((tokens, model.kv_heads, model.head_dim), jnp.bfloat16)
    per_token = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    program = Program(
        launch,
        pool.struct,
        (
            ((new, new),) * _PAIRS,
            ((per_token, per_token),) * _STEPS,
            (jax.ShapeDtypeStruct((), jnp.int32),) * model.layers,
        ),
        _STEPS * model.layers,
    )
    name = f"KV write {tokens} tokens, page {pool.block_size}"
    work = Work(bytes=2 * tokens * model.kv_bytes_per_token)
    measure = functools.partial(_measure, bench, pool, name, tokens, program)
    return Case(name, work, _BARS.get(tokens, Bar("us")), [program], measure)


def places(pool: KvPool, tokens: int) -> list[Places]:
    """Of a few steps, in different blocks. Decode: one token per block. Prefill: whole blocks."""
    random = np.random.default_rng(1)
    if tokens <= _DECODE_TOKENS:
        bases = pool.bases(random, _STEPS * tokens)
        offsets = random.integers(0, pool.block_size, _STEPS * tokens)
    else:
        blocks = pool.bases(random, _STEPS * -(-tokens // pool.block_size))
        bases = np.repeat(blocks, pool.block_size)[: _STEPS * tokens]
        offsets = np.arange(_STEPS * tokens) % pool.block_size
    split = zip(np.split(bases, _STEPS), np.split(offsets, _STEPS), strict=True)
    return [Places(*one) for one in split]


def _measure(bench: Bench, pool: KvPool, name: str, tokens: int, program: Program) -> Measurement:
    model = pool.model
    shape = (tokens, model.kv_heads, model.head_dim)
    pairs = tuple(
        (random_bf16(2 * index, shape), random_bf16(2 * index + 1, shape))
        for index in range(_PAIRS)
    )
    to = places(pool, tokens)
    given = (
        pairs,
        tuple((jnp.asarray(p.bases, jnp.int32), jnp.asarray(p.offsets, jnp.int32)) for p in to),
        layer_offsets(pool, model.layers, model.layers),
    )
    before = pool.fingerprint()
    pool.arena = program(pool.arena, *given)
    # The first layer of the first step and the last layer of the last one.
    for place, layer, call in ((to[0], 0, 0), (to[-1], model.layers - 1, -1)):
        found = pool.tokens(place.bases, place.offsets, layer * model.kv_heads)
        expected = pairs[call % program.calls % _PAIRS]
        for what, stored, new in zip(("K", "V"), found, expected, strict=True):
            reference.require_equal(f"{name}, {what} of layer {layer}", stored, new)
    written = np.concatenate([place.bases for place in to])
    layers = np.arange(model.layers) * model.kv_heads
    pool.require_only_written(before, pool.slots(written, layers))

    samples_s, pool.arena = bench.timing.samples(program, pool.arena, *given)
    return Measurement(samples_s)
