"""Shapes and placement of what programs take and return."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from lumen_kernels.reduce_norm import Mail, Mailboxes

from lumen.config import ModelConfig
from lumen.model import ModelDefs
from lumen.sharding import TENSOR_AXIS
from serving.engine.device.arena import ArenaLayout

Offsets = tuple[jax.Array, ...]
"""Of each of a unit's layers, int32 scalars: layer * KV heads of a device."""


class Place(NamedTuple):
    """Where a unit runs: its offsets in a block, and the addresses of its devices' mailboxes, each
    device's own row of int32 [devices, columns]; a tuple, empty without them."""

    offsets: Offsets
    mail: tuple[jax.Array, ...]


WHOLE = PartitionSpec()
"""On every device alike."""

ARENA = PartitionSpec(TENSOR_AXIS)
"""Each device has its own slots, of its own heads."""

SAMPLING_FIELDS = 5
"""Rows of the packed sampling array: temperature, top_k, top_p, min_p, seed, as int32 bits."""

SEQUENCE_FIELDS = 3
"""Entries of each sequence of a packed prefill call, beside its table: start, count, row."""


@dataclass(frozen=True, slots=True)
class ProgramShapes:
    """What all programs of a replica have in common.

    table_columns: blocks of one row's table. num_rows: rows of `last_tokens`. mailboxes: of devices
    that reach each other's memory; None: there is one, or they do not.
    """

    config: ModelConfig
    defs: ModelDefs
    mesh: Mesh
    dtype: Any
    arena_layout: ArenaLayout
    num_rows: int
    table_columns: int
    max_logprobs: int
    mailboxes: Mailboxes | None = None

    def weights(self, module: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Parameters of one `lumen.model.ModuleDef`."""
        return tuple(
            self.struct(shape, dtype, spec)
            for shape, dtype, spec in zip(
                module.global_shapes, module.dtypes, module.specs, strict=True
            )
        )

    def hidden(self, tokens: int) -> jax.ShapeDtypeStruct:
        """Hidden states [tokens, hidden size]."""
        return self.struct((tokens, self.config.hidden_size), self.dtype, WHOLE)

    def arena(self) -> tuple[jax.ShapeDtypeStruct]:
        """The one segment there is: the arenas of all devices, one behind the other."""
        layout = self.arena_layout
        slots = layout.slots * self.mesh.size
        return (self.struct((slots, *layout.slot_shape), layout.dtype, ARENA),)

    def prefill_call(self, tokens: int, sequences: int) -> jax.ShapeDtypeStruct:
        """A packed prefill call: tokens, then of all sequences tables, starts, counts, rows."""
        return self.int32(tokens + sequences * (self.table_columns + SEQUENCE_FIELDS))

    def place(self) -> Place:
        """Of a unit, of shape structs."""
        offsets: Any = (self.int32(),) * self.config.unit_layers
        mail: Any = ()
        if (boxes := self.mailboxes) is not None:
            mail = (self.struct((boxes.devices, boxes.columns), jnp.int32, ARENA),)
        return Place(offsets, mail)

    def mail(self, place: Place) -> Mail | None:
        """What sums over devices take, on one device inside a shard_map."""
        if self.mailboxes is None:
            return None
        (addresses,) = place.mail
        return Mail(self.mailboxes, addresses[0])

    def int32(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Integers that every device has."""
        return self.struct(shape, jnp.int32, WHOLE)

    def float32(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Wide numbers that every device has."""
        return self.struct(shape, jnp.float32, WHOLE)

    def struct(
        self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec
    ) -> jax.ShapeDtypeStruct:
        """An array on the mesh."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))
