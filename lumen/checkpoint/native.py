"""The native format: one Orbax checkpoint per unit, so that one unit can be restored alone.

A native checkpoint is a directory:

    lumen.json       format version, configuration, dtype, revision; the tensors and files of
                     every part
    embedding/       an Orbax checkpoint of `model.embed_tokens.weight`
    unit_000/ ...    an Orbax checkpoint of each unit's tensors, by canonical name
    head/            an Orbax checkpoint of `model.norm.weight` and, unless tied, `lm_head.weight`
    tokenizer.json, tokenizer_config.json, chat_template.jinja   where the source had a tokenizer

Each Orbax checkpoint is a flat dictionary of arrays that any Orbax program can read.
"""

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lumen.config import ModelConfig, RopeScaling
from lumen.errors import CheckpointError

FORMAT = 1
MANIFEST = "lumen.json"

Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""Canonical name to array."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One Orbax checkpoint: name to (dtype, shape), and its files' sizes in bytes by path."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    files: Mapping[str, int]


class NativeSource:
    """A TensorSource over a native checkpoint.

    Reading any tensor restores its whole part and keeps it until another part is read, so
    reading in the order of `shapes()` restores each part once and holds one at a time. Files of
    parts that are not read need not be there. May be used from several threads.
    """

    def __init__(self, directory: Path) -> None:
        """Read the manifest and compare file sizes.

        Raises CheckpointError if the manifest is damaged, of another format version, or a file
        is not as long as it was written.
        """
        self.directory = directory
        manifest = _read_manifest(directory / MANIFEST)
        try:
            self._config = _config_from(manifest["config"])
            self._revision = str(manifest["revision"])
            self.dtype = str(manifest["dtype"])
            self._parts = {name: _part_from(part) for name, part in manifest["parts"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{directory / MANIFEST} is damaged: {error!r}. Convert the model again."
            ) from error
        self._part_of = {
            tensor: name for name, part in self._parts.items() for tensor in part.tensors
        }
        for name in self._parts:
            self._check_files(name, required=False)
        self._lock = threading.Lock()
        self._held: tuple[str, Tensors] | None = None

    @property
    def config(self) -> ModelConfig:
        """The model as converted, its grouping into units included."""
        return self._config

    @property
    def revision(self) -> str:
        """Hash of configuration and every weight, computed at conversion."""
        return self._revision

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name to shape, part by part."""
        return {
            name: shape
            for part in self._parts.values()
            for name, (_, shape) in part.tensors.items()
        }

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor in its stored dtype. Raises CheckpointError if missing or damaged."""
        part = self._part_of.get(name)
        if part is None:
            raise CheckpointError(f"{self.directory} holds no tensor named {name}.")
        with self._lock:
            if self._held is None or self._held[0] != part:
                self._held = None  # frees the part held before the next one is read
                self._held = (part, self._restore(part))
            return self._held[1][name]

    def restore_unit(self, unit: int) -> Tensors:
        """All tensors of one stored unit by canonical name, from that unit's files alone.

        Raises CheckpointError if there is no such unit or its files are missing or damaged.
        """
        part = unit_part(unit)
        if part not in self._parts:
            raise CheckpointError(
                f"{self.directory} holds {self._config.num_units} units; there is no unit {unit}."
            )
        return self._restore(part)

    def _restore(self, name: str) -> Tensors:
        # Imported here: a process that only needs the configuration or the tokenizer (the
        # gateway) must not load Orbax, which initialises JAX's backends.
        import orbax.checkpoint as ocp

        self._check_files(name, required=True)
        stored = self._parts[name].tensors
        arguments = {tensor: ocp.RestoreArgs(restore_type=np.ndarray) for tensor in stored}
        path = (self.directory / name).absolute()
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tensors: Tensors = checkpointer.restore(path, restore_args=arguments)
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be restored: {error}. Convert the model again."
            ) from error
        for tensor, (dtype, shape) in stored.items():
            found = tensors[tensor]
            if found.shape != shape or found.dtype.name != dtype:
                raise CheckpointError(
                    f"{path}: {tensor} is {found.dtype.name}{list(found.shape)}, but {MANIFEST} "
                    f"says {dtype}{list(shape)}. Convert the model again."
                )
        return {tensor: tensors[tensor] for tensor in stored}

    def _check_files(self, part: str, required: bool) -> None:
        for name, size in self._parts[part].files.items():
            path = self.directory / part / name
            found = path.stat().st_size if path.exists() else None
            if found is None and required:
                raise CheckpointError(f"{path} is missing. Convert the model again.")
            if found is not None and found != size:
                raise CheckpointError(
                    f"{path} has {found} bytes, {size} were written: it is truncated or was "
                    f"changed. Convert the model again."
                )


def unit_part(unit: int) -> str:
    """The folder of one unit."""
    return f"unit_{unit:03d}"


def is_native(path: Path) -> bool:
    """Whether this is a (finished) native checkpoint."""
    return (path / MANIFEST).is_file()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format version {version!r}; this Lumen reads version {FORMAT}. "
            f"Convert the model again with tools/convert_checkpoint.py."
        )
    assert isinstance(manifest, dict)
    return manifest


def _config_from(fields: Mapping[str, Any]) -> ModelConfig:
    scaling = fields["rope_scaling"]
    return ModelConfig(
        **{
            **fields,
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
            "eos_token_ids": tuple(fields["eos_token_ids"]),
        }
    )


def _part_from(part: Mapping[str, Any]) -> Part:
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in part["tensors"].items()}
    return Part(tensors, dict(part["files"]))
