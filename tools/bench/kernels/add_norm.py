"""Residual sum and norm, beside XLA's, with the rows of decoding steps and of prefill calls.

Each call adds to the hidden states of the one before it, as in a model, and what it adds has been
made already: a product has just been stored there, so of few rows it is in the L2 cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from lumen_kernels.add_norm import xla

from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import hollow, random_bf16
from tools.bench.kernels.timing import Program, Timing

_CALLS = 16  # of one launch
_EPS = 1e-5
_BAR = Bar("us", peer_source="XLA in the same run")


class _State(NamedTuple):
    """What each call of a launch made."""

    hidden: list[Any]
    normed: list[Any]


def cases(bench: Bench) -> list[Case]:
    """Each number of rows. The bytes are those of what is read and written, once."""
    return [_case(bench, rows) for rows in bench.sizes.chain.normed]


def _case(bench: Bench, rows: int) -> Case:
    ours = functools.partial(bench.operations.add_rms_norm, eps=_EPS, target=bench.target)
    theirs = functools.partial(xla.add_rms_norm, eps=_EPS)
    width = bench.sizes.chain.hidden
    states = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((width,), jnp.float32)
    state = _State([states] * _CALLS, [states] * _CALLS)
    programs = [
        Program(_layers(one), state, (states, weight, [states] * _CALLS), _CALLS)
        for one in (ours, theirs)
    ]
    name = f"add and norm, {rows} rows of {width}"
    measure = functools.partial(_measure, bench.timing, name, programs)
    return Case(name, Work(bytes=4 * 2 * rows * width), _BAR, programs, measure)


def _layers(add_norm: Callable[..., tuple[Any, Any]]) -> Callable[..., _State]:
    def function(old: _State, hidden: Any, weight: Any, added: list[Any]) -> _State:
        del old
        made = _State([], [])
        for x in added:
            # XLA would add up what several calls add; in a model, products are between them.
            hidden, normed = lax.optimization_barrier(add_norm(x, hidden, weight))
            made.hidden.append(hidden)
            made.normed.append(normed)
        return made

    return function


def _measure(timing: Timing, name: str, programs: list[Program]) -> Measurement:
    hidden, weight, added = programs[0].arguments
    random = np.random.default_rng(0)
    given = (
        random_bf16(0, hidden.shape),
        jnp.asarray(random.uniform(0.5, 1.5, weight.shape), jnp.float32),
        [random_bf16(1 + call, one.shape) for call, one in enumerate(added)],
    )
    states = [program(hollow(program.state), *given) for program in programs]
    for who, state in zip((name, f"XLA, {name}"), states, strict=True):
        _check(who, given, state)
    samples = [
        timing.samples(program, state, *given)[0]
        for program, state in zip(programs, states, strict=True)
    ]
    return Measurement(samples[0], peer_samples_s=samples[1])


def _check(name: str, given: tuple[Any, Any, list[Any]], state: _State) -> None:
    hidden, weight, added = given
    some = reference.some_rows(hidden.shape[0])
    for call in (0, _CALLS - 1):
        before = reference.float64((state.hidden[call - 1] if call else hidden)[some])
        found = state.hidden[call][some]
        exact = before + reference.float64(added[call][some])
        reference.require_close(f"{name}, sum of call {call}", found, exact)
        exact = reference.rms_norm(reference.float64(found), reference.float64(weight), _EPS)
        reference.require_close(f"{name}, norm of call {call}", state.normed[call][some], exact)
