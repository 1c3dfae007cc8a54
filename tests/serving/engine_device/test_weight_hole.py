"""Units that may be dropped lie in one piece of memory, and loading keeps them there."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lumen.model import load_model
from serving.engine.device import DeviceExecutorConfig, build_device_executor, weight_hole
from serving.errors import ConfigurationError

CONFIG = DeviceExecutorConfig(
    max_model_len=64, num_rows=1, num_blocks=32, max_prefill_tokens=16, prefill_buckets=(16,)
)


def pointers(weights):
    return [array.addressable_shards[0].data.unsafe_buffer_pointer() for array in weights]


def test_loading_fills_what_was_reserved(weights, monkeypatch):
    where = {}
    reserve = weight_hole.reserve

    def noted(*arguments):
        made = reserve(*arguments)
        where.update({number: pointers(unit) for number, unit in made.items()})
        return made

    monkeypatch.setattr(weight_hole, "reserve", noted)
    config = dataclasses.replace(CONFIG, droppable_units=(2, 1))
    executor = build_device_executor(weights("tiny-smollm"), jax.devices()[:1], config)
    model = executor._passes.model
    assert where == {number: pointers(model.units[number]) for number in (1, 2)}
    plain = load_model(weights("tiny-smollm"), model.mesh, config.dtype)
    for one, other in zip(model.units, plain.units, strict=True):
        for array, expected in zip(one, other, strict=True):
            assert jnp.array_equal(array, expected)


@pytest.mark.parametrize("numbers", [(3,), (-1,), (1, 1)])
def test_units_that_there_are_not_are_refused(weights, numbers):
    config = dataclasses.replace(CONFIG, droppable_units=numbers)
    with pytest.raises(ConfigurationError, match="different numbers from 0 to 2"):
        build_device_executor(weights("tiny-smollm"), jax.devices()[:1], config)


def lying_at(*starts):
    """Weights of two units of two arrays of 1,000 bytes, and where they are on two devices."""
    arrays = [jnp.zeros(250, jnp.float32) for _ in range(4)]
    places = {id(array): start for array, start in zip(arrays, starts, strict=True)}

    def extents(array):
        start = places[id(array)]
        return [(start, array.nbytes), (5 * start, array.nbytes) if start else (0, array.nbytes)]

    return {4: tuple(arrays[:2]), 7: tuple(arrays[2:])}, extents


def test_a_hole_is_as_large_as_what_leaves_it():
    weights, _ = lying_at(0, 1024, 2048, 3072)
    first = {id(a): i for i, a in enumerate(a for unit in weights.values() for a in unit)}
    assert weight_hole.hole_bytes(weights, lambda a: [(1024 * first[id(a)], a.nbytes)]) == 4072
    assert weight_hole.hole_bytes({}) == 0


@pytest.mark.parametrize("wider", [0, 1])
def test_a_hole_counts_as_large_as_on_the_device_where_it_is_smallest(wider):
    weights, _ = lying_at(0, 1000, 2000, 3000)
    first = {id(a): i for i, a in enumerate(a for unit in weights.values() for a in unit)}
    steps = [1000, 1000]
    steps[wider] = 1024  # rounding between the matrices
    found = weight_hole.hole_bytes(
        weights, lambda a: [(step * first[id(a)], a.nbytes) for step in steps]
    )
    assert found == 4000


def test_whatever_lies_between_weights_is_found_on_any_device():
    weights, extents = lying_at(0, 1024, 2048, 3072)
    with pytest.raises(ConfigurationError, match="4120 bytes lie between two matrices"):
        weight_hole.hole_bytes(weights, extents)
