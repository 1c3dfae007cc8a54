"""The Hopper kernel in its interpreter, and lowered for the chip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lumen_kernels.matmul import matmul, mosaic_gpu, rule, silu_gated
from lumen_kernels.matmul.rule import Tiling
from lumen_kernels.target import CPU, HOPPER, Backend, Target

LLAMA_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ONE = Tiling(
    tile_n=32, tile_k=128, splits=1, clusters=4, rows=64, warpgroups=1, stages=3, stored=32
)
TILINGS = {
    # name: (m, n, k, tiling)
    "one row": (1, 64, 256, ONE),
    "n not a multiple of the tile, several tiles per block": (8, 296, 256, ONE),
    "m not a multiple of 8": (21, 96, 512, ONE),
    "few rows, more stages than steps": (5, 64, 128, ONE),
    "a tile of 56 rows": (64, 120, 256, dataclasses.replace(ONE, tile_n=56, stored=56)),
    "two warpgroups": (128, 64, 256, dataclasses.replace(ONE, warpgroups=2, tile_k=64)),
    "second warpgroup half full": (72, 64, 256, dataclasses.replace(ONE, warpgroups=2)),
    "split": (33, 128, 512, dataclasses.replace(ONE, splits=2, clusters=2, tile_n=64)),
    "split unevenly, several tiles": (
        16,
        200,
        640,
        dataclasses.replace(ONE, splits=2, clusters=2, tile_n=64, stored=16),
    ),
    "x shared": (16, 200, 256, dataclasses.replace(ONE, sharing=2, clusters=2)),
    "staggered": (8, 256, 512, dataclasses.replace(ONE, staggered=True)),
    "rows over two blocks, the second half full": (
        160,
        200,
        256,
        dataclasses.replace(ONE, warpgroups=2, row_blocks=2, clusters=2),
    ),
    "rows over two blocks, x shared": (
        256,
        128,
        256,
        dataclasses.replace(ONE, warpgroups=2, row_blocks=2, sharing=2, clusters=1),
    ),
    "rows over two blocks, split": (
        150,
        128,
        512,
        dataclasses.replace(
            ONE, warpgroups=2, row_blocks=2, splits=2, clusters=1, tile_n=64, stored=16
        ),
    ),
    "rows of 128": (
        256,
        112,
        256,
        Tiling(56, 64, 1, 2, rows=128, warpgroups=2, stages=2, stored=56, registers=216),
    ),
}


def operands(m, n, k, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=s), jnp.bfloat16) for s in ((m, k), (n, k)))


def relative_error(got, x, w):
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("name", TILINGS)
def test_the_kernel_multiplies(name):
    m, n, k, tiling = TILINGS[name]
    x, w = operands(m, n, k)
    out = mosaic_gpu.matmul(x, w, tiling, jnp.float32, interpret=True)
    assert out.dtype == jnp.float32
    assert relative_error(out, x, w) < 1e-6
    rounded = mosaic_gpu.matmul(x, w, tiling, jnp.bfloat16, interpret=True)
    np.testing.assert_array_equal(rounded, out.astype(jnp.bfloat16))


GATED = {
    # name: (m, inner, k, tiling)
    "inner not a multiple of the tile, several tiles per block": (
        13,
        104,
        256,
        dataclasses.replace(ONE, clusters=2, stored=16),
    ),
    "two warpgroups, x shared": (
        72,
        64,
        256,
        dataclasses.replace(ONE, warpgroups=2, sharing=2, clusters=2, stored=16),
    ),
    "rows over two blocks": (
        140,
        56,
        256,
        dataclasses.replace(
            ONE, tile_n=112, tile_k=64, warpgroups=2, row_blocks=2, clusters=1, stored=56
        ),
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_the_kernel_gates(name):
    m, inner, k, tiling = GATED[name]
    x, w = operands(m, 2 * inner, k)
    w = w * jnp.bfloat16(k**-0.5)
    out = mosaic_gpu.matmul(x, w, tiling, jnp.float32, gated=True, interpret=True)
    gate, up = np.split(np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, 2, axis=1)
    want = gate / (1 + np.exp(-gate)) * up
    assert out.shape == (m, inner)
    assert np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want) < 1e-6
    rounded = mosaic_gpu.matmul(x, w, tiling, jnp.bfloat16, gated=True, interpret=True)
    np.testing.assert_array_equal(rounded, out.astype(jnp.bfloat16))


@pytest.mark.parametrize("m", [1, 8, 13, 32, 64, 72, 128, 256])
@pytest.mark.parametrize("name", LLAMA_8B)
def test_it_lowers_for_hopper(name, m):
    n, k = LLAMA_8B[name]
    dtype = jnp.float32 if name == "head" else jnp.bfloat16
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (n, k)))
    program = jax.jit(lambda x, w: matmul(x, w, target=HOPPER, out_dtype=dtype))
    exported = jax.export.export(program, platforms=["cuda"])(x, w)
    assert exported.out_avals[0].shape == (m, n)
    ours = rule.tiling(m, (n, k), x.dtype, dtype, HOPPER) is not None
    assert ("custom_call @mosaic_gpu" in exported.mlir_module()) == ours


@pytest.mark.parametrize("m", [1, 8, 17, 32, 64, 72, 128, 136, 200, 256])
def test_the_gated_product_lowers_for_hopper(m):
    n, k = LLAMA_8B["gate_up"]
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((m, k), (n, k)))
    program = jax.jit(lambda x, w: silu_gated(x, w, target=HOPPER))
    exported = jax.export.export(program, platforms=["cuda"])(x, w)
    assert exported.out_avals[0].shape == (m, n // 2)
    module = exported.mlir_module()
    assert ("gated_matmul" in module) == (16 < m <= 128 or m > 192)
    assert ("custom_call @mosaic_gpu" in module) == (m != 1 and m != 136)


def test_the_kernel_takes_what_it_was_measured_to_win():
    def ours(m, name, dtype=jnp.bfloat16, target=HOPPER):
        return rule.tiling(m, LLAMA_8B[name], jnp.dtype(dtype), jnp.bfloat16, target)

    def gated(m, shape=LLAMA_8B["gate_up"], target=HOPPER):
        return rule.gated_tiling(m, shape, jnp.dtype(jnp.bfloat16), target)

    taken = {name: [m for m in (1, 2, 8, 32, 64, 128, 256) if ours(m, name)] for name in LLAMA_8B}
    assert taken == {
        "qkv": [32, 64, 128, 256],
        "o": [32, 64, 128],
        "gate_up": [2, 8, 64, 256],
        "down": [32, 64],
        "head": [],
    }
    cuts = {(m, name): ours(m, name) for name, ms in taken.items() for m in ms}
    cuts |= {(m, "gated"): gated(m) for m in (32, 64, 128, 256)}
    shapes = {
        key: (cut.tile_n, cut.tile_k, cut.splits, cut.sharing, cut.row_blocks, cut.stages)
        for key, cut in cuts.items()
    }
    assert shapes == {
        (2, "gate_up"): (56, 256, 1, 1, 1, 5),
        (8, "gate_up"): (56, 256, 1, 1, 1, 5),
        (64, "gate_up"): (112, 128, 1, 1, 1, 4),
        (256, "gate_up"): (224, 64, 1, 1, 2, 4),
        (32, "gated"): (112, 128, 1, 1, 1, 5),
        (64, "gated"): (112, 128, 1, 1, 1, 4),
        (128, "gated"): (224, 64, 1, 2, 1, 4),
        (256, "gated"): (112, 64, 1, 2, 1, 4),
        (32, "qkv"): (48, 128, 1, 1, 1, 10),
        (64, "qkv"): (48, 128, 1, 1, 1, 7),
        (128, "qkv"): (48, 64, 1, 1, 1, 9),
        (256, "qkv"): (96, 64, 1, 1, 2, 7),
        (32, "o"): (32, 128, 1, 1, 1, 13),
        (64, "o"): (32, 128, 1, 1, 1, 9),
        (128, "o"): (32, 128, 1, 1, 1, 5),
        (32, "down"): (32, 128, 1, 1, 1, 13),
        (64, "down"): (64, 128, 2, 1, 1, 6),
    }
    for cut in cuts.values():
        assert cut.splits * cut.sharing * cut.row_blocks <= 2
    assert [m for m in (1, 16, 17, 128, 129, 192, 193, 256, 257) if gated(m)] == [17, 128, 193, 256]
    assert gated(64, (12288, 4096)) is None
    quarter = gated(32, (14336, 8192))  # of Llama-3.1-70B's
    assert (quarter.tile_n, quarter.stages) == (112, 5)
    assert gated(64, (28680, 4096)) is None
    assert gated(64, target=CPU) is None
    for target in (CPU, Target(Backend.XLA, "gpu"), Target(Backend.MOSAIC_TPU, "tpu")):
        assert ours(64, "o", target=target) is None
    assert ours(64, "o", jnp.float32) is None
    assert ours(64, "o", jnp.float16) is None
    half_a_head = (64128, 4096)  # its logits stay float32, and it was not measured
    assert rule.tiling(64, half_a_head, jnp.bfloat16, jnp.float32, HOPPER) is None


def test_long_products_of_some_rows_are_best_made_in_parts():
    def parts(m, name="down", dtype=jnp.bfloat16, target=HOPPER):
        return rule.parts(m, LLAMA_8B[name], jnp.dtype(dtype), target)

    assert {m: parts(m) for m in (1, 96, 97, 128, 256, 257)} == {
        1: 1, 96: 1, 97: 2, 128: 2, 256: 2, 257: 1,
    }  # fmt: skip
    assert parts(128, "o") == parts(128, dtype=jnp.float32) == parts(128, target=CPU) == 1


@pytest.mark.parametrize("shape", [(896, 896), (4100, 4096), (4096, 4000), (2048, 8192)])
def test_small_and_unaligned_matrices_stay_with_xla(shape):
    dtype = jnp.dtype(jnp.bfloat16)
    assert all(rule.tiling(m, shape, dtype, dtype, HOPPER) is None for m in (1, 8, 64, 128))


def test_a_row_has_the_same_bits_whatever_the_others_are():
    x, w = operands(40, 64, 256)
    tiling = TILINGS["a tile of 56 rows"][3]
    alone = dataclasses.replace(tiling, tile_n=32, stored=32)
    whole = mosaic_gpu.matmul(x, w, alone, jnp.float32, interpret=True)
    part = mosaic_gpu.matmul(x[:3], w, alone, jnp.float32, interpret=True)
    np.testing.assert_array_equal(whole[:3], part)


@pytest.mark.parametrize("m", [17, 72, 200])
def test_the_operations_run_the_kernel_as_the_rule_cuts_it(m, monkeypatch):
    monkeypatch.setattr(rule, "_SMALL", 0)
    two_cores = Target(Backend.MOSAIC_GPU, "gpu", cores=2, interpret=True)
    x, w = operands(m, 272, 256)
    w = w * jnp.bfloat16(256**-0.5)
    assert rule.gated_tiling(m, w.shape, x.dtype, two_cores) is not None
    out = silu_gated(x, w, target=two_cores)
    unfused = silu_gated(x, w, target=CPU)
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(unfused, np.float32), rtol=0.05, atol=0.02
    )
    narrow = w[:112]
    taken = rule.tiling(m, narrow.shape, x.dtype, x.dtype, two_cores) is not None
    assert taken == (m <= 128)
    assert relative_error(matmul(x, narrow, target=two_cores), x, narrow) < 3e-3
