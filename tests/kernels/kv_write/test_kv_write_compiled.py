"""KV write: compiled for CPU and TPUs, lowered for CUDA; the arena stays in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.kv_write import write
from lumen_kernels.target import CPU, HOPPER, Target

from tests.kernels.kv_write.streams import LAYOUTS, Layout
from tools.aot.hlo_checks import arena_problems, memory_of
from tools.aot.topologies import SMALLEST, devices_of

MIB = 1 << 20


def program(target: Target):
    return functools.partial(write, target=target)


def structs(layout: Layout, tokens: int, slots: int):
    """Arguments of a write into an arena of so many slots."""
    new = jax.ShapeDtypeStruct((tokens, layout.heads, layout.head_dim), layout.dtype)
    per_token = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    share = slots // layout.segments // layout.heads * layout.heads
    arena = (jax.ShapeDtypeStruct((share, *layout.page), layout.dtype),) * layout.segments
    return new, new, arena, per_token, per_token, jax.ShapeDtypeStruct((), jnp.int32)


def large(layout: Layout) -> int:
    """Slots of an arena far larger than a TPU's VMEM."""
    return 600 * MIB // (int(np.prod(layout.page)) * np.dtype(layout.dtype).itemsize)


@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(8, 64), Layout(8, 128, dtype=np.float32)])
def test_cpu_writes_in_place(layout):
    arguments = structs(layout, 64, large(layout))
    compiled = jax.jit(program(CPU), donate_argnums=2).lower(*arguments).compile()
    memory = memory_of(compiled)
    arena = sum(segment.size * segment.dtype.itemsize for segment in arguments[2])
    assert memory.alias_size_in_bytes == arena
    assert memory.temp_size_in_bytes < 4 * MIB


def check_tpu(slice_, layout: Layout, tokens: int) -> None:
    devices = devices_of(slice_)
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    arguments = structs(layout, tokens, large(layout))
    jitted = jax.jit(
        program(Target.of(devices)),
        in_shardings=sharding,
        out_shardings=sharding,
        donate_argnums=2,
    )
    compiled = jitted.lower(*arguments).compile()
    assert not arena_problems(compiled, arguments[2])
    # New rows travel as 32-bit words, which XLA may have to tile anew.
    words = tokens * layout.heads * layout.page[0] * layout.page[2] * 4
    assert memory_of(compiled).temp_size_in_bytes < 4 * MIB + 3 * words


@pytest.mark.parametrize("slice_", SMALLEST, ids=lambda one: one.generation)
@pytest.mark.parametrize("layout", LAYOUTS[::2], ids=str)
def test_tpu_program(slice_, layout):
    check_tpu(slice_, layout, 256)


@pytest.mark.slow
@pytest.mark.parametrize("slice_", SMALLEST, ids=lambda one: one.generation)
@pytest.mark.parametrize("tokens", [1, 33, 256, 8192])
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(8, 128, dtype=np.float32)], ids=str)
def test_tpu_program_of_every_size(slice_, layout, tokens):
    check_tpu(slice_, layout, tokens)


@pytest.mark.parametrize("tokens", [1, 33, 8192])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cuda_program(layout, tokens):
    """110 GB of an 8B model: more bytes, and more elements, than 32 bits count."""
    slots = 110 * 10**9 // (2 * int(np.prod(layout.page)))
    jitted = jax.jit(program(HOPPER), donate_argnums=2)
    exported = jax.export.export(jitted, platforms=["cuda"])(*structs(layout, tokens, slots))
    text = exported.mlir_module()
    assert text.count("mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == layout.segments
    assert text.count("tf.aliasing_output") == layout.segments
