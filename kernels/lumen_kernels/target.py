"""Which backend runs an operation: a property of the devices a program is traced for."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import jax


class Backend(enum.Enum):
    """How an operation is implemented."""

    XLA = "xla"  # CPUs, GPUs other than Hopper, and the oracle in tests
    MOSAIC_GPU = "mosaic_gpu"  # NVIDIA Hopper
    MOSAIC_TPU = "mosaic_tpu"  # TPU v4 and later


_HOPPER = "9.0"
_HOPPER_CORES = 132  # H100 SXM and H200


@dataclass(frozen=True, slots=True)
class Target:
    """What operations are traced for. Nothing is asked of any device while tracing.

    platform: "cpu", "gpu" or "tpu". kind: the device kind as JAX names it ("TPU v6 lite"); empty
    if unknown. cores: streaming multiprocessors of a GPU, tensor cores of one TPU device (2 on
    v4 and v5p, where one device is two cores); 1 on CPU. interpret: run Pallas kernels in their
    interpreter, on a CPU.
    """

    backend: Backend
    platform: str
    kind: str = ""
    cores: int = 1
    interpret: bool = False

    @staticmethod
    def of(devices: Sequence[jax.Device]) -> "Target":
        """The target of a mesh's devices, which may be a topology's: none has to exist here.

        They are of one kind. GPUs other than Hopper get the XLA backend.
        """
        device = devices[0]
        kind = device.device_kind
        if device.platform == "tpu":
            return Target(Backend.MOSAIC_TPU, "tpu", kind, device.num_cores)
        if device.platform == "gpu":
            hopper = device.compute_capability == _HOPPER
            backend = Backend.MOSAIC_GPU if hopper else Backend.XLA
            return Target(backend, "gpu", kind, device.core_count)
        return Target(Backend.XLA, device.platform, kind)


CPU = Target(Backend.XLA, "cpu", "cpu")
"""Plain XLA on a CPU."""

HOPPER = Target(Backend.MOSAIC_GPU, "gpu", "NVIDIA H200", _HOPPER_CORES)
"""An H100 or H200, for lowering where none is."""


def interpreted(target: Target) -> Target:
    """The same kernels, run by Pallas' interpreter on a CPU."""
    return Target(target.backend, target.platform, target.kind, target.cores, interpret=True)
