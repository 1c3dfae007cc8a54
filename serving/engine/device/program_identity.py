"""What a replica's compiled programs depend on, written down: the key of the executable cache."""

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lumen_kernels
from jax.sharding import Mesh, PartitionSpec
from lumen_kernels.target import Target

import lumen
from lumen.model import ModuleDef
from serving.engine.device.program_shapes import ProgramShapes

SOURCES = tuple(
    Path(module_file).parent
    for module_file in (lumen.__file__, lumen_kernels.__file__, __file__)
    if module_file is not None
)
"""Folders whose files decide what a program computes."""

_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_DEVICE_FACTS = (
    "platform", "device_kind", "id", "process_index", "coords", "core_on_chip", "slice_index",
    "num_cores", "core_count", "compute_capability",
)  # fmt: skip
# Of JAX's settings, those that say where things are kept, how many CPU devices there are beside
# the mesh's, and how much is said. Whatever is not named here is part of the key.
_NO_MATTER = (
    "jax_compilation_cache", "jax_persistent_cache", "jax_enable_compilation_cache",
    "jax_num_cpu_devices", "jax_platforms", "jax_log", "jax_debug_log", "jax_dump", "jax_traceback",
    "jax_tracer_error", "jax_pprint", "jax_explain_cache_misses",
)  # fmt: skip


def replica_identity(
    shapes: ProgramShapes, target: Target, anywhere: bool = False
) -> dict[str, Any]:
    """Everything that the programs of these shapes depend on, except kind and bucket, as JSON.

    Two starts may share executables if and only if their identities are equal. anywhere: programs
    run on any device like that of the mesh, whatever its number. Raises TypeError for a field of
    `ProgramShapes` that it cannot write down.
    """
    devices = list(shapes.mesh.devices.flat)
    return {
        "shapes": _words(shapes),
        "target": _words(target),
        "devices": [_device(device, anywhere) for device in devices],
        "runtime": _runtime(devices[0]),
        **_code(),
    }


def code_identity(shapes: ProgramShapes, target: Target) -> str:
    """Digest of all that `replica_identity` has but the devices and their runtime.

    Two processes with the same one make the same programs for the same kind of device.
    """
    return digest({"shapes": _words(shapes), "target": _words(target), **_code()})


def jax_settings() -> dict[str, Any]:
    """JAX's settings as far as they matter to programs."""
    values = jax.config.values
    return {name: values[name] for name in sorted(values) if not name.startswith(_NO_MATTER)}


def digest(identity: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def source_digest(folders: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 over names and contents of all files there, byte code excepted."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                content = path.read_bytes()
                name = path.relative_to(folder.parent).as_posix()
                found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


# Taken when this is imported, like the code: an edit made while weights load, say, must not give
# the programs of the old code the key of the new.
_IMPORTED = source_digest(SOURCES)


def _words(value: Any) -> Any:
    """The value in terms of JSON, the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, PartitionSpec):  # before tuples: it may be one
        return str(value)
    if isinstance(value, Mesh):
        return {"axes": list(value.axis_names), "shape": list(value.devices.shape)}
    if isinstance(value, ModuleDef):  # the graph itself follows from configuration and sources
        parts = (value.paths, value.global_shapes, value.dtypes, value.specs)
        return [_words(part) for part in parts]
    if isinstance(value, tuple | list):
        return [_words(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: _words(getattr(value, field.name)) for field in fields}
    return jnp.dtype(value).name  # a TypeError if it is nothing we know


def _device(device: jax.Device, anywhere: bool) -> dict[str, str]:
    facts = [fact for fact in _DEVICE_FACTS if not (anywhere and fact == "id")]
    return {fact: str(getattr(device, fact, "")) for fact in facts}


def _runtime(device: jax.Device) -> dict[str, str]:
    client = device.client
    runtime = {
        "platform": client.platform,
        "version": client.platform_version,
        "python": sys.version,
    }
    if device.platform == "cpu":  # programs are machine code of this very processor
        runtime["processor"] = _processor()
    return runtime


def _processor() -> str:
    facts = {platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = ("model name", "flags", "Features", "CPU part")
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        facts.update(line for line in lines if line.startswith(names))
    return " ".join(sorted(facts))


def _packages() -> Sequence[str]:
    """All that is installed: a tracer, a compiler or a math library may be any of them."""
    return sorted({f"{one.name}=={one.version}" for one in importlib.metadata.distributions()})


def _code() -> dict[str, Any]:
    return {
        "packages": _packages(),
        "flags": {name: os.environ.get(name, "") for name in _FLAG_VARIABLES},
        "jax": {name: str(value) for name, value in jax_settings().items()},
        "sources": _IMPORTED,
    }
