"""Kernels lowered with less work are the same kernels."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import constraints, core, layout_inference
from jaxlib.mlir import ir
from lumen_kernels.matmul import matmul
from lumen_kernels.quick_lowering import install
from lumen_kernels.target import HOPPER


@pytest.fixture
def seen(monkeypatch):
    """What layout inference puts in order: the names of equal variables, kernel by kernel."""
    found: list[list[list[str]]] = []
    equal = constraints.compute_transitively_equal_vars

    def noted(system):
        sets = equal(system)
        found.append([[str(one), *map(str, others)] for one, others in sets.items()])
        return sets

    monkeypatch.setattr(constraints, "compute_transitively_equal_vars", noted)
    # Put back what the functions under test change.
    monkeypatch.setattr(layout_inference, "infer_layout", layout_inference.infer_layout)
    monkeypatch.setattr(layout_inference.ValueSite, "__str__", layout_inference.ValueSite.__str__)
    return found


def lower() -> None:
    """A kernel with loops and branches."""
    x, w = (jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16) for rows in (64, 6144))
    product = jax.jit(lambda x, w: matmul(x, w, target=HOPPER, out_dtype=jnp.bfloat16))
    jax.export.export(product, platforms=["cuda"])(x, w)


def test_names_are_those_that_jax_gives(seen, monkeypatch):
    lower()
    plain, names = list(seen), layout_inference.ValueSite.__str__
    seen.clear()
    states = []

    def noted(operation):
        states.append(operation)
        return state(operation)

    state = ir.AsmState
    monkeypatch.setattr(ir, "AsmState", noted)
    install()
    install()
    lower()
    assert len(states) == len(plain) >= 1
    assert any(len(equal) > 1 for equal in plain[0])
    assert seen == plain
    assert layout_inference.ValueSite.__str__ is names


def test_a_kernel_of_two_programs_is_the_same(seen, monkeypatch):
    monkeypatch.setattr(core, "KNOWN_KERNELS", kernels := {})
    install()
    lower()
    assert len(kernels) == 1
    lower()
    assert len(kernels) == 1


def test_another_jax_is_left_alone(monkeypatch):
    monkeypatch.delattr(layout_inference, "ValueSite")
    infer = layout_inference.infer_layout
    install()
    assert layout_inference.infer_layout is infer
