"""Prefill attention: ragged chunks of several prompts, each behind what the arena holds of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.kernels import reference
from tools.bench.kernels.attention import (
    Sample,
    State,
    check,
    fresh_state,
    layer_offsets,
    require_same_again,
    state_struct,
)
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import random_bf16
from tools.bench.kernels.pool import Ints, KvPool
from tools.bench.kernels.sizes import Prompts
from tools.bench.kernels.timing import Program

_MOST_LAYERS = 4  # of one launch: each is a millisecond
_FLOORED = {"16384 whole", "2048 over 14336"}


def cases(bench: Bench, pool: KvPool) -> list[Case]:
    """One per kind of prompts. Only causal operations count: half of the new tokens' square."""
    return [_case(bench, pool, prompts) for prompts in bench.sizes.prefill]


def _case(bench: Bench, pool: KvPool, prompts: Prompts) -> Case:
    model = pool.model
    seen = prompts.rows * (prompts.new * prompts.prefix + prompts.new * (prompts.new + 1) // 2)
    tokens = prompts.rows * prompts.new
    work = Work(
        bytes=prompts.rows * (prompts.prefix + 2 * prompts.new) * model.kv_bytes_per_token
        + 2 * tokens * model.query_heads * model.head_dim * 2,
        flops=4 * seen * model.query_heads * model.head_dim,
    )
    bar = Bar("TFLOP/s", 500.0, 650.0) if prompts.name in _FLOORED else Bar("TFLOP/s")
    name = f"prefill {prompts.name}, page {pool.block_size}"
    calls = min(_MOST_LAYERS, model.layers)
    program = _program(bench, pool, prompts, calls)
    measure = functools.partial(_measure, bench, pool, name, prompts, program)
    return Case(name, work, bar, [program], measure)


def _columns(prompts: Prompts, pool: KvPool) -> int:
    return -(-(prompts.prefix + prompts.new) // pool.block_size)


def _program(bench: Bench, pool: KvPool, prompts: Prompts, calls: int) -> Program:
    model, tokens = pool.model, prompts.rows * prompts.new
    attend = functools.partial(bench.operations.prefill, target=bench.target, scale=model.scale)
    new = jax.ShapeDtypeStruct((tokens, model.kv_heads, model.head_dim), jnp.bfloat16)
    per_row = jax.ShapeDtypeStruct((prompts.rows,), jnp.int32)
    tables = jax.ShapeDtypeStruct((prompts.rows, _columns(prompts, pool)), jnp.int32)
    offsets = (jax.ShapeDtypeStruct((), jnp.int32),) * calls
    state = state_struct((tokens, model.query_heads, model.head_dim), pool)
    return Program(_chain(attend), state, (new, new, tables, per_row, per_row, offsets), calls)


def _chain(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Several layers, the output of one being the queries of the next; all write the same K, V."""
    attend = jax.jit(attend)  # traced and lowered once, not once per layer

    def chain(
        state: State,
        k: jax.Array,
        v: jax.Array,
        tables: jax.Array,
        starts: jax.Array,
        counts: jax.Array,
        offsets: Sequence[jax.Array],
    ) -> State:
        arena, outs = state.arena, [state.q]
        for offset in offsets:
            out, _, arena = attend(outs[-1], k, v, arena, tables, starts, counts, offset)
            outs.append(out)
        return State(outs[-1], outs[1], outs[-2], arena, state.turn + 1)

    return chain


def _measure(
    bench: Bench, pool: KvPool, name: str, prompts: Prompts, program: Program
) -> Measurement:
    model, random = pool.model, np.random.default_rng(1)
    ends = np.full(prompts.rows, prompts.prefix + prompts.new)
    table = pool.tables(random, ends, _columns(prompts, pool), model.layers)
    tokens = prompts.rows * prompts.new
    q = random_bf16(2, (tokens, model.query_heads, model.head_dim))
    k, v = (random_bf16(seed, (tokens, model.kv_heads, model.head_dim)) for seed in (3, 4))
    offsets = layer_offsets(pool, program.calls, model.layers)
    starts = jnp.full(prompts.rows, prompts.prefix, jnp.int32)
    counts = jnp.full(prompts.rows, prompts.new, jnp.int32)
    given = (k, v, jnp.asarray(table), starts, counts, offsets)

    before = pool.fingerprint()
    state = program(fresh_state(q, pool), *given)
    pool.arena = state.arena
    last = (program.calls - 1) * model.kv_heads
    rows = sorted({0, prompts.rows - 1})
    check(name, pool, q, state, [_sample(table, prompts, row) for row in rows], last)
    for row in rows:
        _check_written(name, pool, prompts, table[row], (k, v), row, last)
    new_blocks = table[:, prompts.prefix // pool.block_size :].astype(np.int64).ravel()
    layers = np.arange(program.calls) * model.kv_heads
    pool.require_only_written(before, pool.slots(new_blocks, layers))
    once = state.q
    state = program(fresh_state(q, pool), *given)
    pool.arena = state.arena
    require_same_again(name, once, state.q)

    del once
    samples_s, state = bench.timing.samples(program, fresh_state(q, pool), *given)
    pool.arena = state.arena
    return Measurement(samples_s)


def _sample(table: Any, prompts: Prompts, row: int) -> Sample:
    """Both ends of a row and what lies between, so that first, inner and last tiles are seen."""
    new = prompts.new
    steps = np.unique([0, 1, new // 3, new // 2 - 1, new // 2, new - 2, new - 1])
    return Sample(table[row].astype(np.int64), row * new + steps, prompts.prefix + steps)


def _check_written(
    name: str,
    pool: KvPool,
    prompts: Prompts,
    row_table: Any,
    new_kv: tuple[jax.Array, jax.Array],
    row: int,
    layer_offset: int,
) -> None:
    at: Ints = prompts.prefix + np.arange(prompts.new)
    bases = row_table[at // pool.block_size].astype(np.int64)
    found = pool.tokens(bases, at % pool.block_size, layer_offset)
    given = slice(row * prompts.new, (row + 1) * prompts.new)
    for what, stored, new in zip(("K", "V"), found, new_kv, strict=True):
        reference.require_equal(f"{name}, stored {what}", stored, new[given])
