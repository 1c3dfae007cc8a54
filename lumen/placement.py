"""Puts the parameters of embedding, units and head on the devices of a mesh."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lumen.assemble import (
    Parameters,
    Read,
    embedding_parameters,
    head_parameters,
    unit_parameters,
)
from lumen.checkpoint.layout import outer_shapes, unit_shapes
from lumen.sharding import PARAMETER_SPECS, HeadLayout
from lumen.tensor_source import TensorSource

Path = tuple[Hashable, ...]
"""Where a parameter lies in its module: ("layers", 2, "qkv")."""

Weights = tuple[jax.Array, ...]
"""Parameters of one module as a flat tuple, in the order of its `ModuleDef.paths`. Programs take
them like this: a call with a tree of named parameters costs twice as much on the host."""


@runtime_checkable
class GeneratedSource(TensorSource, Protocol):
    """A source whose tensors can be computed on the device that wants them."""

    def salt(self, name: str) -> int:
        """The uint32 that sets one tensor apart."""
        ...

    def generate(self, name: str, salt: jax.Array) -> jax.Array:
        """The tensor, traced; of `name` only shape and kind count. salt: uint32 scalar."""
        ...


class _Assemble(Protocol):
    def __call__(
        self, read: Read, config: Any, heads: HeadLayout, device: int, dtype: Any, xp: Any
    ) -> Parameters: ...


class Placement:
    """Assembles modules from one source and places them on one mesh.

    Tensors of a file are read once each and cut for every device, one module's at a time. Those of
    a `GeneratedSource` are computed where they belong and never touch the host. That compiles a
    program per module kind and device, which pays where device memory is not host memory: by
    default not on CPUs.
    """

    def __init__(
        self,
        source: TensorSource,
        mesh: Mesh,
        heads: HeadLayout,
        dtype: Any,
        generate: bool | None = None,
    ) -> None:
        self._source = source
        self._mesh = mesh
        self._heads = heads
        self._dtype = dtype
        self._generate = mesh.devices.flat[0].platform != "cpu" if generate is None else generate
        self._programs: dict[tuple[_Assemble, int], Callable[[jax.Array], Parameters]] = {}

    def embedding(self, paths: Sequence[Path]) -> Weights:
        """Parameters of the embedding."""
        names = list(outer_shapes(self._source.config))
        placed = self._place(embedding_parameters, names, names)
        return tuple(placed[path] for path in paths)

    def unit(self, paths: Sequence[Path], unit: int) -> Weights:
        """Parameters of unit number `unit`."""
        config = self._source.config
        names = list(unit_shapes(config, unit))
        placed = self._place(unit_parameters, list(unit_shapes(config, 0)), names)
        return tuple(placed[path] for path in paths)

    def head(self, paths: Sequence[Path], tied_table: jax.Array | None) -> Weights:
        """Parameters of the head; `tied_table` is the embedding's table if they share it."""
        names = list(outer_shapes(self._source.config))
        placed = self._place(head_parameters, names, names)
        if tied_table is not None:
            placed["table",] = tied_table
        return tuple(placed[path] for path in paths)

    def _place(
        self, assemble: _Assemble, read_names: list[str], names: list[str]
    ) -> dict[Path, jax.Array]:
        """Assemble on every device. read_names[i], which `assemble` asks for, means names[i]."""
        devices = list(self._mesh.devices.flat)
        if self._generate and isinstance(self._source, GeneratedSource):
            salts = np.array([self._source.salt(name) for name in names], np.uint32)
            parts = [
                self._program(assemble, read_names, index)(jax.device_put(salts, device))
                for index, device in enumerate(devices)
            ]
        else:
            actual = dict(zip(read_names, names, strict=True))

            @functools.cache
            def read(name: str) -> np.ndarray[Any, np.dtype[Any]]:
                return self._source.read(actual[name])

            parts = [
                jax.device_put(self._assembled(assemble, read, index, np), device)
                for index, device in enumerate(devices)
            ]
        return {path: self._joined(path, [part[path] for part in parts]) for path in parts[0]}

    def _assembled(self, assemble: _Assemble, read: Read, index: int, xp: Any) -> Parameters:
        return assemble(read, self._source.config, self._heads, index, self._dtype, xp)

    def _program(
        self, assemble: _Assemble, read_names: list[str], index: int
    ) -> Callable[[jax.Array], Parameters]:
        """The compiled generator of one device's parameters; all units share it."""
        if (assemble, index) not in self._programs:
            source = self._source
            assert isinstance(source, GeneratedSource)
            place = {name: i for i, name in enumerate(read_names)}

            def generate(salts: jax.Array) -> Parameters:
                def read(name: str) -> jax.Array:
                    return source.generate(name, salts[place[name]])

                return self._assembled(assemble, read, index, jnp)

            self._programs[assemble, index] = jax.jit(generate)
        return self._programs[assemble, index]

    def _joined(self, path: Path, parts: list[jax.Array]) -> jax.Array:
        """One array over the mesh from each device's part, without a copy."""
        sharding = NamedSharding(self._mesh, PARAMETER_SPECS[str(path[-1])])
        shape = tuple(
            size if axis is None else size * self._mesh.shape[axis]
            for size, axis in zip(
                parts[0].shape,
                (*sharding.spec, *(None,) * (parts[0].ndim - len(sharding.spec))),
                strict=True,
            )
        )
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)
