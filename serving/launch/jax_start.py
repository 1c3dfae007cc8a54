"""Starts JAX as the settings say and hands out its devices."""

import os

import jax

from serving.engine.device import compile_children
from serving.errors import ConfigurationError
from serving.launch.config import ServeConfig
from serving.launch.gpu_memory import claim_for_jax

DEFAULT_CPU_REPLICAS = 2

# The CPU backend stays within reach beside an accelerator: weights pass through it.
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}


def start_jax(config: ServeConfig) -> list[list[jax.Device]]:
    """Configure and start the backend; the devices of each replica, in the order of its mesh.

    Call before anything else touches a device. Raises ConfigurationError if the platform is not
    there, has too few devices, or is to share its memory in a way that makes no sense.
    """
    settings = config.devices
    width = settings.tensor_parallel
    jax.config.update("jax_num_cpu_devices", (settings.replicas or DEFAULT_CPU_REPLICAS) * width)
    if settings.platform != "auto":
        jax.config.update("jax_platforms", _PLATFORMS[settings.platform])
    if settings.platform in ("auto", "gpu"):
        claim_for_jax(config.batching.memory_fraction, os.environ)
        if width == 1:
            compile_children.prepare()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ConfigurationError(
            f"--platform={settings.platform} cannot be used here: {error} Install Lumen with the "
            "extra for it (cuda or tpu), or pass --platform=cpu."
        ) from error
    return split_devices(devices, settings.replicas, width)


def split_devices[Device](
    devices: list[Device], replicas: int | None, width: int
) -> list[list[Device]]:
    """`width` devices for each replica; as many replicas as fit if None.

    Raises ConfigurationError if there are too few devices.
    """
    count = replicas if replicas is not None else max(len(devices) // width, 1)
    if count * width > len(devices):
        raise ConfigurationError(
            f"--replicas={count} with --tensor_parallel={width} need {count * width} devices, "
            f"and this machine has {len(devices)}; lower one of them."
        )
    return [devices[first : first + width] for first in range(0, count * width, width)]
