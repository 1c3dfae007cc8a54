"""TPU slices to compile for on a machine without one, through libtpu (the `dev` extra)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compile in several processes
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of chips. name: as libtpu knows it. one_core_pair: v4's two cores as one device."""

    name: str
    one_core_pair: bool = False

    @property
    def generation(self) -> str:
        """ "v4", "v5e", "v5p", "v6e" or "tpu7x"."""
        return self.name.split(":")[0]


SMALLEST = (
    Slice("v4:2x2x1", one_core_pair=True),
    Slice("v5e:2x2"),
    Slice("v5p:2x2x1"),
    Slice("v6e:2x2"),
    Slice("tpu7x:2x2x1"),
)
"""One slice of every generation with at least four devices."""

EIGHT = (
    Slice("v4:2x2x2", one_core_pair=True),
    Slice("v5e:2x4"),
    Slice("v5p:2x2x2"),
    Slice("v6e:2x4"),
    Slice("tpu7x:2x2x1"),
)
"""One slice of every generation with eight devices."""


def devices_of(slice_: Slice) -> Sequence[jax.Device]:
    """The devices of a slice, to compile for; nothing can run on them.

    Raises RuntimeError if libtpu is missing or does not know the slice.
    """
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    extra = {"chip_config_name": "megacore"} if slice_.one_core_pair else {}
    found: Sequence[jax.Device] = topologies.get_topology_desc(slice_.name, "tpu", **extra).devices
    return found
