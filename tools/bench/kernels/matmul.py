"""The decoder's matrix products, beside XLA's on the same operands.

Products of one shape follow each other here; in a layer other kernels lie between them. With many
rows the chip lowers its clock within milliseconds: both then run in turns, each already hot when
its time is taken.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work, WrongResultError
from tools.bench.kernels.operands import hollow, random_bf16
from tools.bench.kernels.sizes import Product
from tools.bench.kernels.timing import Program, Timing, side_by_side

_LAUNCH_BYTES = 1.4e9  # of weights per launch, each matrix used once
_MOST_CALLS = 24
_STREAMED = Bar("TB/s", 3.75, 4.0, peer_source="XLA in the same run")
_COMPUTED = Bar("TFLOP/s", 650.0, 720.0, peer_source="XLA in the same run")
_COMPUTED_TOKENS = 256
_SUSTAINED_ROWS = 512
_SUSTAINED_S = 0.1  # of each kind at least: the clock follows the power of some ten milliseconds
_LAYER = {"qkv", "o", "gate_up", "gate_up, gated", "down"}  # the lm head has no bar of its own
_CHECKED_COLUMNS = 64


def cases(bench: Bench) -> list[Case]:
    """Each weight shape with each number of rows. Weights are read once, so bytes are theirs."""
    return [_case(bench, one, rows) for one in bench.sizes.matmuls for rows in one.rows]


def _case(bench: Bench, product: Product, rows: int) -> Case:
    columns, depth = product.columns, product.depth
    calls = int(np.clip(_LAUNCH_BYTES // (2 * columns * depth), 2, _MOST_CALLS))
    x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((columns, depth), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((rows, columns // (2 if product.gated else 1)), jnp.bfloat16)
    operation = bench.operations.silu_gated if product.gated else bench.operations.matmul
    ours = functools.partial(operation, target=bench.target)
    programs = [
        Program(side_by_side(one), [y] * calls, ((x, w),) * calls, calls, alone=True)
        for one in (ours, _xla_gated if product.gated else _xla)
    ]
    bar = _COMPUTED if rows >= _COMPUTED_TOKENS else _STREAMED
    if product.name not in _LAYER:
        bar = Bar(bar.unit, peer_source=bar.peer_source)
    name = f"matmul {product.name} {columns} x {depth}, M {rows}"
    work = Work(bytes=2 * columns * depth, flops=2 * rows * columns * depth)
    measure = functools.partial(_measure, bench.timing, name, programs, product, (x, w), calls)
    return Case(name, work, bar, programs, measure)


def _xla(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _xla_gated(x: jax.Array, w: jax.Array) -> jax.Array:
    gate, up = jnp.split(_xla(x, w).astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


def _measure(
    timing: Timing,
    name: str,
    programs: list[Program],
    product: Product,
    operands: tuple[Any, Any],
    calls: int,
) -> Measurement:
    x, w = operands
    pairs = [
        (random_bf16(2 * call, x.shape), random_bf16(2 * call + 1, w.shape))
        for call in range(calls)
    ]
    states = []
    for program, who in zip(programs, (name, f"XLA's {name}"), strict=True):
        results = program(hollow(program.state), *pairs)
        for call in (0, calls - 1):
            _check(who, product, *pairs[call], results[call])
        states.append(results)
    sustained = x.shape[0] >= _SUSTAINED_ROWS
    once = Timing(1, max(timing.batch_s, _SUSTAINED_S)) if sustained else timing
    samples: list[list[float]] = [[], []]
    for _ in range(timing.reps if sustained else 1):
        for index, program in enumerate(programs):
            samples_s, states[index] = once.samples(program, states[index], *pairs)
            samples[index] += samples_s
    return Measurement(samples[0], peer_samples_s=samples[1])


def _check(name: str, product: Product, x: jax.Array, w: jax.Array, y: Any) -> None:
    """All rows of some columns in float64, and no NaN anywhere."""
    found = np.asarray(y).astype(np.float32)
    if not np.isfinite(found).all():
        raise WrongResultError(f"{name}: NaN or infinity")
    at = np.unique(np.linspace(0, found.shape[1] - 1, _CHECKED_COLUMNS).astype(int))
    expected = reference.float64(x) @ reference.float64(w[at]).T
    if product.gated:
        up = reference.float64(x) @ reference.float64(w[at + found.shape[1]]).T
        expected = expected / (1.0 + np.exp(-expected)) * up
    reference.require_close(name, found[:, at], expected)
