"""Memory that the devices of a replica store into for each other, and how kernels find it."""

import ctypes
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lumen_kernels.target import Backend, Target

HALVES = 2
"""Of a mailbox, taken in turns."""

NOTHING = -1
"""A word of a mailbox that nobody has stored into."""

RANK = 0
"""Column of `addresses` with a device's own number; addresses follow, two words each."""


_MOST_ROWS = 256
"""Of a call. With more, what a row takes over NVLink counts, and XLA sums as well."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mailboxes:
    """Shape of a device's mailbox: from each of `devices`, itself included, `rows` rows of `width`
    bfloat16, twice."""

    devices: int
    rows: int
    width: int

    @property
    def words(self) -> int:
        """int32 in a mailbox."""
        return HALVES * self.devices * self.rows * self.width // 2

    @property
    def columns(self) -> int:
        """Of a device's row of `addresses`."""
        return RANK + 1 + 2 * (self.devices + 1)


def supports(width: int) -> bool:
    """Whether rows of `width` numbers are for the kernel, whose threads have 8 at a time."""
    return width % 1024 == 0 and width <= 8192


def mailboxes_between(devices: Sequence[jax.Device], width: int) -> Mailboxes | None:
    """Those of devices that reach each other's memory, for rows of `width`; None for all others."""
    count = len(devices)
    if count < 2 or Target.of(devices).backend is not Backend.MOSAIC_GPU or not supports(width):
        return None
    if any(device.process_index != devices[0].process_index for device in devices):
        return None
    return Mailboxes(count, _MOST_ROWS, width) if _reach_each_other(devices) else None


def _reach_each_other(devices: Sequence[jax.Device]) -> bool:
    """Whether kernels on one may load and store on the other: XLA's client turns it on if so."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        _log.warning("Sums over devices are XLA's, as the CUDA driver is not found: %s", error)
        return False
    answer = ctypes.c_int()
    for one, other in itertools.permutations(devices, 2):
        numbers = one.local_hardware_id, other.local_hardware_id
        if driver.cuDeviceCanAccessPeer(ctypes.byref(answer), *numbers) or not answer.value:
            return False
    return True


def mailboxes(boxes: Mailboxes, mesh: Mesh) -> jax.Array:
    """Empty ones, int32 [devices, words], one row on each device of a mesh with one axis."""
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names, None))
    shape = (boxes.devices, boxes.words)
    made: jax.Array = jax.jit(lambda: jnp.full(shape, NOTHING), out_shardings=sharding)()
    return made


def addresses(boxes: Mailboxes, made: jax.Array) -> jax.Array:
    """What kernels find mailboxes by: int32 [devices, columns], a row on each device.

    made: of `mailboxes`, which must live as long as kernels run. A row has the device's number,
    the addresses of all mailboxes, and once more that of its own.
    """
    jax.block_until_ready(made)
    sharding = made.sharding
    assert isinstance(sharding, NamedSharding)
    where = {one.device: one.data.unsafe_buffer_pointer() for one in made.addressable_shards}
    devices = list(sharding.mesh.devices.flat)
    found = np.zeros((boxes.devices, boxes.columns), np.int32)
    for rank, device in enumerate(devices):
        own = [where[one] for one in (*devices, device)]
        found[rank, RANK] = rank
        found[rank, RANK + 1 :] = np.array(own, np.uint64).view(np.int32)
    placed: jax.Array = jax.device_put(found, sharding)
    return placed
