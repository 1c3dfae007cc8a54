"""TPU slices to compile for on a machine without one, through libtpu (the `dev` extra)."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from serving.errors import ConfigurationError

_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server what machine this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compile in several processes
}


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of chips.

    name: as libtpu knows it. one_core_pair: v4's two cores as one device. one_host: all chips on
    one host, where libtpu would assume hosts of four (they may have one; v5e and v6e up to eight).
    """

    name: str
    one_core_pair: bool = False
    one_host: bool = False

    @property
    def generation(self) -> str:
        """ "v4", "v5e", "v5p", "v6e" or "tpu7x"."""
        return self.name.split(":")[0]

    @property
    def chips(self) -> tuple[int, ...]:
        """Chips along each axis of the torus or mesh."""
        return tuple(int(size) for size in self.name.split(":")[1].split("x"))


def _slices(generation: str, *shapes: str) -> tuple[Slice, ...]:
    return tuple(
        Slice(
            f"{generation}:{shape}",
            one_core_pair=generation == "v4",
            one_host=shape in ("1x1", "1x1x1", "2x4"),
        )
        for shape in shapes
    )


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

SLICES: dict[str, tuple[Slice, ...]] = {
    "v4": _slices("v4", *_CUBES),
    "v5e": _slices("v5e", *_FLAT),
    "v5p": _slices("v5p", *_CUBES),
    "v6e": _slices("v6e", *_FLAT),
    "tpu7x": _slices("tpu7x", "1x1x1", *_CUBES[:-1]),
}
"""Slices by generation, smallest first."""

_MIB = 1 << 20

HBM_BYTES = {
    "v4": 31483 * _MIB,
    "v5e": 16125 * _MIB,
    "v5p": 98023 * _MIB,
    "v6e": 31991 * _MIB,
    "tpu7x": 97011 * _MIB,
}
"""Memory that a program may use on one device, whole MiB: beyond it libtpu 0.0.52 refuses to
compile ("exceeds available HBM"). A device is a chip; on tpu7x one of a chip's two cores."""


def _of_devices(count: int) -> tuple[Slice, ...]:
    return tuple(
        next(one for one in slices if device_count(one) >= count) for slices in SLICES.values()
    )


def device_count(slice_: Slice) -> int:
    """Devices of a slice: one per chip, two on tpu7x."""
    count = 2 if slice_.generation == "tpu7x" else 1
    for size in slice_.chips:
        count *= size
    return count


SMALLEST = _of_devices(4)
"""One slice of every generation with at least four devices."""

EIGHT = _of_devices(8)
"""One slice of every generation with eight devices."""


def slices_named(topology: str, devices: int) -> tuple[Slice, ...]:
    """What `--topology` means to a replica of so many devices.

    topology: a slice's name; a generation, for its smallest slice with enough devices; or "all",
    for that of every generation. Raises ConfigurationError listing what there is.
    """
    if topology == "all":
        return tuple(_smallest(generation, devices) for generation in SLICES)
    if topology in SLICES:
        return (_smallest(topology, devices),)
    known = {one.name: one for slices in SLICES.values() for one in slices}
    if topology not in known:
        generation = topology.split(":")[0]
        names = (
            [one.name for one in SLICES[generation]] if generation in SLICES else [*SLICES, "all"]
        )
        raise ConfigurationError(
            f"--topology is {topology!r}, which is no TPU slice known here; "
            f"choose one of {', '.join(names)}."
        )
    count = device_count(known[topology])
    if count % devices:
        fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise ConfigurationError(
            f"--tensor_parallel={devices} does not divide the {count} devices of {topology}; "
            f"choose one of {fitting}, or another slice."
        )
    return (known[topology],)


def _smallest(generation: str, devices: int) -> Slice:
    slices = SLICES[generation]
    fitting = [one for one in slices if device_count(one) % devices == 0]
    if not fitting:
        raise ConfigurationError(
            f"--tensor_parallel={devices} does not divide the devices of any {generation} slice "
            f"({', '.join(f'{one.name} has {device_count(one)}' for one in slices)})."
        )
    return fitting[0]


def devices_of(slice_: Slice) -> Sequence[jax.Device]:
    """The devices of a slice, to compile for; nothing can run on them.

    Raises ConfigurationError if libtpu is missing or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigurationError(
            f"Compiling for {slice_.name} needs libtpu, TPU's compiler, which is not installed; "
            "the dev extra brings it (Linux on x86-64): pip install -e '.[dev]'."
        )
    for name, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    more: dict[str, object] = {}
    if slice_.one_core_pair:
        more["chip_config_name"] = "megacore"
    if slice_.one_host:
        more["chips_per_host_bounds"] = (*slice_.chips, 1)[:3]
    try:
        topology = topologies.get_topology_desc(slice_.name, "tpu", **more)
    except RuntimeError as error:
        raise ConfigurationError(
            f"libtpu cannot compile for {slice_.name}: {str(error).strip().splitlines()[0]}"
        ) from error
    found: Sequence[jax.Device] = topology.devices
    return found


def host_count(devices: Sequence[jax.Device]) -> int:
    """Hosts (VMs) that these devices belong to."""
    return len({device.process_index for device in devices})
