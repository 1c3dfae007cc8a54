"""Decode attention: the layers of a step, one schedule for all of them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tools.bench.kernels.attention import (
    Sample,
    State,
    check,
    fresh_state,
    layer_offsets,
    require_same_again,
    state_struct,
)
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work, WrongResultError
from tools.bench.kernels.operands import random_bf16
from tools.bench.kernels.pool import Ints, KvPool
from tools.bench.kernels.timing import Program

_TABLES = 4  # a launch takes the next one: a short context read by 32 layers is only twice the L2
_SCHEDULES = 16  # of one launch: each takes microseconds
_NEVER = -(2**31)  # in no schedule, which XLA does not know
_REPEATS = 4
_FA3 = "FlashAttention-3 as vLLM 0.26 calls it, page 16, one H200"
_FA3_US = {
    (1, 1024): 11.1, (8, 1024): 17.7, (32, 1024): 42.7, (128, 1024): 143.0, (256, 1024): 275.0,
    (1, 4096): 13.8, (8, 4096): 41.6, (32, 4096): 133.0, (128, 4096): 499.0, (256, 4096): 989.0,
}  # fmt: skip
_TIE = 1.03
_MORE = {(32, 1024), (128, 1024), (256, 1024)}  # here more than a tie is asked for
_MORE_FLOOR, _MORE_AIM = 1.03, 1.08
_RAGGED_BARS = {
    "128 x (64 + exponential(960))": Bar("TB/s", floor=3.4, aim=3.6),
    "one of 8192 among 127 of 128": Bar("us", floor=50.0, aim=35.0),
}


@dataclass(frozen=True, slots=True)
class _Programs:
    """Of one batch. step: as serving runs it, its schedule with it. schedules: several of them and
    next to nothing else; None where there is no such thing."""

    step: Program
    schedules: Program | None

    @property
    def existing(self) -> list[Program]:
        """Those to compile."""
        return [program for program in (self.step, self.schedules) if program is not None]


def cases(bench: Bench, pool: KvPool) -> list[Case]:
    """Every batch with every context, then ragged ones; then some with the KV write, and some
    summed in the order that gives a row the same bits in any batch."""
    sizes = bench.sizes
    made = functools.cache(functools.partial(_programs, bench, pool))
    found = []
    for context in sizes.contexts:
        for batch in sizes.decode:
            lengths = np.full(batch, context)
            name = f"decode {batch} x {context}, page {pool.block_size}"
            found.append(_case(bench, pool, name, lengths, _bar(batch, context), made(batch)))
    for title, drawn in sizes.ragged:
        lengths, bar = np.array(drawn), _RAGGED_BARS.get(title, Bar("us"))
        name = f"decode {title}, page {pool.block_size}"
        found.append(_case(bench, pool, name, lengths, bar, made(len(lengths))))
    for batch in sizes.written:
        context = sizes.contexts[0]
        name = f"decode {batch} x {context} with KV write, page {pool.block_size}"
        lengths, programs = np.full(batch, context), made(batch, writes=True)
        found.append(_case(bench, pool, name, lengths, Bar("us"), programs, writes=True))
    alike = {
        f"{batch} x {sizes.contexts[0]}": (sizes.contexts[0],) * batch for batch in sizes.written
    }
    alike |= {title: drawn for title, drawn in sizes.ragged if len(drawn) in sizes.written}
    for title, drawn in alike.items():
        name = f"decode {title}, same bits in any batch, page {pool.block_size}"
        programs, control = made(len(drawn), invariant=True), made(len(drawn))
        case = _case(bench, pool, name, np.array(drawn), Bar("us"), programs, control=control)
        found.append(case)
    return found


def _bar(batch: int, context: int) -> Bar:
    peer = _FA3_US.get((batch, context))
    if peer is None:
        return Bar("us")
    if (batch, context) in _MORE:
        return Bar("us", peer / _MORE_FLOOR, peer / _MORE_AIM, peer, _FA3)
    return Bar("us", peer * _TIE, None, peer, _FA3)


def _case(
    bench: Bench,
    pool: KvPool,
    name: str,
    lengths: Ints,
    bar: Bar,
    programs: _Programs,
    writes: bool = False,
    control: _Programs | None = None,
) -> Case:
    """control: of a row that keeps its bits in any batch, programs of which that is not asked."""
    work = Work(
        bytes=int(lengths.sum()) * pool.model.kv_bytes_per_token,
        flops=4 * int(lengths.sum()) * pool.model.query_heads * pool.model.head_dim,
    )
    measure = functools.partial(_measure, bench, pool, name, lengths, programs, writes, control)
    existing = programs.existing + ([control.step] if control else [])
    return Case(name, work, bar, existing, measure)


def _programs(
    bench: Bench, pool: KvPool, batch: int, writes: bool = False, invariant: bool = False
) -> _Programs:
    model = pool.model
    state = state_struct((batch, model.query_heads, model.head_dim), pool)

    def scheduler(lengths: jax.Array) -> Any:
        return bench.operations.decode_schedule(
            lengths, state.q, state.arena, kv_heads=model.kv_heads, target=bench.target,
            batch_invariant=invariant,
        )  # fmt: skip

    attend = functools.partial(
        bench.operations.decode, target=bench.target, scale=model.scale, kv_heads=model.kv_heads,
        batch_invariant=invariant,
    )  # fmt: skip
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    columns = bench.sizes.longest // pool.block_size
    tables = jax.ShapeDtypeStruct((_TABLES, batch, columns), jnp.int32)
    new = jax.ShapeDtypeStruct((batch, model.kv_heads, model.head_dim), jnp.bfloat16)
    new_kv = (new, new) if writes else (None, None)
    offsets = (jax.ShapeDtypeStruct((), jnp.int32),) * model.layers
    step = Program(
        _step(attend, scheduler), state, (tables, lengths, offsets, new_kv), model.layers
    )
    try:
        schedule = jax.eval_shape(scheduler, lengths)
    except Exception:
        schedule = None  # compiling the step meets the same error and keeps it for the table
    if schedule is None or writes or invariant or batch not in bench.sizes.scheduled:
        return _Programs(step, None)
    return _Programs(step, Program(_schedules(scheduler), lengths, (), _SCHEDULES))


def _step(attend: Callable[..., Any], scheduler: Callable[..., Any]) -> Callable[..., Any]:
    """The attention calls of a step, the output of one being the queries of the next."""
    attend = jax.jit(attend)  # traced and lowered once, not once per layer

    def step(
        state: State,
        tables: jax.Array,
        lengths: jax.Array,
        offsets: Sequence[jax.Array],
        new_kv: tuple[jax.Array | None, jax.Array | None],
    ) -> State:
        turn = lax.rem(state.turn, jnp.int32(tables.shape[0]))
        table = lax.dynamic_index_in_dim(tables, turn, keepdims=False)
        schedule = scheduler(lengths)
        arena, outs = state.arena, [state.q]
        for offset in offsets:
            out, _, arena = attend(
                outs[-1], *new_kv, arena, table, lengths, offset, schedule=schedule
            )
            outs.append(out)
        return State(outs[-1], outs[1], outs[-2], arena, state.turn + 1)

    return step


def _schedules(scheduler: Callable[..., Any]) -> Callable[..., Any]:
    """Schedules one behind the other, each for lengths that hang on all of the one before."""

    scheduler = jax.jit(scheduler)  # traced and lowered once

    def chain(lengths: jax.Array) -> jax.Array:
        for _ in range(_SCHEDULES):
            leaves = jax.tree.leaves(scheduler(lengths))
            never = sum(jnp.sum(leaf == _NEVER, dtype=jnp.int32) for leaf in leaves)
            lengths = lengths + never
        return lengths

    return chain


def _measure(
    bench: Bench,
    pool: KvPool,
    name: str,
    lengths: Ints,
    programs: _Programs,
    writes: bool,
    control: _Programs | None,
) -> Measurement:
    model, random = pool.model, np.random.default_rng(1)
    columns = bench.sizes.longest // pool.block_size
    layers = pool.layers_for(int((-(-lengths // pool.block_size)).sum()))
    tables = np.stack([pool.tables(random, lengths, columns, layers) for _ in range(_TABLES)])
    ragged = bool((lengths % pool.block_size).any())
    if ragged:
        # Of the first table only: behind a row's end in one may be the middle of another's.
        tables[1:] = tables[0]
        pool.poison(tables[0], lengths, layers)
    q = random_bf16(2, (len(lengths), model.query_heads, model.head_dim))
    shape = (len(lengths), model.kv_heads, model.head_dim)
    new_kv = (random_bf16(3, shape), random_bf16(4, shape)) if writes else (None, None)
    offsets = layer_offsets(pool, model.layers, layers)
    given = (jnp.asarray(tables), jnp.asarray(lengths, jnp.int32), offsets, new_kv)

    before = pool.fingerprint()
    state = programs.step(fresh_state(q, pool), *given)
    pool.arena = state.arena
    last = (model.layers - 1) % layers * model.kv_heads
    samples = [
        Sample(tables[0, row], np.array([row]), lengths[[row]] - 1)
        for row in sorted({0, int(lengths.argmax()), int(lengths.argmin()), len(lengths) - 1})
    ]
    check(name, pool, q, state, samples, last)
    written = _written(pool, tables[0], lengths, layers) if writes else np.array([], np.int64)
    pool.require_only_written(before, written)
    once = state.q
    for _ in range(_REPEATS):
        state = programs.step(fresh_state(q, pool), *given)
        pool.arena = state.arena
        require_same_again(name, once, state.q)
    told = _same_bits(name, pool, programs, control, q, given) if control else ""

    samples_s, state = bench.timing.samples(programs.step, fresh_state(q, pool), *given)
    pool.arena = state.arena
    note = told or _parts(bench, programs, given[1], float(np.median(samples_s)))
    if ragged:
        pool.fill()  # without the poison
    return Measurement(samples_s, note=note)


def _written(pool: KvPool, table: Any, lengths: Ints, layers: int) -> Ints:
    blocks = table[np.arange(len(lengths)), (lengths - 1) // pool.block_size].astype(np.int64)
    return pool.slots(blocks, np.arange(layers) * pool.model.kv_heads)


def _same_bits(
    name: str,
    pool: KvPool,
    programs: _Programs,
    control: _Programs,
    q: jax.Array,
    given: tuple[Any, ...],
) -> str:
    """That rows keep their bits in other batches, and how many do not with the control.

    Raises WrongResultError.
    """
    changed, compared = _changed_rows(pool, programs.step, q, given)
    if changed:
        raise WrongResultError(f"{name}: {changed} of {compared} rows change with the batch")
    changed, compared = _changed_rows(pool, control.step, q, given)
    kept = f"{compared} rows keep their bits in other batches"
    return f"{kept} ({changed} change if it is not asked for)"


def _changed_rows(
    pool: KvPool, step: Program, q: jax.Array, given: tuple[Any, ...]
) -> tuple[int, int]:
    """Rows whose bits change when others become padding, and how many were compared.

    Compared are the longest row alone, and it with every second one.
    """
    tables, lengths, *rest = given

    def run(lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = step(fresh_state(q, pool), tables, lengths, *rest)
        pool.arena = state.arena
        return state.first, state.q

    together, changed, compared = run(lengths), 0, 0
    index = np.arange(lengths.shape[0])
    longest = index == int(np.argmax(lengths))
    for kept in (longest, longest | (index % 2 == 0)):
        apart = run(jnp.where(kept, lengths, 0))
        changed += int(np.sum(np.asarray(_other_bits(together, apart)) & kept))
        compared += int(kept.sum())
    return changed, compared


@jax.jit
def _other_bits(some: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    """Whether rows differ in any of these pairs of bfloat16 [rows, heads, head_dim]."""

    def bits(array: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(array, jnp.uint16)

    pairs = zip(some, others, strict=True)
    return jnp.stack([(bits(a) != bits(b)).any(axis=(1, 2)) for a, b in pairs]).any(axis=0)


def _parts(bench: Bench, programs: _Programs, lengths: jax.Array, second: float) -> str:
    """What a schedule takes, and what that leaves for a layer's attention."""
    if programs.schedules is None:
        return ""
    samples_s, _ = bench.timing.samples(programs.schedules, jnp.copy(lengths))
    schedule = float(np.median(samples_s))
    alone = second - schedule / programs.step.calls
    return f"a step's schedule {1e6 * schedule:.1f} us, attention without it {1e6 * alone:.1f} us"
