"""Writes native checkpoints, unit by unit, so that a half-written one is never taken for whole."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lumen.checkpoint.casting import cast, common_dtype
from lumen.checkpoint.layout import EMBEDDING, outer_shapes, unit_shapes
from lumen.checkpoint.native import FORMAT, MANIFEST, Part, Tensors, unit_part
from lumen.checkpoint.revision import config_identity
from lumen.checkpoint.validation import check
from lumen.config import ModelConfig
from lumen.errors import CheckpointError
from lumen.tensor_source import TensorSource
from lumen.tokenizer import Tokenizer

OnTensor = Callable[[int, int], None]
"""Called with the number of tensors done and their total."""


def write_native(
    source: TensorSource,
    directory: Path,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    on_tensor: OnTensor | None = None,
) -> None:
    """Convert a source into a native checkpoint at `directory`, which must not exist yet.

    One unit is in memory at a time. Everything is written to a temporary directory beside the
    target, which is renamed at the end. dtype: "float32", "bfloat16" or "float16"; None keeps
    what is stored. Orbax initialises JAX's backends in this process.

    Raises CheckpointError if the source does not match its configuration, a value does not fit
    the dtype, or the target exists.
    """
    import orbax.checkpoint as ocp

    check(source)
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; choose another place or remove it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        total = len(source.shapes())
        digest = hashlib.sha256(config_identity(source.config))
        parts: dict[str, Part] = {}
        dtypes: set[str] = set()
        done = 0
        with ocp.PyTreeCheckpointer() as checkpointer:
            for name, tensor_names in _part_contents(source.config).items():
                tensors: Tensors = {}
                for tensor_name in tensor_names:
                    tensor = cast(tensor_name, source.read(tensor_name), dtype)
                    _digest_tensor(digest, tensor_name, tensor)
                    tensors[tensor_name] = tensor
                    dtypes.add(tensor.dtype.name)
                    done += 1
                    if on_tensor is not None:
                        on_tensor(done, total)
                checkpointer.save((partial / name).absolute(), tensors)
                parts[name] = _describe(partial / name, tensors)
        if tokenizer is not None:
            tokenizer.save(partial)
        manifest = {
            "format": FORMAT,
            "dtype": common_dtype(dtypes),
            "revision": digest.hexdigest()[:32],
            "config": dataclasses.asdict(source.config),
            "parts": {name: dataclasses.asdict(part) for name, part in parts.items()},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_path(directory: Path) -> Path:
    """Where this process writes before it renames; the name says what it is and whose."""
    return directory.with_name(f"{directory.name}.partial-{os.getpid()}")


def _part_contents(config: ModelConfig) -> dict[str, list[str]]:
    """Part name to the tensors in it, in the order they are written."""
    outer = outer_shapes(config)
    contents = {"embedding": [EMBEDDING]}
    for unit in range(config.num_units):
        contents[unit_part(unit)] = list(unit_shapes(config, unit))
    contents["head"] = [name for name in outer if name != EMBEDDING]
    return contents


def _digest_tensor(digest: Any, name: str, tensor: np.ndarray[Any, np.dtype[Any]]) -> None:
    digest.update(f"|{name}|{tensor.dtype.name}|{list(tensor.shape)}|".encode())
    digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)


def _describe(folder: Path, tensors: Tensors) -> Part:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Part(
        tensors={name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()},
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    )
