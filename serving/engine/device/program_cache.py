"""Executables kept from one start to the next, found without tracing what they came from.

One folder per replica identity (`program_identity`), one file per program:

    ROOT/IDENTITY/identity.json      what the identity is made of, for people
    ROOT/IDENTITY/decode_unit-256    header, then a pickle of (executable, in tree, out tree)

Loading an executable runs what is in it, so the folder is trusted like the code itself: it must
belong to the user who runs this and be writable by nobody else. Files are written aside and
renamed: any number of processes may start on one folder, and each finds whole files or none.
A file that cannot be used, for whatever reason, is dropped and its program compiled anew.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from serving.engine.device.executables import loaded_executable, packed_executable
from serving.engine.device.program_identity import digest
from serving.engine.device.program_signature import mismatch
from serving.errors import ConfigurationError

MAX_BYTES = 1 << 30
"""Of all identities together. A replica of the 8B shape has 116 programs with configs/gpu.toml,
most of them far smaller than the 1.4 MiB of a unit."""

_FORMAT = b"lumen program 1"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgramCache:
    """The executables of one replica identity. Methods may be called from several threads.

    devices: of the replica, in the order of its mesh; they are part of the identity, except for
    which of several alike a single one is, where programs may move between them.
    """

    folder: Path
    devices: tuple[jax.Device, ...]

    def load(self, name: str, arguments: tuple[Any, ...]) -> jax.stages.Compiled | None:
        """The program of that name, if it is there and takes these arguments."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read (%s); compiling anew.", path, error)
            return None
        try:
            compiled = _unpacked(content, self._title(name), self.devices)
            wrong = mismatch(compiled, arguments)
        except Exception as error:  # unpickling and loading raise whatever they like
            compiled, wrong = None, f"{type(error).__name__}: {error}"
        if wrong is None:
            return compiled
        _log.warning("%s is of no use (%s); compiling anew.", path, wrong)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None

    def has(self, name: str) -> bool:
        """Whether there is something of that name; loading it may still fail."""
        return self._path(name).exists()

    def store(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keep a program that was compiled here, not one that was loaded. Never raises."""
        try:
            packed = packed_executable(compiled, self.devices)
        except Exception as error:  # serializing raises whatever it likes
            self._not_kept(name, error)
            return
        self.keep(name, packed)

    def keep(self, name: str, packed: bytes) -> None:
        """Keep what `packed_executable` made of a program, here or elsewhere. Never raises."""
        path = self._path(name)
        try:
            content = _entry(packed, self._title(name))
            self.folder.mkdir(mode=0o700, exist_ok=True)  # another process may have cleared it
            _write(path, content)
        except OSError as error:
            self._not_kept(name, error)

    def _not_kept(self, name: str, error: Exception) -> None:
        _log.warning("%s was not kept: %s: %s", self._path(name), type(error).__name__, error)

    def _path(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def _title(self, name: str) -> bytes:
        return f"{self.folder.name} {name}".encode()


def open_program_cache(
    root: Path, mesh: Mesh, identity: dict[str, Any], max_bytes: int = MAX_BYTES
) -> ProgramCache | None:
    """The cache of one replica identity below `root`; None if its devices cannot have one.

    Whether what is kept there can be used, `loads_what_it_saved` tells. Identities not used for
    longest are removed until all take at most `max_bytes`. Raises ConfigurationError if somebody
    else could write to `root`.
    """
    devices = tuple(mesh.devices.flat)
    if not may_load(devices):
        return None
    folder = root / digest(identity)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_trusted(root)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_trusted(folder)
        _write(folder / "identity.json", json.dumps(identity, indent=1).encode())  # used now
    except OSError as error:
        _log.warning("No executables are kept in %s: %s", root, error)
        return None
    _make_room(root, folder, max_bytes)
    return ProgramCache(folder, devices)


def may_load(devices: Sequence[jax.Device]) -> bool:
    """Whether programs may be read from any cache onto these devices.

    On TPU that crashes the runtime if device 0 is not among them (jax issue 38004).
    """
    return devices[0].platform != "tpu" or any(device.id == 0 for device in devices)


def may_move(mesh: Mesh) -> bool:
    """Whether what was compiled for another device like the only one of this mesh runs on it.

    Then all such devices share their programs. Found out with a small one; to be called while JAX's
    own cache is off.
    """
    device, *more = mesh.devices.flat
    if more or device.platform == "tpu":  # not tried there
        return False
    other = next((one for one in device.client.local_devices() if one != device), None)
    if other is None:
        return True  # there is nothing to be moved from
    elsewhere = Mesh(np.array([other]), mesh.axis_names)
    numbers = np.arange(4, dtype=np.float32)
    struct = jax.ShapeDtypeStruct(
        numbers.shape, numbers.dtype, sharding=NamedSharding(elsewhere, PartitionSpec())
    )
    try:
        compiled = jax.jit(lambda x: x + jnp.sum(x)).lower(struct).compile()
        loaded = loaded_executable(packed_executable(compiled, [other]), (device,))
        found = loaded(jax.device_put(numbers, NamedSharding(mesh, PartitionSpec())))
        return found.devices() == {device} and np.array_equal(found, numbers + numbers.sum())
    except Exception as error:  # a backend says in its own way that it cannot
        _log.info("Each of the devices like %s has programs of its own: %s", device, error)
        return False


def check_trusted(folder: Path) -> None:
    """Raise ConfigurationError if anybody but this user could have put files there."""
    if not hasattr(os, "geteuid"):
        return  # no such owners here
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"{folder} holds compiled programs, which are run as they are, but belongs to user "
            f"{found.st_uid}, not to {os.geteuid()} who runs this; name a folder of your own with "
            "--cache_dir."
        )
    if found.st_mode & _OTHERS_WRITE:
        raise ConfigurationError(
            f"{folder} holds compiled programs, which are run as they are, but others may write "
            f"to it (mode {stat.S_IMODE(found.st_mode):o}). If only you have, `chmod go-w {folder}`"
            "; if not, remove it; or name another with --cache_dir."
        )


def loads_what_it_saved(mesh: Mesh) -> bool:
    """Take one small program there and back, and run it on every device of the mesh.

    To be called, like `ProgramCache.store`, while JAX's own cache is off.
    """
    devices = tuple(mesh.devices.flat)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    numbers = jax.device_put(np.arange(4 * mesh.size, dtype=np.float32), spread)
    try:
        compiled = jax.jit(lambda x: x + jnp.sum(x)).lower(numbers).compile()
        loaded = loaded_executable(packed_executable(compiled, devices), devices)
        right = np.array_equal(loaded(numbers), compiled(numbers))
    except Exception as error:  # a backend says in its own way that it cannot
        _log.warning("Executables cannot be kept for %s: %s", devices, error)
        return False
    if not right:
        _log.warning("Executables are not kept for %s: a loaded one computed nonsense.", devices)
    return right


def _entry(packed: bytes, title: bytes) -> bytes:
    return b"\n".join((_FORMAT, title, hashlib.sha256(packed).hexdigest().encode(), packed))


def _unpacked(content: bytes, title: bytes, devices: tuple[jax.Device, ...]) -> jax.stages.Compiled:
    """Raises ValueError if this is not a whole file of that title; else what unpickling raises."""
    head, *rest = content.split(b"\n", 3)
    if head != _FORMAT or len(rest) != 3:
        raise ValueError("it is of another format")
    found, checksum, packed = rest
    if found != title:
        raise ValueError("it is another program's")
    if hashlib.sha256(packed).hexdigest().encode() != checksum:
        raise ValueError("it is damaged")
    return loaded_executable(packed, devices)


def _write(path: Path, content: bytes) -> None:
    """Replace the file as one action: readers find all of it or what was there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _make_room(root: Path, keep: Path, max_bytes: int) -> None:
    """Remove identities, the least recently used first. Whoever is loading them compiles anew."""
    found = sorted(_folders(root), key=lambda entry: entry[0])
    total = sum(size for _, size, _ in found)
    for _, size, folder in found:
        if total <= max_bytes:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _folders(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(last used, bytes, folder) of every identity; what vanishes meanwhile is left out."""
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir():
                size = sum(path.stat().st_size for path in folder.iterdir())
                yield folder.stat().st_mtime, size, folder
