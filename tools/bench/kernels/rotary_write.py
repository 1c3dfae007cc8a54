"""Rotation and KV write of a step's tokens in every layer, beside its pieces one by one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lumen_kernels.rotary_write import Projections, rotate

from tools.bench.kernels import kv_write, reference
from tools.bench.kernels.attention import layer_offsets
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import hollow, random_bf16
from tools.bench.kernels.pool import Arena, KvPool
from tools.bench.kernels.timing import Program

_PROJECTIONS = 4  # taken in turn, and queries left of as many calls
_BAR = Bar("us", peer_source="split, rotation and KV write in the same run")


class _State(NamedTuple):
    """After a launch: the arena, and the queries of its last calls."""

    arena: Any
    queries: list[Any]


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

    heads = model.query_heads + 2 * model.kv_heads
    columns = heads * model.head_dim
    queries = struct((tokens, model.query_heads, model.head_dim))
    given = (
        (struct((tokens, columns)),) * _PROJECTIONS,
        struct((tokens, model.head_dim), jnp.float32),
        struct((2, tokens), jnp.int32),
        (struct((), jnp.int32),) * model.layers,
    )
    state = _State(pool.struct, [queries] * min(_PROJECTIONS, model.layers))
    programs = [
        Program(_layers(operation), state, given, model.layers)
        for operation in (together, one_by_one)
    ]
    name = f"rotary write {tokens} tokens, page {pool.block_size}"
    work = Work(bytes=tokens * (2 * 2 * columns + 4 * model.head_dim))
    measure = functools.partial(_measure, bench, pool, name, tokens, programs)
    return Case(name, work, _BAR, programs, measure)


def _layers(operation: _Operation) -> Callable[..., _State]:
    operation = jax.jit(operation)  # traced and lowered once, not once per layer

    def function(old: _State, fused: Any, rotation: Any, places: Any, offsets: Any) -> _State:
        arena, made = old.arena, []
        for call, offset in enumerate(offsets):
            queries, arena = operation(fused[call % _PROJECTIONS], rotation, arena, places, offset)
            made.append(queries)
        return _State(arena, made[-_PROJECTIONS:])

    return function


def _measure(
    bench: Bench, pool: KvPool, name: str, tokens: int, programs: list[Program]
) -> Measurement:
    model = pool.model
    place = kv_write.places(pool, tokens)[0]
    angles = np.random.default_rng(3).uniform(-np.pi, np.pi, (tokens, model.head_dim // 2))
    rotation = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    columns = (model.query_heads + 2 * model.kv_heads) * model.head_dim
    fused = tuple(random_bf16(20 + index, (tokens, columns)) for index in range(_PROJECTIONS))
    places = np.stack([place.bases, place.offsets]).astype(np.int32)
    offsets = layer_offsets(pool, model.layers, model.layers)
    given = (fused, jnp.asarray(rotation), jnp.asarray(places), offsets)
    samples = []
    for who, program in zip((name, f"one by one, {name}"), programs, strict=True):
        before = pool.fingerprint()
        state = program(_State(pool.arena, hollow(program.state.queries)), *given)
        pool.arena = state.arena
        layer = model.layers - 1
        last = layer % _PROJECTIONS
        k, v = pool.tokens(place.bases, place.offsets, layer * model.kv_heads)
        exact = _exact(fused[last], rotation, model.query_heads, model.kv_heads)
        queries = state.queries[-1]
        for what, found, expected in zip("qk", (queries, k), exact[:2], strict=True):
            reference.require_close(f"{who}, {what} of layer {layer}", found, expected)
        reference.require_equal(f"{who}, v of layer {layer}", v.astype(np.float64), exact[2])
        layers = np.arange(model.layers) * model.kv_heads
        pool.require_only_written(before, pool.slots(place.bases, layers))
        found_s, state = bench.timing.samples(program, state, *given)
        pool.arena = state.arena
        samples.append(found_s)
    return Measurement(samples[0], peer_samples_s=samples[1])


def _exact(
    fused: Any, rotation: Any, q_heads: int, kv_heads: int
) -> tuple[reference.Float64, reference.Float64, reference.Float64]:
    """q, k and v in float64."""
    x = reference.float64(fused).reshape(len(rotation), q_heads + 2 * kv_heads, -1)
    cos, sin = np.split(rotation.astype(np.float64)[:, None], 2, axis=-1)
    first, second = np.split(x[:, :-kv_heads], 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned[:, :q_heads], turned[:, q_heads:], x[:, -kv_heads:]
