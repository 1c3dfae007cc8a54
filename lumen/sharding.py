"""How one decoder is cut over the devices of a replica: the only file with sharding rules.

Column-parallel matrices (qkv, gate_up, the vocabulary) are cut along their rows, row-parallel
ones (o, down) along their columns, so a layer needs two sums over devices. What does not divide
is padded with zeros, which change no result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jax.sharding import PartitionSpec as P

from lumen.errors import ModelConfigError

TENSOR_AXIS = "tensor"
"""The mesh axis over which a replica is tensor-parallel."""

PARAMETER_SPECS: Mapping[str, P] = MappingProxyType(
    {
        "table": P(TENSOR_AXIS, None),  # [vocab, hidden], embedding and lm head
        "norm": P(),  # [hidden], the final norm
        "norms": P(),  # [layers, 2, hidden]
        "qkv": P(TENSOR_AXIS, None),  # [(q + 2 kv) * head_dim, hidden]
        "qkv_bias": P(None, TENSOR_AXIS),  # [layers, (q + 2 kv) * head_dim]
        "qk_norms": P(),  # [layers, 2, head_dim]
        "o": P(None, TENSOR_AXIS),  # [hidden, q * head_dim]
        "gate_up": P(TENSOR_AXIS, None),  # [2 * intermediate, hidden]
        "down": P(None, TENSOR_AXIS),  # [hidden, intermediate]
    }
)
"""Partition spec of every parameter, by the name of its attribute in `lumen.decoder`."""


def padded(size: int, tensor: int) -> int:
    """The smallest multiple of `tensor` that holds `size`."""
    return -(-size // tensor) * tensor


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Which query and KV heads each device of a tensor-parallel replica computes.

    Every device has the same numbers of heads. With at least as many KV heads as devices each
    device has whole groups, and KV heads that do not divide are padded (3 over 2 devices: 4).
    With fewer, each device has one KV head and part of its query group: KV heads are replicated
    as often as that shortens the longest part (3 KV heads with groups of 3: over 4 devices whole
    groups on three of them, over 6 parts of 2 and 1). Padding heads have zero weights; their
    output is multiplied by zero rows of the output projection.

    Raises ModelConfigError if `tensor` is not positive.
    """

    num_heads: int
    num_kv_heads: int
    tensor: int

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out. Raises ModelConfigError."""
        if self.tensor < 1:
            raise ModelConfigError(
                f"Tensor parallelism is {self.tensor}; it must be a positive number of devices."
            )

    @property
    def group(self) -> int:
        """Query heads per KV head on a device; query head i attends to KV head i // group."""
        logical = self.num_heads // self.num_kv_heads
        if self.tensor <= self.num_kv_heads:
            return logical
        # The shortest part of a group for which all parts find a device.
        return next(
            part
            for part in range(1, logical + 1)
            if self.num_kv_heads * -(-logical // part) <= self.tensor
        )

    @property
    def kv_per_device(self) -> int:
        """KV heads on each device, padding included."""
        return -(-self.num_kv_heads // self.tensor)

    @property
    def q_per_device(self) -> int:
        """Query heads on each device, padding included."""
        return self.kv_per_device * self.group

    def kv_heads(self, device: int) -> tuple[int | None, ...]:
        """Logical KV head of each KV slot of a device (0 .. tensor-1); None is padding."""
        if self.tensor <= self.num_kv_heads:
            first = device * self.kv_per_device
            heads = range(first, first + self.kv_per_device)
        else:
            heads = range(device // self._parts, device // self._parts + 1)
        return tuple(head if head < self.num_kv_heads else None for head in heads)

    def q_heads(self, device: int) -> tuple[int | None, ...]:
        """Logical query head of each query slot of a device (0 .. tensor-1); None is padding."""
        logical = self.num_heads // self.num_kv_heads
        part = 0 if self.tensor <= self.num_kv_heads else device % self._parts
        in_group = range(part * self.group, (part + 1) * self.group)
        return tuple(
            None if head is None or i >= logical else head * logical + i
            for head in self.kv_heads(device)
            for i in in_group
        )

    @property
    def _parts(self) -> int:
        """Devices that share one KV head, when there are more devices than KV heads."""
        return -(-(self.num_heads // self.num_kv_heads) // self.group)
