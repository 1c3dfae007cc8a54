"""One safetensors file: its header, and its tensors as views of a memory map.

The format (huggingface.co/docs/safetensors) is eight bytes of header length, a JSON header and
the tensors' bytes. It is read here directly, because the library's numpy front end copies each
tensor and cannot say by how much a file is too short.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lumen.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The format's own bound: a longer header means this is not a safetensors file.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `begin` and `end` are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A memory-mapped safetensors file whose header is consistent with its size."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises CheckpointError if the file is not whole."""
        self.path = path
        self.tensors = _read_header(path)
        self._bytes: np.memmap[Any, np.dtype[np.uint8]] | None = None

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor in its stored dtype, a read-only view of the file.

        Raises CheckpointError for a dtype other than float32, float16 and bfloat16.
        """
        tensor = self.tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"Tensor {name} in {self.path} has type {tensor.dtype}; "
                f"supported are {', '.join(_DTYPES)}."
            )
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        raw = np.asarray(self._bytes[tensor.begin : tensor.end])
        return raw.view(dtype).reshape(tensor.shape)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path} ({size} bytes) is not a safetensors file, or its start is damaged."
                )
            if size < 8 + length:
                raise CheckpointError(
                    f"{path} is truncated: its header alone ends at byte {8 + length}, "
                    f"the file has {size} bytes. Download it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged header: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: it is not a JSON object.")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: its tensors end at byte {end}, the file has {size} bytes. "
            f"Download it again."
        )
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    try:
        begin, end = entry["data_offsets"]
        tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), base + begin, base + end)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a damaged header entry for tensor {name}.") from error
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is not None and end - begin != dtype.itemsize * math.prod(tensor.shape):
        raise CheckpointError(
            f"{path}: tensor {name} of type {tensor.dtype} and shape {list(tensor.shape)} "
            f"needs {dtype.itemsize * math.prod(tensor.shape)} bytes, the header gives it "
            f"{end - begin}."
        )
    return tensor
