"""Weights in a Hugging Face directory: config.json beside one or several safetensors files."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lumen.checkpoint.layout import is_harmless_extra
from lumen.checkpoint.revision import fingerprint
from lumen.checkpoint.safetensors_file import SafetensorsFile
from lumen.config import ModelConfig
from lumen.errors import CheckpointError
from lumen.hf_config import read_model_config

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class HuggingFaceSource:
    """A TensorSource over a directory as `save_pretrained` writes it.

    Opening reads the headers only; `read` returns views of memory-mapped files, so what is in
    memory at any time is what the caller holds plus the operating system's page cache.
    """

    def __init__(self, directory: Path) -> None:
        """Read configuration and headers.

        Raises ModelConfigError for an unsupported model and CheckpointError for missing,
        damaged or truncated weight files.
        """
        self.directory = directory
        self._config = read_model_config(directory)
        self._files = [SafetensorsFile(path) for path in _weight_files(directory)]
        self._where = {
            name: file
            for file in self._files
            for name in file.tensors
            if not is_harmless_extra(name, self._config)
        }

    @property
    def config(self) -> ModelConfig:
        """The model of config.json."""
        return self._config

    @cached_property
    def revision(self) -> str:
        """Fingerprint of configuration, headers, sizes and sampled content."""
        tensors = {
            name: (file.tensors[name].dtype, file.tensors[name].shape)
            for name, file in self._where.items()
        }
        return fingerprint(self._config, tensors, [file.path for file in self._files])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name to shape; rotary buffers and a second copy of a tied head left out."""
        return {name: file.tensors[name].shape for name, file in self._where.items()}

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor in its stored dtype, a read-only view. Raises CheckpointError if missing."""
        if name not in self._where:
            raise CheckpointError(f"{self.directory} holds no tensor named {name}.")
        return self._where[name].read(name)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _INDEX).exists():
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / _INDEX} has no readable weight_map.") from error
        absent = [name for name in names if not (directory / name).exists()]
        if absent:
            raise CheckpointError(
                f"{directory} lacks {len(absent)} of the {len(names)} weight files its index "
                f"names, the first being {absent[0]}. Download the missing files."
            )
        return [directory / name for name in names]
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise CheckpointError(
            f"{directory} holds PyTorch weight files only; Lumen reads safetensors. "
            f"Convert them, for example with save_pretrained of transformers."
        )
    raise CheckpointError(f"{directory} holds neither {_SINGLE} nor {_INDEX}.")
