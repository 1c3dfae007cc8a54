"""Merge of partial attention results."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import hollow
from tools.bench.kernels.timing import Program, side_by_side

_CALLS = 32
_CHECKED_TOKENS = 128


def cases(bench: Bench) -> list[Case]:
    """One per number of parts and tokens."""
    return [_case(bench, parts, tokens) for parts, tokens in bench.sizes.merges]


def _case(bench: Bench, parts: int, tokens: int) -> Case:
    model = bench.sizes.model
    out = jax.ShapeDtypeStruct((tokens, model.query_heads, model.head_dim), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct(out.shape[:2], jnp.float32)
    outs = jax.ShapeDtypeStruct((parts, *out.shape), jnp.bfloat16)
    lses = jax.ShapeDtypeStruct((parts, *lse.shape), jnp.float32)
    program = Program(
        side_by_side(bench.operations.merge),
        [(out, lse)] * _CALLS,
        ((outs, lses),) * _CALLS,
        _CALLS,
    )
    name = f"merge {parts} parts of {tokens} tokens"
    values = math.prod(out.shape)
    work = Work(bytes=(parts + 1) * (2 * values + 4 * math.prod(lse.shape)))
    measure = functools.partial(_measure, bench, name, program, outs.shape)
    return Case(name, work, Bar("TB/s"), [program], measure)


def _measure(
    bench: Bench, name: str, program: Program, shape: tuple[int, int, int, int]
) -> Measurement:
    given = [_drawn(jax.random.key(call, impl="rbg"), shape) for call in range(_CALLS)]
    results = program(hollow(program.state), *given)
    for call in (0, _CALLS - 1):
        _check(name, given[call], results[call])
    samples_s, _ = bench.timing.samples(program, results, *given)
    return Measurement(samples_s)


@functools.partial(jax.jit, static_argnums=1)
def _drawn(key: jax.Array, shape: tuple[int, int, int, int]) -> tuple[jax.Array, jax.Array]:
    """Random parts; one of the first token's is empty with NaN in it, the second token has none."""
    first, second = jax.random.split(key)
    outs = jax.random.normal(first, shape, jnp.bfloat16)
    lses = 3 * jax.random.normal(second, shape[:3], jnp.float32)
    outs = outs.at[0, 0].set(jnp.nan).at[:, 1].set(jnp.nan)
    return outs, lses.at[0, 0].set(-jnp.inf).at[:, 1].set(-jnp.inf)


def _check(name: str, given: tuple[jax.Array, jax.Array], result: Any) -> None:
    outs, lses = (reference.float64(x[:, :_CHECKED_TOKENS]) for x in given)
    out, lse = (x[:_CHECKED_TOKENS] for x in result)
    reference.require_close(name, out, reference.merge(outs, lses))
    with np.errstate(divide="ignore"):
        expected = np.logaddexp.reduce(lses, axis=0)
    both_empty = np.isneginf(expected) & np.isneginf(reference.float64(lse))
    pairs = (np.where(both_empty, 0.0, x)[..., None] for x in (reference.float64(lse), expected))
    reference.require_close(f"{name}, log-sum-exp", *pairs)
