"""Sums over devices with residual and norm: by XLA, lowered for Hopper, and mailboxes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from lumen_kernels.reduce_norm import Mail, Mailboxes, SumOverDevices, reduce_add_rms_norm
from lumen_kernels.reduce_norm.mailbox import NOTHING, addresses, mailboxes, mailboxes_between
from lumen_kernels.target import CPU, HOPPER

EPS = 0.3  # large enough to be missed if it were left out
BOXES = Mailboxes(devices=2, rows=4, width=1024)
PART, WHOLE = PartitionSpec("tensor"), PartitionSpec()


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:2]), ("tensor",))


def program(mesh, target, *, norm=True):
    """Of x [2, rows, width], residual, weight and the addresses of mailboxes."""

    def on_device(x, residual, weight, found):
        over = SumOverDevices("tensor", Mail(BOXES, found[0]))
        made = reduce_add_rms_norm(
            x[0], residual, weight if norm else None, EPS, over, half=1, target=target
        )
        return made[: 1 + norm]

    specs = (PART, WHOLE, WHOLE, PART)
    return jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)
    )


def operands(rows, width=1024, dtype=jnp.bfloat16):
    random = np.random.default_rng(rows)
    x, residual = (
        jnp.asarray(random.normal(size=(*more, rows, width)), dtype) for more in ((2,), ())
    )
    weight = jnp.asarray(random.uniform(0.5, 1.5, size=width), jnp.float32)
    return x, residual, weight, jnp.zeros((2, BOXES.columns), jnp.int32)


def test_hidden_states_and_norm_are_of_the_sum(mesh):
    x, residual, weight, _ = given = operands(3, dtype=jnp.float32)
    expected = np.asarray(residual + x[0] + x[1], np.float64)
    hidden, normed = program(mesh, CPU)(*given)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    scale = np.sqrt(np.mean(expected**2, axis=1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, expected / scale * np.asarray(weight), rtol=1e-4, atol=1e-6)
    (alone,) = program(mesh, CPU, norm=False)(*given)
    np.testing.assert_array_equal(alone, hidden)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "kernel"),
    [
        (4, 1024, jnp.bfloat16, True),
        (5, 1024, jnp.bfloat16, False),  # more than the mailboxes have
        (4, 2048, jnp.bfloat16, False),
        (4, 1024, jnp.float32, False),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_few_rows_are_one_launch_on_hopper(mesh, rows, width, dtype, kernel, norm):
    exported = jax.export.export(program(mesh, HOPPER, norm=norm), platforms=["cuda"])
    text = exported(*jax.eval_shape(lambda: operands(rows, width, dtype))).mlir_module()
    assert ("all_reduce" in text) != kernel
    if kernel:
        assert text.count("custom_call @mosaic_gpu") == 1
        assert not re.search(r"stablehlo\.(add|rsqrt)", text)


def test_mailboxes_start_empty_and_addresses_lead_to_them(mesh):
    made = mailboxes(BOXES, mesh)
    # Two halves, from each of two devices four rows of 1,024, two to a word.
    assert made.shape == (2, 2 * 2 * 4 * 512)
    assert (np.asarray(made) == NOTHING).all()
    found = np.asarray(addresses(BOXES, made))
    places = [shard.data.unsafe_buffer_pointer() for shard in made.addressable_shards]
    for rank, row in enumerate(found):
        assert row[0] == rank
        assert row[1:].view(np.uint64).tolist() == [*places, places[rank]]


def test_only_hopper_devices_have_mailboxes():
    assert mailboxes_between(jax.devices()[:2], 8192) is None
