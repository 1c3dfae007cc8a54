"""Compiled programs as bytes, and back."""

import pickle

import jax
from jax.experimental import serialize_executable


def packed_executable(compiled: jax.stages.Compiled) -> bytes:
    """A program that was compiled in this process, not one that was loaded.

    Serializing raises whatever it likes.
    """
    return pickle.dumps(serialize_executable.serialize(compiled))


def loaded_executable(packed: bytes, devices: tuple[jax.Device, ...]) -> jax.stages.Compiled:
    """The program on these devices, whose numbers are those it was compiled for.

    Runs what is in it. Unpickling and loading raise whatever they like.
    """
    serialized, in_tree, out_tree = pickle.loads(packed)
    compiled: jax.stages.Compiled = serialize_executable.deserialize_and_load(
        serialized, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )
    return compiled
