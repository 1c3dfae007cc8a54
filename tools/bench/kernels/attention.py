"""What measuring decode and prefill has in common: chains over layers, and their checks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tools.bench.kernels import reference
from tools.bench.kernels.case import WrongResultError
from tools.bench.kernels.operands import hollow
from tools.bench.kernels.pool import Arena, Ints, KvPool


class State(NamedTuple):
    """Between two launches of a chain of attention calls, one per layer.

    q: input of the first layer, output of the last. first: output of the first layer; last_in:
    input of the last one: with these two layers can be checked. turn: launches so far.
    """

    q: jax.Array
    first: jax.Array
    last_in: jax.Array
    arena: Arena
    turn: jax.Array


def state_struct(shape: tuple[int, ...], pool: KvPool) -> State:
    """Shapes, for q of `shape`."""
    q = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    fields: tuple[Any, ...] = (q, q, q, pool.struct, jax.ShapeDtypeStruct((), jnp.int32))
    return State(*fields)


def fresh_state(q: jax.Array, pool: KvPool) -> State:
    """Before the first launch; q stays the caller's."""
    struct = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return State(jnp.copy(q), hollow(struct), hollow(struct), pool.arena, jnp.int32(0))


def layer_offsets(pool: KvPool, calls: int, layers: int) -> tuple[jax.Array, ...]:
    """Of `calls` layers in a row; a scalar array each, which costs a launch nothing."""
    heads = pool.model.kv_heads
    return tuple(jnp.int32(call % layers * heads) for call in range(calls))


class Sample(NamedTuple):
    """Queries of one row to check. at: their indices in q; positions: in the row's context."""

    table: Ints
    at: Ints
    positions: Ints


def check(
    what: str, pool: KvPool, q: jax.Array, state: State, samples: Sequence[Sample], last: int
) -> None:
    """Compare the first and the last layer of one launch with float64 over what the arena holds.

    q: what the first layer got. last: layer offset of the last one. Raises WrongResultError.
    """
    for name, array in (("the first layer", state.first), ("the last layer", state.q)):
        if not bool(_finite(array)):
            raise WrongResultError(f"{what}: {name} gives NaN or infinity")
    for sample in samples:
        tokens = np.arange(int(sample.positions.max()) + 1)
        bases = sample.table[tokens // pool.block_size].astype(np.int64)
        for given, found, offset in ((q, state.first, 0), (state.last_in, state.q, last)):
            k, v = pool.tokens(bases, tokens % pool.block_size, offset)
            expected = reference.attention(
                reference.float64(_rows(given, sample.at)),
                reference.float64(k),
                reference.float64(v),
                sample.positions,
                pool.model.scale,
            )
            where = f"{what}, layer offset {offset}"
            reference.require_close(where, _rows(found, sample.at), expected)


def require_same_again(what: str, first: jax.Array, again: jax.Array) -> None:
    """A result that changes from run to run is a race. Raises WrongResultError."""
    if not bool(_same_bits(first, again)):
        raise WrongResultError(f"{what}: the same launch gave other bits the second time: a race")


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array))


@jax.jit
def _rows(array: jax.Array, at: jax.Array) -> jax.Array:
    return array[at]


@jax.jit
def _same_bits(one: jax.Array, other: jax.Array) -> jax.Array:
    bits = [lax.bitcast_convert_type(x, jnp.uint16) for x in (one, other)]
    return jnp.all(bits[0] == bits[1])
