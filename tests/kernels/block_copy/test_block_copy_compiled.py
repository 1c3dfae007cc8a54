"""Block copies: compiled for CPU and TPUs, lowered for CUDA; the arena stays in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.block_copy import copy, gather, scatter
from lumen_kernels.target import CPU, HOPPER, Target

from tools.aot.hlo_checks import arena_problems, memory_of
from tools.aot.topologies import SMALLEST, devices_of

BF16 = jnp.bfloat16
IN_PLACE = (scatter, copy)
# An 8B with all its layers, a 70B's part on eight devices, packed heads, wide ones.
SHAPES = [
    ((2, 16, 128), 256, 1),
    ((2, 128, 128), 80, 2),
    ((1, 64, 128), 96, 4),
    ((2, 16, 256), 3, 3),
]


def program(operation, slots_per_block: int, target: Target):
    if operation is scatter:
        return functools.partial(scatter, target=target)
    return functools.partial(operation, slots_per_block=slots_per_block, target=target)


def structs(operation, page, slots_per_block: int, segments: int, blocks: int, arena_bytes: int):
    bytes_of_block = slots_per_block * int(np.prod(page)) * 2
    slots = max(arena_bytes // segments // bytes_of_block, 1) * slots_per_block
    arena = (jax.ShapeDtypeStruct((slots, *page), BF16),) * segments
    ids = jax.ShapeDtypeStruct((blocks,), jnp.int32)
    if operation is scatter:
        return arena, ids, jax.ShapeDtypeStruct((blocks, slots_per_block, *page), BF16)
    return (arena, ids, ids) if operation is copy else (arena, ids)


def jitted(operation, slots_per_block, target, **shardings):
    donated = {"donate_argnums": 0} if operation in IN_PLACE else {}
    return jax.jit(program(operation, slots_per_block, target), **donated, **shardings)


@pytest.mark.parametrize("operation", IN_PLACE)
@pytest.mark.parametrize(("page", "size", "segments"), SHAPES, ids=str)
def test_cpu_works_in_place(operation, page, size, segments):
    arguments = structs(operation, page, size, segments, 1, 1 << 29)
    memory = memory_of(jitted(operation, size, CPU).lower(*arguments).compile())
    arena = sum(segment.size * 2 for segment in arguments[0])
    assert memory.alias_size_in_bytes == arena
    assert memory.temp_size_in_bytes < 64 << 20  # a block or two


@pytest.mark.parametrize("slice_", SMALLEST, ids=lambda one: one.generation)
@pytest.mark.parametrize("operation", [gather, scatter, copy])
@pytest.mark.parametrize(("page", "size", "segments"), SHAPES, ids=str)
def test_tpu_program(slice_, operation, page, size, segments):
    devices = devices_of(slice_)
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    arguments = structs(operation, page, size, segments, 67, 1 << 30)
    target = Target.of(devices)
    program = jitted(operation, size, target, in_shardings=sharding, out_shardings=sharding)
    compiled = program.lower(*arguments).compile()
    if operation in IN_PLACE:
        assert not arena_problems(compiled, arguments[0])
    assert memory_of(compiled).temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("blocks", [1, 64])
@pytest.mark.parametrize("operation", [gather, scatter, copy])
@pytest.mark.parametrize(("page", "size", "segments"), SHAPES, ids=str)
def test_cuda_program(operation, page, size, segments, blocks):
    """110 GB: more bytes, and more elements, than 32 bits count."""
    arguments = structs(operation, page, size, segments, blocks, 110 * 10**9)
    exported = jax.export.export(jitted(operation, size, HOPPER), platforms=["cuda"])(*arguments)
    text = exported.mlir_module()
    aliased = segments if operation in IN_PLACE else 0
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == aliased
    assert text.count("tf.aliasing_output") == aliased
