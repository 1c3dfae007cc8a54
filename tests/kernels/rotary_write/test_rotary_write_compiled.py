"""Rotation and KV write: compiled for CPU, lowered for CUDA; the arena stays in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.rotary_write import Projections, write
from lumen_kernels.target import CPU, HOPPER, Target

from tests.kernels.rotary_write.tokens import EPS, FAMILIES, Family
from tools.aot.hlo_checks import memory_of

MIB = 1 << 20


def program(family: Family, target: Target):
    operation = functools.partial(write, kv_heads=family.layout.heads, eps=EPS, target=target)
    return jax.jit(operation, donate_argnums=2)


def structs(family: Family, tokens: int, arena_bytes: int):
    """Arguments of a write into an arena of about so many bytes."""
    layout, struct = family.layout, jax.ShapeDtypeStruct
    columns = (family.q_heads + 2 * layout.heads) * layout.head_dim
    projections = Projections(
        struct((tokens, columns), layout.dtype),
        struct((columns,), jnp.float32) if family.bias else None,
        struct((2, layout.head_dim), jnp.float32) if family.norms else None,
    )
    slots = arena_bytes // (int(np.prod(layout.page)) * np.dtype(layout.dtype).itemsize)
    share = slots // layout.segments // layout.heads * layout.heads
    arena = (struct((share, *layout.page), layout.dtype),) * layout.segments
    rotation = struct((tokens, layout.head_dim), jnp.float32)
    return projections, rotation, arena, struct((2, tokens), jnp.int32), struct((), jnp.int32)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_cpu_writes_in_place(family):
    arguments = structs(family, 64, 600 * MIB)
    memory = memory_of(program(family, CPU).lower(*arguments).compile())
    arena = sum(segment.size * segment.dtype.itemsize for segment in arguments[2])
    assert memory.alias_size_in_bytes == arena
    assert memory.temp_size_in_bytes < 8 * MIB


@pytest.mark.parametrize("tokens", [1, 33, 8192])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_cuda_program(family, tokens):
    """110 GB of an 8B model: more bytes, and more elements, than 32 bits count."""
    exported = jax.export.export(program(family, HOPPER), platforms=["cuda"])(
        *structs(family, tokens, 110 * 10**9)
    )
    text = exported.mlir_module()
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == family.layout.segments
    assert text.count("tf.aliasing_output") == family.layout.segments
    # One launch: nothing is computed around it.
    assert "stablehlo.multiply" not in text
    assert "stablehlo.concatenate" not in text
    assert "stablehlo.slice" not in text
