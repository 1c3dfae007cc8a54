"""Rotation and KV write: the kernel in its interpreter, and XLA, against numpy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.kv_write import mosaic_gpu as kv_write_on_gpu
from lumen_kernels.rotary_write import Projections, is_one_launch, rotate, write, xla
from lumen_kernels.target import CPU, HOPPER, Backend, Target, interpreted

from tests.kernels.kv_write.streams import DECODE, PREFILL, Layout
from tests.kernels.rotary_write.tokens import EPS, FAMILIES, Family, Tokens, check_close

GPU = interpreted(HOPPER)
TPU = interpreted(Target(Backend.MOSAIC_TPU, "tpu", "TPU v6 lite"))
SMALL = Family(4, Layout(2, 128))


def run(tokens: Tokens, target: Target) -> None:
    operation = functools.partial(write, target=target, **tokens.options)
    tokens.check(*jax.jit(operation)(*tokens.arguments))


@pytest.mark.parametrize("parts", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("family", [*FAMILIES, Family(4, Layout(2, 128, dtype=np.float32))])
def test_xla(family, parts):
    run(Tokens(family, parts), CPU)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_gpu_kernel(monkeypatch, family):
    # Nobody else does its work.
    monkeypatch.setattr(xla, "rotate", None)
    monkeypatch.setattr(kv_write_on_gpu, "write", None)
    run(Tokens(family, seed=1), GPU)


@pytest.mark.parametrize(
    "parts", [((1, 3),), ((-1, 0),), ((-5, 0), (2, 0), (-4, 0)), ((16, 0),), DECODE], ids=str
)
@pytest.mark.parametrize("target", [CPU, GPU, TPU], ids=lambda t: t.platform)
def test_short_streams(target, parts):
    run(Tokens(SMALL, parts, seed=2), target)


def test_gpu_kernel_has_no_races(monkeypatch):
    parameters = functools.partial(plgpu.InterpretGPUParams, detect_races=True)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", parameters)
    run(Tokens(Family(4, Layout(2, 128, segments=2), norms=True), DECODE, seed=3), GPU)
    assert not gpu_interpreter.get_races().races_found


def test_the_oracle_sees_a_wrong_rotation_and_a_wrong_place():
    tokens = Tokens(SMALL, DECODE)
    q, arena = write(*tokens.arguments, target=CPU, **tokens.options)
    tokens.check(q, arena)
    for which in (0, 1, 2, 3):
        projections, rotation, given, places, layer = tokens.arguments
        wrong = [
            (projections, np.roll(rotation, 64, axis=1), given, places, layer),
            (projections, rotation, given, np.roll(places, 1, axis=1), layer),
            (projections, rotation, given, places, 0),
            (Projections(np.roll(projections.fused, 128, axis=1)), rotation, given, places, layer),
        ][which]
        with pytest.raises(AssertionError):
            tokens.check(*write(*wrong, target=CPU, **tokens.options))


@pytest.mark.parametrize("family", FAMILIES[2:6], ids=str)
def test_rotate_gives_what_another_operation_is_to_store(family):
    tokens = Tokens(family, DECODE)
    projections, rotation, *_ = tokens.arguments
    for found, exact in zip(
        rotate(projections, rotation, **tokens.options), tokens.exact(), strict=True
    ):
        check_close(found, exact)


def test_no_token_at_all():
    tokens = Tokens(SMALL, DECODE)
    projections, rotation, arena, places, layer = tokens.arguments
    none = Projections(projections.fused[:0]), rotation[:0], arena, places[:, :0], layer
    for target in (CPU, GPU, TPU):
        q, same = write(*none, target=target, **tokens.options)
        assert q.shape == (0, 4, 128)
        assert same == arena


@pytest.mark.parametrize(
    ("family", "target", "expected"),
    [
        *((family, HOPPER, True) for family in FAMILIES),
        (SMALL, TPU, False),
        (SMALL, CPU, False),
        (Family(4, Layout(2, 96)), HOPPER, False),
        (Family(4, Layout(2, 128, dtype=np.float32)), HOPPER, False),
        (Family(128, Layout(8, 128)), HOPPER, False),
    ],
)
def test_where_it_is_one_launch(family, target, expected):
    tokens = Tokens(family, ((1, 0),))
    projections, _, arena, *_ = tokens.arguments
    found = is_one_launch(projections.fused, arena, head_dim=family.layout.head_dim, target=target)
    assert found is expected


def test_what_the_kernel_does_not_know_runs_all_the_same():
    run(Tokens(Family(4, Layout(2, 128, dtype=np.float32)), DECODE), GPU)


def changed(name, value):
    tokens = Tokens(dataclasses.replace(SMALL, bias=True, norms=True), ((2, 0),))
    names = ("projections", "rotation", "arena", "places", "layer_offset")
    given = dict(zip(names, tokens.arguments, strict=True)) | tokens.options
    if name.startswith("projections."):
        field = {name.removeprefix("projections."): value}
        return given | {"projections": given["projections"]._replace(**field)}
    if name == "projections":
        return given | {"projections": Projections(value)}
    return given | {name: value}


WIDTH = 8 * 128


@pytest.mark.parametrize("target", [CPU, GPU], ids=lambda t: t.platform)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("projections", np.zeros((2, 8, 128), np.float32)),
        ("projections", np.zeros((2, 4 * 128), np.float32)),
        ("projections", np.zeros((2, 8 * 128 + 1), np.float32)),
        ("projections.bias", np.zeros(WIDTH - 1, np.float32)),
        ("projections.bias", np.zeros(WIDTH)),
        ("projections.norms", np.zeros((2, 64), np.float32)),
        ("rotation", np.zeros((3, 128), np.float32)),
        ("rotation", np.zeros((2, 128), np.float64)),
        ("arena", jnp.zeros((8, 2, 16, 64))),
        ("arena", (jnp.zeros((8, 2, 16, 128), jnp.float16),)),
        ("places", np.zeros((2, 3), np.int32)),
        ("places", np.zeros((2, 2), np.int64)),
        ("layer_offset", np.zeros(1, np.int32)),
        ("layer_offset", 0.5),
    ],
)
def test_bad_arguments_are_named(argument, value, target):
    with pytest.raises(KernelArgumentError, match=f"rotary_write.write: {argument} ") as error:
        write(**changed(argument, value), target=target)
    assert error.value.argument == argument


def test_odd_head_dims_and_head_counts_are_refused():
    fused = np.zeros((2, 4 * 3), np.float32)
    with pytest.raises(KernelArgumentError, match="pairs"):
        rotate(Projections(fused), np.zeros((2, 3), np.float32), kv_heads=1, eps=EPS)
    with pytest.raises(KernelArgumentError, match="2 x 2"):
        rotate(Projections(fused), np.zeros((2, 4), np.float32), kv_heads=2, eps=EPS)
