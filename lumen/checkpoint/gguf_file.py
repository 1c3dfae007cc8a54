"""One GGUF file: its metadata, and its tensors dequantised one by one from a memory map.

The container (ggml's docs/gguf.md, versions 2 and 3, little endian) is read here: the `gguf`
package builds a numpy object per string, which takes seconds for a vocabulary, and cannot say by
how much a file is too short. Dequantisation is the package's.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from lumen.errors import CheckpointError

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
# Stored as they are: a view needs no arithmetic.
_PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape in numpy's order, and its bytes [begin, end) in the file."""

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """A memory-mapped GGUF file whose header is consistent with its size.

    metadata: every key of the file; strings as str, arrays as lists.
    tensors: name as stored to where it lies.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises CheckpointError if the file is not whole."""
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise CheckpointError(f"{path} is not a GGUF file.")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        reader = _Reader(path, self._map)
        version = reader.scalar("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF version {version} or big-endian; "
                f"little-endian versions {_VERSIONS[0]} and {_VERSIONS[1]} are supported."
            )
        tensor_count, key_count = reader.scalar("<Q"), reader.scalar("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = reader.text()
            self.metadata[key] = reader.value(reader.scalar("<I"))
        entries = [reader.tensor_entry() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        base = -(-reader.offset // alignment) * alignment
        self.tensors = {name: self._place(name, entry, base) for name, *entry in entries}
        end = max((tensor.end for tensor in self.tensors.values()), default=0)
        if end > self.size:
            raise CheckpointError(
                f"{path} is truncated: its tensors end at byte {end}, the file has "
                f"{self.size} bytes. Download it again."
            )
        self._refuse_unknown_quantisation()

    def _place(self, name: str, entry: list[Any], base: int) -> GgufTensor:
        dimensions, kind_id, offset = entry
        try:
            kind = gguf.GGMLQuantizationType(kind_id)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type number {kind_id}, which is unknown."
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        elements = math.prod(dimensions)
        if elements % block:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {elements} elements, "
                f"not a multiple of {kind.name}'s block of {block}."
            )
        begin = base + offset
        length = elements // block * block_bytes
        return GgufTensor(kind.name, tuple(reversed(dimensions)), begin, begin + length)

    def _refuse_unknown_quantisation(self) -> None:
        for kind in sorted({t.kind for t in self.tensors.values()} - set(_PLAIN)):
            quantisation = gguf.GGMLQuantizationType[kind]
            block = np.zeros(gguf.GGML_QUANT_SIZES[quantisation][1], dtype=np.uint8)
            try:
                gguf.dequantize(block, quantisation)
            except NotImplementedError as error:
                example = next(name for name, t in self.tensors.items() if t.kind == kind)
                raise CheckpointError(
                    f"{self.path}: tensors of type {kind} (such as {example}) cannot be "
                    f"dequantised; use a file quantised as Q4_0 to Q8_0, a K-quant, F16 or BF16."
                ) from error

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor: F32, F16 and BF16 as stored (a view), all else dequantised to float32."""
        tensor = self.tensors[name]
        raw = self._bytes[tensor.begin : tensor.end]
        plain = _PLAIN.get(tensor.kind)
        if plain is not None:
            return raw.view(plain).reshape(tensor.shape)
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor.kind])
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape)

    @cached_property
    def _bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self._map, dtype=np.uint8)


class _Reader:
    """A position in the header. Running off the end of the file raises CheckpointError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.offset = 4

    def _take(self, length: int) -> int:
        """Advance by `length` bytes and return where they begin."""
        begin, self.offset = self.offset, self.offset + length
        if self.offset > len(self._data):
            raise CheckpointError(
                f"{self._path} is truncated: its header reaches byte {self.offset} or beyond, "
                f"the file has {len(self._data)} bytes. Download it again."
            )
        return begin

    def scalar(self, form: str) -> Any:
        begin = self._take(struct.calcsize(form))
        return struct.unpack_from(form, self._data, begin)[0]

    def text(self) -> str:
        length = self.scalar("<Q")
        begin = self._take(length)
        return self._data[begin : begin + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in _SCALARS:
                form = f"<{count}{_SCALARS[item][1]}"
                return list(struct.unpack_from(form, self._data, self._take(struct.calcsize(form))))
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path} has metadata of unknown type number {kind}.")
        return self.scalar(_SCALARS[kind])

    def tensor_entry(self) -> tuple[str, list[int], int, int]:
        name = self.text()
        rank = self.scalar("<I")
        dimensions = [self.scalar("<Q") for _ in range(rank)]
        return name, dimensions, self.scalar("<I"), self.scalar("<Q")
