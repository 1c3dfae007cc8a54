"""Changes the number type of weights on conversion."""

from collections.abc import Collection
from typing import Any

import ml_dtypes
import numpy as np

from lumen.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The number types weights can be stored in, by name."""


def cast(
    name: str, tensor: np.ndarray[Any, np.dtype[Any]], dtype: str | None
) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor in another number type, rounded to nearest; None leaves it as it is.

    Raises CheckpointError for an unknown dtype, and if a finite value becomes infinite, as large
    values do in float16.
    """
    if dtype is None:
        return tensor
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if tensor.dtype == DTYPES[dtype]:
        return tensor
    with np.errstate(over="ignore"):
        result = tensor.astype(DTYPES[dtype])
    if dtype != "float32" and bool((np.isinf(result) & ~np.isinf(tensor)).any()):
        raise CheckpointError(
            f"{name} has values too large for {dtype}; convert to bfloat16 or float32 instead."
        )
    return result


def common_dtype(names: Collection[str]) -> str:
    """The one name among them, or "mixed"."""
    return next(iter(names)) if len(names) == 1 else "mixed"
