"""What a process without the devices needs to compile a replica's programs, as a message."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from lumen_kernels.target import Target

from lumen.config import ModelConfig
from lumen.model import model_defs
from lumen.sharding import TENSOR_AXIS, HeadLayout
from serving.engine.device.arena import ArenaLayout
from serving.engine.device.program_identity import code_identity, jax_settings
from serving.engine.device.program_shapes import ProgramShapes
from serving.engine.executor import MixedSize

Answer = tuple[bytes | None, str]
"""Of a child: (what `packed_executable` made, "") or (None, why nothing came of it)."""


class RecipeError(Exception):
    """This process would not compile what the one that asked for it would."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Describes the programs of one replica. Pickles small: neither devices nor weights.

    topology: of the devices' platform, serialized, to compile for devices that are not here; None:
    CPUs, which are. device_ids: of the mesh, in its order. settings: of JAX, where they matter to
    programs. identity: `code_identity` of whoever asks.
    """

    config: ModelConfig
    dtype: str
    arena_layout: ArenaLayout
    num_rows: int
    table_columns: int
    max_logprobs: int
    target: Target
    topology: bytes | None
    device_ids: tuple[int, ...]
    decode_buckets: tuple[int, ...]
    chunk_buckets: tuple[tuple[int, int], ...]
    mixed_sizes: tuple[MixedSize, ...]
    settings: dict[str, Any]
    identity: str

    def shapes(self) -> ProgramShapes:
        """The same shapes as `recipe` was given, on stand-ins for its devices.

        Raises RecipeError if this process has other code, packages or flags, or no such devices.
        """
        found = jax_settings()
        for name, value in self.settings.items():
            if found.get(name) != value:
                jax.config.update(name, value)
        mesh = Mesh(np.array(self._devices()), (TENSOR_AXIS,))
        dtype = np.dtype(self.dtype)
        heads = HeadLayout(self.config.num_heads, self.config.num_kv_heads, mesh.size)
        shapes = ProgramShapes(
            self.config, model_defs(self.config, heads, dtype), mesh, dtype, self.arena_layout,
            self.num_rows, self.table_columns, self.max_logprobs,
        )  # fmt: skip
        if code_identity(shapes, self.target) != self.identity:
            raise RecipeError("code, packages, flags or settings of this process are others")
        return shapes

    def _devices(self) -> list[jax.Device]:
        there = jax.devices("cpu")  # loads the plug-in that knows the topology
        if self.topology is not None:
            there = topologies.TopologyDescription.deserialize(self.topology).devices
        by_id = {device.id: device for device in there}
        if missing := [number for number in self.device_ids if number not in by_id]:
            raise RecipeError(f"there are no devices {missing} here, only {sorted(by_id)}")
        return [by_id[number] for number in self.device_ids]


def recipe(
    shapes: ProgramShapes,
    target: Target,
    decode_buckets: tuple[int, ...],
    chunk_buckets: Mapping[int, int],
    mixed_sizes: tuple[MixedSize, ...] = (),
) -> Recipe:
    """The recipe of a replica's programs; to be called where its devices are."""
    devices = list(shapes.mesh.devices.flat)
    topology = None
    if devices[0].platform != "cpu":
        topology = topologies.TopologyDescription(devices).serialize()
    return Recipe(
        config=shapes.config,
        dtype=np.dtype(shapes.dtype).name,
        arena_layout=shapes.arena_layout,
        num_rows=shapes.num_rows,
        table_columns=shapes.table_columns,
        max_logprobs=shapes.max_logprobs,
        target=target,
        topology=topology,
        device_ids=tuple(device.id for device in devices),
        decode_buckets=decode_buckets,
        chunk_buckets=tuple(chunk_buckets.items()),
        mixed_sizes=mixed_sizes,
        settings=jax_settings(),
        identity=code_identity(shapes, target),
    )
