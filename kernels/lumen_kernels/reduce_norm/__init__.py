"""The sum of a product over the devices of tensor parallelism, and what comes behind it.

Behind it come the residual sum and mostly a norm. On Hopper with few rows all of it is one launch,
in which devices store into each other's memory; elsewhere XLA sums.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lumen_kernels.add_norm import add_rms_norm
from lumen_kernels.reduce_norm import mosaic_gpu
from lumen_kernels.reduce_norm.mailbox import Mailboxes
from lumen_kernels.target import Backend, Target

__all__ = ["Mail", "Mailboxes", "SumOverDevices", "reduce_add_rms_norm"]

# All sums of a program share one lowered kernel: the compiler does not see that they are the same.
_on_gpu = jax.jit(mosaic_gpu.run, static_argnums=(3, 4))


class Mail(NamedTuple):
    """How a device reaches the others' memory: `mailbox.addresses` as the device has them,
    int32 [columns]."""

    boxes: Mailboxes
    addresses: jax.Array


@dataclass(frozen=True, slots=True)
class SumOverDevices:
    """Sums a product over the devices of a mesh's axis, inside a shard_map.

    mail: None: by XLA alone.
    """

    axis_name: str
    mail: Mail | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sum, on every device."""
        found: jax.Array = lax.psum(x, self.axis_name)
        return found


def reduce_add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array | None,
    eps: float,
    over: SumOverDevices,
    *,
    half: int,
    target: Target,
) -> tuple[jax.Array, jax.Array | None]:
    """hidden = residual + the sum of x, rounded to their dtype, and its norm: both [rows, n].

    x and residual [rows, n] of one dtype; weight float32 [n], None: no norm is wanted. half: of
    the mailbox, 0 or 1; one call of a program takes the one and the next the other, beginning with
    0 and ending with 1. The kernel adds in float32 and rounds the sum once. Raises
    KernelArgumentError.
    """
    mail = over.mail
    if mail is not None and _has_kernel(x, mail.boxes, target):
        place = jnp.array([half], jnp.int32)  # data: were it static, there would be two kernels
        made = _on_gpu(x, residual, weight, eps, mail.boxes, mail.addresses, place)
        return made[0], made[1] if weight is not None else None
    if weight is None:
        return residual + over(x), None
    return add_rms_norm(over(x), residual, weight, eps, target=target)


def _has_kernel(x: jax.Array, boxes: Mailboxes, target: Target) -> bool:
    rows, width = x.shape
    if target.backend is not Backend.MOSAIC_GPU or target.interpret or x.dtype != jnp.bfloat16:
        return False
    return 0 < rows <= boxes.rows and width == boxes.width
