"""What attention operations have in common, and the checks of their arguments."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lumen_kernels.arena import ArenaShape, arena_shape
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Target

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

Arena = tuple[jax.Array, ...]
"""Segments of an arena, see `lumen_kernels.arena`."""


@dataclass(frozen=True, slots=True)
class Options:
    """Static settings of an attention call.

    kv_heads: of the device. scale: scores are q·k times it. sliding_window: a query at position p
    sees p - window + 1 .. p; None: all. soft_cap: scores become cap * tanh(score / cap); None:
    they do not. with_lse: also return the natural log-sum-exp of the scores. batch_invariant: sums
    are made in an order that depends on the row's own length alone, so that a row has the same bits
    in any batch; where that is so anyway it changes nothing.
    """

    kv_heads: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    with_lse: bool
    target: Target
    batch_invariant: bool = False


def checked(
    operation: str,
    q: jax.Array,
    new_kv: tuple[jax.Array | None, jax.Array | None],
    arena: Sequence[jax.Array],
    tables: jax.Array,
    per_row: dict[str, jax.Array],
    kv_heads: int | None,
) -> tuple[ArenaShape, int]:
    """Check what an attention operation was given; returns the arena's shape and the KV heads.

    q [..., heads, head_dim]; new_kv: k and v, both [..., kv heads, head_dim] or both None, then
    kv_heads must be given; per_row: name to int32 [rows]. Raises KernelArgumentError.
    """

    def wrong(argument: str, problem: str) -> KernelArgumentError:
        return KernelArgumentError(operation, argument, problem)

    if q.dtype not in DTYPES:
        raise wrong("q", f"is {q.dtype}; it must be float32, bfloat16 or float16.")
    *tokens, heads, head_dim = q.shape
    shape = arena_shape(operation, arena, head_dim)
    if arena[0].dtype != q.dtype:
        raise wrong("arena", f"is {arena[0].dtype}, but q is {q.dtype}; they must be equal.")
    k, v = new_kv
    if (k is None) != (v is None):
        raise wrong("v" if v is None else "k", "is missing; give both k and v, or neither.")
    if k is not None and v is not None:
        kv_heads = k.shape[-2]
        for name, array in (("k", k), ("v", v)):
            if array.shape != (*tokens, kv_heads, head_dim) or array.dtype != q.dtype:
                raise wrong(
                    name,
                    f"is {array.dtype}{list(array.shape)}; for q {q.dtype}{list(q.shape)} it must "
                    f"be {q.dtype}[{', '.join(map(str, tokens))}, kv heads, {head_dim}].",
                )
    if kv_heads is None:
        raise wrong("kv_heads", "must be given where k and v are not.")
    if kv_heads < 1 or heads % kv_heads:
        raise wrong("q", f"has {heads} heads, which {kv_heads} KV heads do not divide.")
    if any(slots % kv_heads for slots in shape.slots):
        raise wrong("arena", f"has segments of {shape.slots} slots; {kv_heads} must divide each.")
    if tables.ndim != 2 or tables.dtype != jnp.int32:
        raise wrong("tables", f"is {tables.dtype}{list(tables.shape)}; it must be int32 [rows, n].")
    for name, array in per_row.items():
        if array.shape != tables.shape[:1] or array.dtype != jnp.int32:
            raise wrong(
                name,
                f"is {array.dtype}{list(array.shape)}; it must be int32 [{tables.shape[0]}], one "
                "per row of tables.",
            )
    return shape, kv_heads


def check_options(operation: str, options: Options) -> None:
    """Raises KernelArgumentError for settings that make no sense."""
    if not options.scale > 0:
        raise KernelArgumentError(operation, "scale", f"is {options.scale}; it must be positive.")
    if options.sliding_window is not None and options.sliding_window < 1:
        raise KernelArgumentError(
            operation, "sliding_window", f"is {options.sliding_window}; it must be at least 1."
        )
    if options.soft_cap is not None and not options.soft_cap > 0:
        raise KernelArgumentError(
            operation, "soft_cap", f"is {options.soft_cap}; it must be positive."
        )
