"""Compiled programs as bytes, and back, onto the same devices or onto another one."""

import io
import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from serving.engine.device.compiler_options import compiler_options


def packed_executable(compiled: jax.stages.Compiled, devices: Sequence[jax.Device]) -> bytes:
    """A program that was compiled in this process, not one that was loaded, for these devices.

    Serializing raises whatever it likes.
    """
    numbers = [device.id for device in devices]
    return pickle.dumps((*serialize_executable.serialize(compiled), numbers))


def loaded_executable(packed: bytes, devices: tuple[jax.Device, ...]) -> jax.stages.Compiled:
    """The program on these devices: those it was compiled for, or another single one like that.

    Runs what is in it. Unpickling and loading raise whatever they like.
    """
    serialized, in_tree, out_tree, numbers = pickle.loads(packed)
    if numbers != [device.id for device in devices]:
        return _moved(serialized, in_tree, out_tree, devices)
    compiled: jax.stages.Compiled = serialize_executable.deserialize_and_load(
        serialized, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )
    return compiled


def _moved(
    serialized: bytes, in_tree: Any, out_tree: Any, devices: tuple[jax.Device, ...]
) -> jax.stages.Compiled:
    """What `deserialize_and_load` does, but for the device of which the program tells.

    JAX's own cache moves executables in this way, between processes that see one GPU each; what is
    public has no way to ask for it.
    """
    (device,) = devices
    unpickler: Any = serialize_executable._JaxPjrtUnpickler

    class Mover(unpickler):  # type: ignore[misc]  # it has no type
        def persistent_load(self, what: tuple[Any, ...]) -> Any:
            if what[0] == "device":
                return device
            if what[0] != "exec":
                return super().persistent_load(what)
            return self.backend.deserialize_executable(
                what[1], self.execution_devices, _options(device)
            )

    unloaded, arguments, no_kwargs = Mover(io.BytesIO(serialized), device.client, devices).load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(arguments), out_tree, no_kwargs=no_kwargs
    )


def _options(device: jax.Device) -> Any:
    """How the program would have been compiled for this device."""
    from jax._src import compiler  # nothing public makes them, and nothing else here needs it

    return compiler.get_compile_options(
        num_replicas=1,
        num_partitions=1,
        device_assignment=np.array([[device.id]]),
        env_options_overrides=compiler_options(device.platform),
    )
