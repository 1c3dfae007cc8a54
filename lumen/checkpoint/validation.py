"""Compares a weight source with its configuration before any weight is loaded."""

from collections.abc import Sequence

from lumen.checkpoint.layout import is_harmless_extra, required_shapes
from lumen.errors import CheckpointError
from lumen.tensor_source import TensorSource

_LISTED = 5


def check(source: TensorSource) -> None:
    """Refuse a source whose tensors are not exactly those its configuration requires.

    Reads shapes only. Raises CheckpointError naming up to five each of the missing, the
    unexpected and the mis-shaped tensors, with the shape expected and the shape found.
    """
    required = required_shapes(source.config)
    found = source.shapes()
    missing = [name for name in required if name not in found]
    extra = [
        name
        for name in found
        if name not in required and not is_harmless_extra(name, source.config)
    ]
    misshaped = [
        f"{name} (expected {list(shape)}, found {list(found[name])})"
        for name, shape in required.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {_listing(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of the wrong shape", misshaped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The checkpoint does not match its {source.config.family} configuration: "
            f"{'; '.join(problems)}. Check that configuration and weights belong together."
        )


def _listing(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
