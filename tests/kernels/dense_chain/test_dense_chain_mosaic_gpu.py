"""The Hopper kernel in its interpreter, and lowered for the chip."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from lumen_kernels import dense_chain as package
from lumen_kernels.dense_chain import (
    Meetings,
    Weights,
    cut,
    dense_chain,
    first_norm,
    mosaic_gpu,
    no_meetings,
    xla,
)
from lumen_kernels.target import CPU, HOPPER

from lumen.presets import preset
from tests.kernels.dense_chain.chain import (
    EPS,
    ROWS_OF_NORMS,
    Shape,
    exact,
    on,
    operands,
    run,
    worst_row,
)

ROUNDING = 7e-3  # of three or four products rounded to bfloat16: 4e-3 to 5.5e-3
LAST = "last layer"
SOME = Shape(128, 64, 192, 80)
CASES = {
    # name: (m, shape, cores, row of norms)
    "one row": (1, Shape(128, 64, 64, 48), 4, 0),
    f"{LAST}, uneven tiles": (3, Shape(128, 128, 192, None), 3, 2),
    "several tiles per block": (8, Shape(256, 64, 192, 160), 3, 1),
    "rows filled up to 16": (12, SOME, 4, 3),
    f"{LAST}, 16 rows": (16, Shape(128, 64, 64, None), 2, 4),
    "x shared": (24, SOME, 4, 1),
    f"{LAST}, x shared, a core left over": (32, Shape(128, 128, 64, None), 5, 5),
}
MORE = {
    f"{LAST}, one row": (1, Shape(128, 64, 64, None), 4, 5),
    "3 rows, long depths": (3, Shape(512, 512, 1024, 768), 4, 0),
    f"{LAST}, 8 rows": (8, Shape(256, 192, 320, None), 3, 1),
    f"{LAST}, rows filled up to 16": (12, Shape(128, 64, 128, None), 4, 3),
    "16 rows": (16, Shape(256, 64, 64, 272), 5, 4),
    f"{LAST}, 24 rows": (24, Shape(256, 64, 192, None), 7, 1),
    "24 rows, a core left over": (24, Shape(128, 64, 320, 80), 5, 1),
    "x shared by many": (32, Shape(512, 256, 448, 160), 10, 2),
    "rows filled up to 24, x shared": (17, Shape(128, 64, 64, 112), 4, 0),
    "one core": (32, Shape(128, 64, 64, 48), 1, 0),
}


@pytest.fixture
def kernel_alone(monkeypatch):
    """Layers as small as these go to the kernel, and nothing may go to XLA."""
    monkeypatch.setattr(cut, "_LEAST_WEIGHTS", 0)
    products = xla.run

    def refuse(*_):
        raise AssertionError("left to XLA")

    monkeypatch.setattr(xla, "run", refuse)
    return products


def check(case, products):
    m, shape, cores, norm = case
    given = operands(shape, m)
    found = run(given, norm, on(cores))
    attended, hidden, weights, norms = given
    by_products = products(attended, hidden, weights, norms[norm:], EPS, CPU, None)
    in_float64 = exact(given, norm)
    assert (found[1] is None) == (shape.qkv is None)
    for ours, theirs, wanted in zip(found, by_products, in_float64, strict=True):
        if ours is not None:
            assert ours.dtype == jnp.bfloat16
            assert ours.shape == theirs.shape
            assert worst_row(ours, wanted) < ROUNDING
            assert worst_row(ours, theirs) < 2 * ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_runs_the_chain(name, kernel_alone):
    check(CASES[name], kernel_alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_kernel_runs_more_chains(name, kernel_alone):
    check(MORE[name], kernel_alone)


def test_these_cases_cut_layers_in_every_way():
    """Sharing or not, several tiles per block, blocks without one in the last round, rings full."""
    cuts = [shape.cut(cut.rows_of(m), cores) for m, shape, cores, _ in CASES.values()]
    assert {one.sharing for one in cuts} == {1, 2}
    every = [(one, phase) for one in cuts for phase in one.phases]
    groups = [(one.groups(phase), one.clusters) for one, phase in every]
    assert any(count > clusters for count, clusters in groups)
    assert any(count % clusters for count, clusters in groups)
    tiles = [(phase.columns // one.tile(phase), one.sharing) for one, phase in every]
    assert any(count % sharing for count, sharing in tiles)
    turns = [
        (one.w_steps(phase) * math.ceil(one.groups(phase) / one.clusters), one.w_stages)
        for one, phase in every
    ]
    assert any(steps > stages for steps, stages in turns)


@pytest.fixture
def races(monkeypatch):
    """Names of what phases make in which the detector finds a race."""
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    launch, found = mosaic_gpu._launch, []

    def watched(cut, phases, *rest, **options):
        made = launch(cut, phases, *rest, **options)
        jax.block_until_ready(made)
        if gpu_callbacks.get_races().races_found:
            found.extend(phase.out for phase in phases)
        return made

    monkeypatch.setattr(mosaic_gpu, "_launch", watched)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("m", "qkv", "expected"),
    [
        (8, 80, []),
        (24, 96, []),
        # Five tiles for pairs of blocks: the last pair makes the same one, and stores it twice.
        (24, 80, ["projected"]),
    ],
)
def test_no_races(m, qkv, expected, races):
    """Within each phase. That phases follow each other is not in the interpreter."""
    shape = dataclasses.replace(SOME, qkv=qkv)
    attended, hidden, weights, norms = operands(shape, m)
    buffers = {"attended": attended, "hidden": hidden, **weights._asdict(), "norms": norms}
    buffers["place"] = jnp.zeros((2,), jnp.int32)
    mosaic_gpu.run(shape.cut(m, 4), buffers, no_meetings().counter, EPS, interpret=True)
    assert races == expected


def bits(arrays):
    return [np.asarray(array).view(np.uint16) for array in arrays]


def test_a_row_has_the_same_bits_whatever_the_others_are(kernel_alone):
    few, many = SOME.cut(16, 4), SOME.cut(24, 4)
    assert (few.sharing, many.sharing) == (1, 2)
    assert few.tiles == many.tiles
    attended, hidden, weights, norms = operands(SOME, 24)

    def rows(attended, hidden):
        return bits(run((attended, hidden, weights, norms), 1, on(4)))

    whole = rows(attended, hidden)
    # Fewer rows, so that no x is shared, and very different ones behind the first three.
    others = attended[:12].at[3:].multiply(100).at[4].set(jnp.nan)
    for fewer, every in zip(rows(others, hidden[:12]), whole, strict=True):
        np.testing.assert_array_equal(fewer[:3], every[:3])

    # The comparison sees a row that changes as little as it can: in the last bit of one number.
    nudged = np.array(others)
    nudged[1, 5] = np.nextafter(nudged[1, 5], ml_dtypes.bfloat16(np.inf))
    for fewer, every in zip(rows(jnp.asarray(nudged), hidden[:12]), whole, strict=True):
        changed = (fewer[:3] != every[:3]).any(axis=1)
        assert changed.tolist() == [False, True, False]


def export(m, shape, target=HOPPER):
    def struct(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype)

    weights = Weights(
        o=struct(shape.hidden, shape.q),
        gate_up=struct(2 * shape.inner, shape.hidden),
        down=struct(shape.hidden, shape.inner),
        qkv=None if shape.qkv is None else struct(shape.qkv, shape.hidden),
    )

    def chain(*given):
        *given, counter = given
        made = dense_chain(*given, Meetings(counter, 0), norm=1, eps=1e-5, target=target)
        return made.hidden, made.projected, made.meetings.counter

    program = jax.jit(chain, donate_argnums=4)  # as between the layers of a program
    return jax.export.export(program, platforms=["cuda"])(
        struct(m, shape.q),
        struct(m, shape.hidden),
        weights,
        struct(ROWS_OF_NORMS, shape.hidden, dtype=jnp.float32),
        struct(1, dtype=jnp.int32),
    )


def shape_of(name, last=False):
    config = preset(name)
    q, kv = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    qkv = None if last else q + 2 * kv
    return Shape(config.hidden_size, q, config.intermediate_size, qkv)


@pytest.mark.parametrize(
    ("name", "m", "last"),
    [
        *(("llama-3.1-8b", m, last) for m in (1, 8, 16, 32) for last in (False, True)),
        ("llama-3.1-70b", 16, False),
        ("qwen2.5-14b", 12, False),
        ("qwen2.5-72b", 32, True),
    ],
)
def test_it_lowers_for_hopper_as_one_launch(name, m, last):
    shape = shape_of(name, last)
    exported = export(m, shape)
    expected = [(m, shape.hidden), *([] if last else [(m, shape.qkv)]), (1,)]
    assert [one.shape for one in exported.out_avals] == expected
    module = exported.mlir_module()
    assert module.count("custom_call @mosaic_gpu") == 1
    assert "dot_general" not in module


def test_chains_of_a_program_know_how_many_blocks_have_arrived(monkeypatch):
    # With and without a next layer there may be other numbers of blocks.
    assert shape_of("qwen2.5-14b").cut(8, 132).blocks == 128
    assert shape_of("qwen2.5-14b", last=True).cut(8, 132).blocks == 132

    calls = []

    def launch(chosen, given, counter, eps, *, interpret):
        arrivals = given["place"].tolist()[1]
        calls.append((arrivals, counter.tolist()))
        made = {k: v for phase in chosen.phases for k, v in chosen.made_by(phase).items()}
        zeros = {name: jnp.zeros(one.shape, one.dtype) for name, one in made.items()}
        return zeros, counter + chosen.blocks * (len(chosen.phases) - 1)

    monkeypatch.setattr(cut, "_LEAST_WEIGHTS", 0)
    monkeypatch.setattr(package, "_on_gpu", launch)
    meetings = no_meetings()
    for qkv in (80, 80, None):
        given = operands(Shape(128, 64, 192, qkv), 8)
        *_, meetings = dense_chain(*given, meetings, eps=EPS, target=on(4))
    assert calls == [(0, [0]), (12, [12]), (24, [24])]
    assert meetings.arrivals == meetings.counter[0] == 24 + 8


def test_chains_of_a_program_share_one_kernel_and_one_counter():
    """Nothing is launched but the first norm and the chains: no constant is copied to count in."""
    shape = shape_of("llama-3.1-8b")

    def program(hidden, weights, norms):
        projected, meetings = first_norm(hidden, norms, eps=EPS, target=HOPPER)
        for norm in (1, 3):
            attended = projected[:, : shape.q]
            hidden, projected, meetings = dense_chain(
                attended, hidden, weights, norms, meetings, norm=norm, eps=EPS, target=HOPPER
            )
        return hidden, projected

    _, hidden, weights, norms = jax.eval_shape(lambda: operands(shape, 1))
    exported = jax.export.export(jax.jit(program), platforms=["cuda"])(hidden, weights, norms)
    module = exported.mlir_module()
    kernels = re.findall(r'kernel_hash = "(.*?[^\\])"', module)
    assert len(kernels) == 3
    assert len(set(kernels)) == 2
    assert "dense<0> : tensor<1xi32>" not in module


@pytest.mark.parametrize(("name", "m"), [("llama-3.1-8b", 33), ("tiny-llama", 8)])
def test_many_rows_and_small_layers_are_products_of_their_own(name, m):
    module = export(m, shape_of(name)).mlir_module()
    assert module.count("call @matmul") + module.count("stablehlo.dot_general") == 4
