"""The checks of compiled programs find what they look for, in programs known to do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tools.aot.hlo_checks import arena_problems, weight_problems
from tools.aot.topologies import SLICES, devices_of

ARENA = (16384, 2, 64, 128)  # 512 MiB: no VMEM holds it
TOKENS = 256


@pytest.fixture(scope="module")
def placed():
    """Generation to the sharding of arrays on one of its devices."""
    found = {}

    def sharding(generation):
        if generation not in found:
            devices = devices_of(SLICES[generation][0])
            found[generation] = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
        return found[generation]

    return sharding


def arena_program(write, sharding, donate=True):
    """Compile a write of KV [tokens, 2, 128] into the arena, and the struct of the arena."""
    arena = jax.ShapeDtypeStruct(ARENA, jnp.bfloat16, sharding=sharding)
    values = jax.ShapeDtypeStruct((TOKENS, 2, 128), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((TOKENS,), jnp.int32, sharding=sharding)
    program = jax.jit(write, donate_argnums=(0,) if donate else ())
    return program.lower(arena, values, ids, ids).compile(), [arena]


def flat_write(arena, values, slots, offsets):
    rows = (slots[:, None] * 2 + jnp.arange(2)) * ARENA[2] + offsets[:, None]
    flat = arena.reshape(-1, ARENA[3]).at[rows].set(values, mode="drop")
    return flat.reshape(arena.shape)


def natural_write(arena, values, slots, offsets):
    heads = jnp.arange(8)
    values = jnp.broadcast_to(values[:, None], (TOKENS, 8, 2, 128))
    at = arena.at[slots[:, None] + heads, :, offsets[:, None]]
    return at.set(values, mode="drop")


def transposed(arena, values, slots, offsets):
    return arena.transpose(0, 1, 3, 2).reshape(arena.shape)


def test_a_write_in_place_has_no_problem(placed):
    assert arena_problems(*arena_program(flat_write, placed("v6e"))) == []


def test_the_natural_scatter_is_found_to_copy_the_arena(placed):
    found = arena_problems(*arena_program(natural_write, placed("v6e")))
    assert any("enough to hide a copy" in problem for problem in found)
    assert any("as large as a segment" in problem for problem in found)


def test_a_transposed_arena_is_found(placed):
    found = arena_problems(*arena_program(transposed, placed("v5e")))
    assert any("as large as a segment" in problem for problem in found)


def test_an_arena_that_is_not_donated_is_found(placed):
    found = arena_problems(*arena_program(flat_write, placed("v6e"), donate=False))
    assert any(problem.startswith("the alias of outputs to inputs covers 0") for problem in found)
    assert any("copy" in problem and "as large as" in problem for problem in found)


def stacked_weights(sharding, layout=None):
    """A scan over stacked matrices, which tpu7x wants in another layout than the usual one."""

    def apply(hidden, stack):
        def layer(hidden, matrix):
            return jax.lax.dot_general(hidden, matrix, (((1,), (0,)), ((), ()))), None

        return jax.lax.scan(layer, hidden, stack)[0]

    place = sharding if layout is None else Format(layout, sharding)
    hidden = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16, sharding=sharding)
    stack = jax.ShapeDtypeStruct((4, 4096, 4096), jnp.bfloat16, sharding=place)
    program = jax.jit(apply, in_shardings=(sharding, place))
    return program.lower(hidden, stack).compile(), [stack]


def test_weights_in_another_layout_are_found_to_be_copied_on_tpu7x(placed):
    found = weight_problems(*stacked_weights(placed("tpu7x")))
    assert len(found) == 1
    assert "bf16[4,4096,4096]" in found[0]
    assert "a copy of weights" in found[0]


def test_weights_in_the_layout_wanted_are_not(placed):
    wanted = Layout((0, 1, 2), ((16, 128), (2, 1)))
    assert weight_problems(*stacked_weights(placed("tpu7x"), wanted)) == []
    assert weight_problems(*stacked_weights(placed("v6e"))) == []
