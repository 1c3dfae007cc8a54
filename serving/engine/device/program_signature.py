"""Whether a loaded executable takes what the program of its name takes."""

from typing import Any

import jax

UNTOLD = object()
"""In place of an argument, or a part of one, that is not looked at."""


def mismatch(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> str | None:
    """What the program takes otherwise than `arguments` say; None if it takes just these."""
    takes, placed = compiled.in_avals[0], compiled.input_shardings[0]
    if len(takes) != len(arguments):
        return f"it takes {len(takes)} arguments, not {len(arguments)}"
    for place, (found, shardings, wanted) in enumerate(zip(takes, placed, arguments, strict=True)):
        tree: Any
        leaves, tree = jax.tree.flatten(wanted)
        try:
            parts = tree.flatten_up_to(found), tree.flatten_up_to(shardings)
        except ValueError:
            return f"argument {place} has another structure"
        for aval, sharding, struct in zip(*parts, leaves, strict=True):
            if struct is UNTOLD:
                continue
            if not jax.tree_util.all_leaves([aval]):
                return f"argument {place} has another structure"
            if (aval.shape, aval.dtype) != (struct.shape, struct.dtype):
                return f"argument {place} is {aval.str_short()}, not {_short(struct)}"
            # An argument that the program does not look at has no sharding.
            if sharding is not None and not sharding.is_equivalent_to(
                struct.sharding, len(struct.shape)
            ):
                return f"argument {place} lies otherwise: {sharding}, not {struct.sharding}"
    return None


def _short(struct: jax.ShapeDtypeStruct) -> str:
    return f"{struct.dtype.name}[{','.join(map(str, struct.shape))}]"
