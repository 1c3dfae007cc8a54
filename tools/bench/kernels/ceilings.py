"""What device and host can do at best: copies, a square matrix product, launches."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tools.bench.kernels import reference
from tools.bench.kernels.case import Bar, Bench, Case, Measurement, Work
from tools.bench.kernels.operands import random_bf16
from tools.bench.kernels.timing import Program, Timing

_PRODUCTS = 4


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of each kind. bytes_s: of device memory, read and written; flops_s: bfloat16;
    launch_s: what the host needs for a launch, one behind the other."""

    bytes_s: float
    flops_s: float
    launch_s: float


def cases(bench: Bench) -> list[Case]:
    """A device copy, an elementwise pass as XLA compiles it, a square matmul, an empty launch."""
    values = bench.sizes.ceiling_bytes // 2
    array = jax.ShapeDtypeStruct((values,), jnp.bfloat16)
    moved = Work(bytes=2 * bench.sizes.ceiling_bytes)

    def pass_of(name: str, function: Callable[..., Any]) -> Case:
        program = Program(function, array, (array,), 1)
        measure = functools.partial(_measure_pass, bench.timing, program, values)
        return Case(name, moved, Bar("TB/s"), [program], measure)

    counter = jax.ShapeDtypeStruct((), jnp.int32)
    count = Program(lambda old: old + 1, counter, (), 1)
    n = bench.sizes.ceiling_n
    square = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    product = Program(_products, square, (square,), _PRODUCTS, alone=True)
    return [
        pass_of("device copy", lambda old, x: jnp.copy(x)),
        pass_of("elementwise pass (XLA)", lambda old, x: -x),
        Case(
            f"matmul {n} x {n} x {n} (XLA)",
            Work(bytes=3 * 2 * n * n, flops=2 * n**3),
            Bar("TFLOP/s"),
            [product],
            functools.partial(_measure_products, bench.timing, product, n),
        ),
        Case(
            "launch of next to nothing",
            Work(bytes=0),
            Bar("us"),
            [count],
            lambda: Measurement(bench.timing.samples(count, jnp.int32(0))[0]),
        ),
    ]


def of_measurements(found: list[tuple[Case, Measurement]]) -> Ceilings:
    """The best copy and the best product among them."""
    rates = [(case, float(np.median(m.samples_s))) for case, m in found]
    return Ceilings(
        bytes_s=max(c.work.bytes / s for c, s in rates if not c.work.flops),
        flops_s=max(c.work.flops / s for c, s in rates if c.work.flops),
        launch_s=min(s for c, s in rates if not c.work.bytes),
    )


def _measure_pass(timing: Timing, program: Program, values: int) -> Measurement:
    samples_s, _ = timing.samples(
        program, jnp.zeros(values, jnp.bfloat16), random_bf16(0, (values,))
    )
    return Measurement(samples_s)


def _products(x: jax.Array, w: jax.Array) -> jax.Array:
    for _ in range(_PRODUCTS):
        x = lax.dot_general(x, w, (((1,), (1,)), ((), ())))
    return x


def _measure_products(timing: Timing, program: Program, n: int) -> Measurement:
    w = random_bf16(1, (n, n)) * jnp.bfloat16(n**-0.5)  # so that a chain of products stays finite
    samples_s, x = timing.samples(program, random_bf16(0, (n, n)), w)
    expected = np.isfinite(reference.float64(x[:1]))
    reference.require_equal("square matmul is finite", expected, np.ones_like(expected))
    return Measurement(samples_s)
