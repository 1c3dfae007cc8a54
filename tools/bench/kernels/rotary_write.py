"""Rotation and KV write of a step's tokens in every layer, beside its pieces one by one.

Every call has other projections or another rotation than all others: of equal pieces XLA would run
one for all.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from lumen_kernels.rotary_write import Projections, rotate

from tools.bench.kernels import kv_write, reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import hollow, random_bf16
from tools.bench.kernels.pool import Arena, KvPool
from tools.bench.kernels.timing import Program

_DECODE_TOKENS = 256  # up to this many a launch has several steps: a layer alone takes microseconds
_STEPS = 4
_BAR = Bar("us", peer_source="split, rotation and KV write in the same run")


class _State(NamedTuple):
    """After a launch: the arena, its last call's queries, and the first tokens' queries added up.

    Nothing else looks at the queries of the other calls, which XLA therefore would not make. All of
    them as results are no way out: launches take the longer the more results there are.
    """

    arena: Any
    queries: Any
    added: Any


# projections, rotation, arena, places, layer offset -> queries, arena
_Operation = Callable[[Any, Any, Arena, Any, Any], tuple[Any, Arena]]


def cases(bench: Bench, pool: KvPool) -> list[Case]:
    """One per number of tokens."""
    return [_case(bench, pool, tokens) for tokens in bench.sizes.rotations]


def _case(bench: Bench, pool: KvPool, tokens: int) -> Case:
    model = pool.model

    def struct(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def together(fused: Any, rotation: Any, arena: Arena, places: Any, offset: Any) -> Any:
        return bench.operations.rotary_write(
            Projections(fused), rotation, arena, places, offset,
            kv_heads=model.kv_heads, target=bench.target,
        )  # fmt: skip

    def one_by_one(fused: Any, rotation: Any, arena: Arena, places: Any, offset: Any) -> Any:
        q, k, v = rotate(Projections(fused), rotation, kv_heads=model.kv_heads)
        slots, offsets = places
        return q, bench.operations.kv_write(
            k, v, arena, slots, offsets, offset, target=bench.target
        )

    steps = _STEPS if tokens <= _DECODE_TOKENS else 1
    heads = model.query_heads + 2 * model.kv_heads
    columns = heads * model.head_dim
    queries = struct((tokens, model.query_heads, model.head_dim))
    given = (
        (struct((tokens, columns)),) * model.layers,
        ((struct((tokens, model.head_dim), jnp.float32), struct((2, tokens), jnp.int32)),) * steps,
    )
    calls = steps * model.layers
    state = _State(pool.struct, queries, struct(queries.shape[1:]))
    programs = [
        Program(_layers(operation, model.kv_heads), state, given, calls)
        for operation in (together, one_by_one)
    ]
    name = f"rotary write {tokens} tokens, page {pool.block_size}"
    work = Work(bytes=tokens * (2 * 2 * columns + 4 * model.head_dim))
    measure = functools.partial(_measure, bench, pool, name, tokens, programs)
    return Case(name, work, _BAR, programs, measure)


def _layers(operation: _Operation, kv_heads: int) -> Callable[..., _State]:
    operation = jax.jit(operation)  # traced and lowered once, not once per layer

    def function(old: _State, fused: Any, steps: Any) -> _State:
        arena, made = old.arena, []
        for rotation, places in steps:
            for layer, one in enumerate(fused):
                offset = np.int32(layer * kv_heads)  # a constant, which costs a launch nothing
                queries, arena = operation(one, rotation, arena, places, offset)
                made.append(queries)
        # Behind the barrier, so that all of each is made, and where it would be for attention.
        made = lax.optimization_barrier(made)
        return _State(arena, made[-1], functools.reduce(jnp.add, [one[0] for one in made]))

    return function


def _measure(
    bench: Bench, pool: KvPool, name: str, tokens: int, programs: list[Program]
) -> Measurement:
    model = pool.model
    fused_structs, step_structs = programs[0].arguments
    fused = tuple(random_bf16(20 + index, one.shape) for index, one in enumerate(fused_structs))
    places = kv_write.places(pool, tokens)[: len(step_structs)]
    random = np.random.default_rng(3)
    rotations = [_rotation(random, tokens, model.head_dim) for _ in places]
    steps = tuple(
        (jnp.asarray(rotation), jnp.asarray(np.stack([to.bases, to.offsets]), jnp.int32))
        for rotation, to in zip(rotations, places, strict=True)
    )
    layer, place = model.layers - 1, places[-1]
    exact = _exact(fused[layer], rotations[-1], model.query_heads, model.kv_heads)
    written = pool.slots(
        np.concatenate([to.bases for to in places]), np.arange(model.layers) * model.kv_heads
    )
    samples = []
    for who, program in zip((name, f"one by one, {name}"), programs, strict=True):
        before = pool.fingerprint()
        _, *rest = hollow(program.state._replace(arena=None))
        state = program(_State(pool.arena, *rest), fused, steps)
        pool.arena = state.arena
        k, v = pool.tokens(place.bases, place.offsets, layer * model.kv_heads)
        for what, found, expected in zip("qk", (state.queries, k), exact[:2], strict=True):
            reference.require_close(f"{who}, {what} of layer {layer}", found, expected)
        reference.require_equal(f"{who}, v of layer {layer}", v.astype(np.float64), exact[2])
        pool.require_only_written(before, written)
        found_s, state = bench.timing.samples(program, state, fused, steps)
        pool.arena = state.arena
        samples.append(found_s)
    return Measurement(samples[0], peer_samples_s=samples[1])


def _rotation(random: np.random.Generator, tokens: int, head_dim: int) -> Any:
    angles = random.uniform(-np.pi, np.pi, (tokens, head_dim // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _exact(
    fused: Any, rotation: Any, q_heads: int, kv_heads: int
) -> tuple[reference.Float64, reference.Float64, reference.Float64]:
    """q, k and v in float64."""
    x = reference.float64(fused).reshape(len(rotation), q_heads + 2 * kv_heads, -1)
    cos, sin = np.split(rotation.astype(np.float64)[:, None], 2, axis=-1)
    first, second = np.split(x[:, :-kv_heads], 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned[:, :q_heads], turned[:, q_heads:], x[:, -kv_heads:]
