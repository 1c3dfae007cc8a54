"""The dense half of decoder layers: few rows beside the same products one by one, many beside the
same products with XLA's sums and norms between them.

Layers follow each other as in a model: each call adds to the hidden states of the one before, and
the queries that one projected stand in for what attention would make of them. (With operands of
its own, a call's output projection could be made before its turn.) Weights are those of a few
layers, taken in turn: more than an L2 cache holds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lumen_kernels.add_norm import xla as add_norm
from lumen_kernels.dense_chain import Weights, no_meetings, xla

from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import hollow, random_bf16
from tools.bench.kernels.sizes import Chain
from tools.bench.kernels.timing import Program, Timing

_LAYERS = 4
_CALLS = 16  # of one launch: over a millisecond with an 8B model
_EPS = 1e-5
_FEW_ROWS = 32  # one launch
_FEW_BAR = Bar("TB/s", 3.75, 4.0, peer_source="product by product in the same run")
_MANY_BAR = Bar("us", peer_source="sums and norms by XLA in the same run")


class _State(NamedTuple):
    """Of a launch: what each call made."""

    hidden: list[Any]
    projected: list[Any]


# attended, hidden, weights, norms, meetings, row of norms -> hidden, projected, meetings
_Chain = Callable[[Any, Any, Weights, Any, Any, int], tuple[Any, Any, Any]]


def cases(bench: Bench) -> list[Case]:
    """Each number of rows. The bytes are those of the weights, read once."""
    return [_case(bench, bench.sizes.chain, rows) for rows in bench.sizes.chain.rows]


def _case(bench: Bench, chain: Chain, rows: int) -> Case:
    def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def ours(*arguments: Any) -> tuple[Any, Any, Any]:
        *given, norm = arguments
        made: tuple[Any, Any, Any] = bench.operations.dense_chain(
            *given, norm=norm, eps=_EPS, target=bench.target
        )
        return made

    def by_products(*arguments: Any) -> tuple[Any, Any, Any]:
        attended, hidden, weights, norms, meetings, norm = arguments
        hidden, projected = xla.run(
            attended, hidden, weights, norms[norm:], _EPS, bench.target, None
        )
        return hidden, projected, meetings

    def with_xla_norms(*arguments: Any) -> tuple[Any, Any, Any]:
        attended, hidden, weights, norms, meetings, norm = arguments
        matmul, gated = (
            functools.partial(one, target=bench.target)
            for one in (bench.operations.matmul, bench.operations.silu_gated)
        )
        x = matmul(attended, weights.o)
        hidden, x = add_norm.add_rms_norm(x, hidden, norms[norm], _EPS)
        x = matmul(gated(x, weights.gate_up), weights.down)
        hidden, x = add_norm.add_rms_norm(x, hidden, norms[norm + 1], _EPS)
        return hidden, matmul(x, weights.qkv), meetings

    peer, bar = (by_products, _FEW_BAR) if rows <= _FEW_ROWS else (with_xla_norms, _MANY_BAR)
    matrices: list[Any] = [struct(*shape) for shape in chain.weights]
    layers = [Weights(*matrices)] * _LAYERS
    attended, hidden = struct(rows, chain.q_width), struct(rows, chain.hidden)
    norms = struct(2 * _LAYERS, chain.hidden, dtype=jnp.float32)
    state = _State([hidden] * _CALLS, [struct(rows, chain.qkv)] * _CALLS)
    programs = [
        Program(_layers(one), state, (attended, hidden, norms, layers), _CALLS, alone=True)
        for one in (ours, peer)
    ]
    elements = sum(columns * depth for columns, depth in chain.weights)
    work = Work(bytes=2 * elements, flops=2 * rows * elements)
    name = f"dense chain, M {rows}"
    measure = functools.partial(
        _measure, bench.timing, name, f"{bar.peer_source}, {name}", programs
    )
    return Case(name, work, bar, programs, measure)


def _layers(chain: _Chain) -> Callable[..., _State]:
    def function(
        old: _State, attended: Any, hidden: Any, norms: Any, layers: list[Weights]
    ) -> _State:
        del old
        meetings, made, projected = no_meetings(), [], []
        for call in range(_CALLS):
            hidden, columns, meetings = chain(
                attended, hidden, layers[call % _LAYERS], norms, meetings, _norm(call)
            )
            made.append(hidden)
            projected.append(columns)
            attended = columns[:, : attended.shape[1]]
        return _State(made, projected)

    return function


def _norm(call: int) -> int:
    return 2 * (call % _LAYERS)


def _measure(timing: Timing, name: str, peer_name: str, programs: list[Program]) -> Measurement:
    operands = _operands(*programs[0].arguments)
    states = [program(hollow(program.state), *operands) for program in programs]
    for call in (0, _CALLS - 1):
        attended, hidden, norms, layers = operands
        # Far slower to convert than to multiply: once for both.
        exact: list[reference.Float64] = [
            reference.float64(one) for one in tuple[Any, ...](layers[call % _LAYERS])
        ]
        for who, state in zip((name, peer_name), states, strict=True):
            if call:
                hidden = state.hidden[call - 1]
                attended = state.projected[call - 1][:, : operands[0].shape[1]]
            some = reference.some_rows(hidden.shape[0])
            expected = _exact(attended[some], hidden[some], exact, norms, _norm(call))
            for kind, made, wanted in zip(_State._fields, state, expected, strict=True):
                found = made[call][some]
                reference.require_close(f"{who}, {kind} of call {call}", found, wanted)
        del exact
    samples = [
        timing.samples(program, state, *operands)[0]
        for program, state in zip(programs, states, strict=True)
    ]
    return Measurement(samples[0], peer_samples_s=samples[1])


def _operands(
    attended: Any, hidden: Any, norms: Any, layers: list[Weights]
) -> tuple[Any, Any, Any, list[Weights]]:
    """Of such sizes that every part of the chain counts about as much."""
    random = np.random.default_rng(0)
    weights = jnp.asarray(random.uniform(0.5, 1.5, norms.shape), jnp.float32)
    made = []
    for index, layer in enumerate(layers):
        matrices = [
            _scaled(random_bf16(10 + 10 * index + at, one.shape))
            for at, one in enumerate(tuple[Any, ...](layer))
        ]
        made.append(Weights(*matrices))
    return random_bf16(0, attended.shape), random_bf16(1, hidden.shape), weights, made


@functools.partial(jax.jit, donate_argnums=0)
def _scaled(matrix: jax.Array) -> jax.Array:
    return matrix * jnp.asarray(matrix.shape[1] ** -0.5, matrix.dtype)


def _exact(
    attended: Any, hidden: Any, weights: list[reference.Float64], norms: Any, norm: int
) -> tuple[reference.Float64, reference.Float64]:
    """One call in float64, weights too: hidden states and projections."""
    o, gate_up, down, qkv = weights
    rows = reference.float64(norms)[norm:]
    found = reference.float64(hidden) + reference.float64(attended) @ o.T
    gate, up = np.split(reference.rms_norm(found, rows[0], _EPS) @ gate_up.T, 2, axis=1)
    found = found + gate * up / (1 + np.exp(-gate)) @ down.T
    return found, reference.rms_norm(found, rows[1], _EPS) @ qkv.T
