"""The Mosaic TPU attention kernels, compiled for five generations on a machine without a TPU."""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.paged_attention.decode import mosaic_tpu as decode
from lumen_kernels.paged_attention.mosaic_tpu_blocks import (
    LANES,
    MOST_COLUMNS,
    decode_blocks,
    prefill_blocks,
    supports,
)
from lumen_kernels.paged_attention.options import Options
from lumen_kernels.paged_attention.prefill import mosaic_tpu as prefill
from lumen_kernels.target import Backend, Target

from tools.aot.hlo_checks import arena_problems, memory_of
from tools.aot.topologies import SMALLEST, devices_of

MIB = 1 << 20
ARENA_BYTES = 600 * MIB  # beyond any chip's vector memory: XLA may place a small one there


@dataclass(frozen=True)
class Shape:
    """What is compiled. table: rows and columns; tokens: per row in decode, in all in prefill.

    layers: in decode. The second one's write must not copy what the first one has read.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    tokens: int = 1
    table: tuple[int, int] = (64, 128)
    segments: int = 1
    dtype: Any = jnp.bfloat16
    window: int | None = None
    soft_cap: float | None = None
    with_lse: bool = False
    layers: int = 1

    def __str__(self) -> str:
        """For the names of tests: what differs from the defaults."""
        described = f"{self.heads}x{self.kv_heads}x{self.head_dim}-{self.block_size}"
        for one in fields(self)[4:]:
            if (value := getattr(self, one.name)) != one.default:
                described += f"-{one.name}={getattr(value, '__name__', value)}"
        return described

    @property
    def arena(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        packed = self.head_dim == 64
        page = (1, self.block_size, 128) if packed else (2, self.block_size, self.head_dim)
        slots = ARENA_BYTES // (int(np.prod(page)) * jnp.dtype(self.dtype).itemsize)
        each = slots // self.segments // self.kv_heads
        return tuple(
            jax.ShapeDtypeStruct(((each + i) * self.kv_heads, *page), self.dtype)
            for i in range(self.segments)
        )

    def options(self, target: Target) -> Options:
        return Options(self.kv_heads, 0.1, self.window, self.soft_cap, self.with_lse, target)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def check(slice_, program, arguments, arena, temporaries: int) -> None:
    """Compile for one device; the arena, which is returned, is donated and stays in place.

    temporaries: most bytes of them.
    """
    devices = devices_of(slice_)
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    jitted = jax.jit(
        lambda arena, *rest: program(Target.of(devices), arena, *rest),
        in_shardings=sharding, out_shardings=sharding, donate_argnums=0,
    )  # fmt: skip
    compiled = jitted.lower(arena, *arguments).compile()
    assert not arena_problems(compiled, arena)
    assert memory_of(compiled).temp_size_in_bytes < temporaries


def check_decode(slice_, shape: Shape) -> None:
    described = arena_shape("test", shape.arena, shape.head_dim)
    rows, n = shape.table[0], shape.tokens

    def program(target, arena, q, k, v, tables, lengths, layer_offset):
        options = shape.options(target)
        for layer in range(shape.layers):
            offset = layer_offset + layer * shape.kv_heads
            q, lse, arena = decode.attend_and_write(
                q, k, v, arena, described, tables, lengths, offset, options
            )
        return q, lse, arena

    new = jax.ShapeDtypeStruct((rows, n, shape.kv_heads, shape.head_dim), shape.dtype)
    q = jax.ShapeDtypeStruct((rows, n, shape.heads, shape.head_dim), shape.dtype)
    arguments = (q, new, new, ints(*shape.table), ints(rows), ints())
    # Queries and outputs, and log-sum-exps 128 lanes wide.
    most = 8 * MIB + 6 * q.size * q.dtype.itemsize
    check(slice_, program, arguments, shape.arena, most)


def check_prefill(slice_, shape: Shape) -> None:
    described = arena_shape("test", shape.arena, shape.head_dim)

    def program(target, arena, q, tables, starts, counts, layer_offset):
        out, lse = prefill.attend(
            q, arena, described, tables, starts, counts, layer_offset, shape.options(target)
        )
        return out, lse, arena

    q = jax.ShapeDtypeStruct((shape.tokens, shape.heads, shape.head_dim), shape.dtype)
    rows = ints(shape.table[0])
    # Queries and outputs in tiles, at most twice the stream, and one more pass over them.
    most = 16 * MIB + 6 * q.size * q.dtype.itemsize
    check(slice_, program, (q, ints(*shape.table), rows, rows, ints()), shape.arena, most)


DECODE = [
    Shape(32, 8, 128, 16, layers=3),
    Shape(8, 1, 128, 64, table=(63, 512), with_lse=True),  # 70B over eight devices
    Shape(9, 3, 64, 16, segments=2),
    Shape(16, 8, 256, 32, soft_cap=50.0, window=4096),
    Shape(32, 8, 128, 16, table=(1024, 2048), segments=4, with_lse=True),
]
PREFILL = [
    Shape(32, 8, 128, 16, tokens=2048, table=(4, 512)),
    Shape(8, 1, 128, 64, tokens=2048, table=(3, 512), with_lse=True),
    Shape(9, 3, 64, 16, tokens=512, table=(4, 128), segments=2),
    Shape(16, 8, 256, 32, tokens=512, table=(64, 8200), soft_cap=50.0, window=4096),
]
MORE_DECODE = [
    *(Shape(8 * group, 8, 128, 128) for group in (1, 2, 3, 5, 6, 7)),
    *(Shape(16, 1, head_dim, 16) for head_dim in (64, 128, 256)),
    *(Shape(2, 2, 64, block_size) for block_size in (16, 32, 64, 128)),
    Shape(1, 1, 256, 16),
    Shape(32, 32, 128, 16, table=(256, 64), with_lse=True),
    Shape(40, 40, 128, 16, table=(1, 64)),
    Shape(32, 8, 128, 16, tokens=4),
    Shape(12, 4, 128, 16, tokens=3, segments=2),
    Shape(8, 1, 128, 16, table=(5, MOST_COLUMNS)),
    Shape(8, 4, 128, 16, dtype=jnp.float32),
    Shape(6, 2, 128, 16, dtype=jnp.float32, window=100),
]
MORE_PREFILL = [
    *(Shape(8 * group, 8, 128, 128, tokens=512, table=(2, 64)) for group in (1, 2, 3, 5, 6, 7)),
    *(Shape(16, 1, head_dim, 16, tokens=512, table=(1, 64)) for head_dim in (64, 128, 256)),
    Shape(32, 32, 128, 16, tokens=2048, table=(4, 64), with_lse=True),
    Shape(32, 8, 128, 16, tokens=16384, table=(1, 1024)),
    Shape(32, 8, 128, 16, tokens=2048, table=(32, 1024), segments=4),
    Shape(32, 8, 128, 16, tokens=16, table=(4, 1024)),
    Shape(8, 4, 128, 16, tokens=512, table=(4, 64), dtype=jnp.float32),
]
slices = pytest.mark.parametrize("slice_", SMALLEST, ids=lambda one: one.generation)


@slices
@pytest.mark.parametrize("shape", DECODE, ids=str)
def test_decode_compiles_and_copies_no_arena(slice_, shape: Shape) -> None:
    check_decode(slice_, shape)


@slices
@pytest.mark.parametrize("shape", PREFILL, ids=str)
def test_prefill_compiles_and_copies_no_arena(slice_, shape: Shape) -> None:
    check_prefill(slice_, shape)


@pytest.mark.slow
@slices
@pytest.mark.parametrize("shape", MORE_DECODE, ids=str)
def test_decode_of_every_kind_compiles(slice_, shape: Shape) -> None:
    check_decode(slice_, shape)


@pytest.mark.slow
@slices
@pytest.mark.parametrize("shape", MORE_PREFILL, ids=str)
def test_prefill_of_every_kind_compiles(slice_, shape: Shape) -> None:
    check_prefill(slice_, shape)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "?"])
def test_blocks_fit_their_generation(kind: str) -> None:
    cores = 2 if kind in ("TPU v4", "TPU v5") else 1
    target = Target(Backend.MOSAIC_TPU, "tpu", kind, cores)
    physical = {"TPU v4": 16, "TPU v5": 64, "TPU7x": 64, "?": 16}.get(kind, 128) * MIB
    for head_dim in (64, 128, 256):
        for kv_heads, group in ((1, 16), (2, 3), (8, 4), (8, 8), (40, 1)):
            for block_size in (16, 128):
                shape = ArenaShape((), block_size, head_dim, head_dim == 64)
                for formula, tokens in ((decode_blocks, 1), (prefill_blocks, 2048)):
                    blocks = formula(
                        shape, jnp.bfloat16, kv_heads * group, kv_heads, tokens, (4, 512), target
                    )
                    assert blocks.head_groups * blocks.item_groups % cores == 0
                    assert kv_heads % blocks.head_groups == 0
                    assert blocks.chunk_tokens % max(block_size, LANES) == 0
                    assert blocks.pass_rows % blocks.tile_tokens == 0
                    assert group * blocks.tile_tokens % blocks.pass_rows == 0
                    assert blocks.vmem_limit_bytes <= physical


def test_what_is_supported() -> None:
    assert supports(ArenaShape((), 16, 128, packed=False), jnp.bfloat16)
    assert supports(ArenaShape((), 128, 64, packed=True), jnp.float32)
    assert not supports(ArenaShape((), 16, 64, packed=False), jnp.bfloat16)
    assert not supports(ArenaShape((), 8, 128, packed=False), jnp.bfloat16)
    assert not supports(ArenaShape((), 16, 128, packed=False), jnp.float16)
