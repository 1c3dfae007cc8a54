"""Slices of TPU chips, and what libtpu says of them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from serving.errors import ConfigurationError
from tools.aot.topologies import (
    EIGHT,
    HBM_BYTES,
    SLICES,
    SMALLEST,
    Slice,
    device_count,
    devices_of,
    host_count,
    slices_named,
)


@pytest.mark.parametrize("slice_", [*SMALLEST, *EIGHT], ids=lambda slice_: slice_.name)
def test_a_slice_has_the_devices_it_is_said_to_have(slice_):
    devices = devices_of(slice_)
    assert len(devices) == device_count(slice_)
    assert devices[0].num_cores == (2 if slice_.generation in ("v4", "v5p") else 1)


def test_hosts_hold_four_chips_or_all_eight_of_v5e_and_v6e():
    hosts = {slice_.generation: host_count(devices_of(slice_)) for slice_ in EIGHT}
    assert hosts == {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 1}


@pytest.mark.parametrize("generation", HBM_BYTES)
def test_the_compiler_has_the_memory_that_the_table_says(generation):
    devices = devices_of(SLICES[generation][0])
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    program = jax.jit(lambda x: x[:8, 0] * 2)

    def compile_with(mib):
        x = jax.ShapeDtypeStruct((mib * 256, 1024), jnp.float32, sharding=sharding)
        program.lower(x).compile()

    limit = HBM_BYTES[generation] >> 20
    compile_with(limit - 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)hbm"):
        compile_with(limit + 4)  # libtpu 0.0.48 allows 1 MiB more


def test_a_generation_means_its_smallest_slice_with_enough_devices():
    assert [one.name for one in slices_named("v5e", 1)] == ["v5e:1x1"]
    assert [one.name for one in slices_named("v5e", 8)] == ["v5e:2x4"]
    assert [one.name for one in slices_named("tpu7x", 8)] == ["tpu7x:2x2x1"]
    assert [one.name for one in slices_named("v6e:4x4", 8)] == ["v6e:4x4"]
    assert [one.generation for one in slices_named("all", 4)] == list(SLICES)


@pytest.mark.parametrize(
    ("topology", "devices", "message"),
    [
        ("v9", 1, "no TPU slice known here; choose one of v4, v5e, v5p, v6e, tpu7x, all"),
        ("v5e:3x3", 1, "choose one of v5e:1x1, v5e:2x2"),
        ("v5e:2x2", 3, "does not divide the 4 devices of v5e:2x2; choose one of 1, 2, 4"),
        ("v5e:2x2", 8, "does not divide the 4 devices of v5e:2x2"),
        ("v6e", 3, "does not divide the devices of any v6e slice"),
        ("all", 128, "does not divide the devices of any v4 slice"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(topology, devices, message):
    with pytest.raises(ConfigurationError, match=message):
        slices_named(topology, devices)


def test_missing_libtpu_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs libtpu.*pip install -e '\.\[dev\]'"):
        devices_of(Slice("v5e:2x2"))


def test_what_libtpu_says_of_a_slice_is_passed_on():
    with pytest.raises(ConfigurationError, match=r"libtpu cannot compile for v5e:3x3: INVALID_A"):
        devices_of(Slice("v5e:3x3"))
