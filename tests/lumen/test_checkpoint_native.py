"""The native format: units restored alone, damage, interruption, conversion in a child."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lumen.checkpoint import NativeSource, check
from lumen.checkpoint.convert import convert_in_child
from lumen.checkpoint.huggingface_writer import write_huggingface
from lumen.checkpoint.layout import unit_shapes
from lumen.checkpoint.native_writer import write_native
from lumen.errors import CheckpointError
from lumen.random_weights import RandomWeights, random_weights
from lumen.tokenizer.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("native") / "model"
    write_native(random_weights("tiny-smollm"), directory, byte_tokenizer(509))
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "model")
    return tmp_path / "model"


def test_everything_comes_back(written: Path) -> None:
    source = random_weights("tiny-smollm")
    read = NativeSource(written)
    check(read)
    assert read.config == source.config
    assert read.dtype == "float32"
    assert read.shapes() == dict(source.shapes())
    for name in read.shapes():
        np.testing.assert_array_equal(read.read(name), source.read(name))
    assert (written / "tokenizer.json").exists()


def test_configuration_with_scaling_and_window_comes_back(tmp_path: Path) -> None:
    for preset in ("tiny-llama3", "tiny-mistral"):
        source = random_weights(preset)
        write_native(source, tmp_path / preset)
        assert NativeSource(tmp_path / preset).config == source.config


def test_a_unit_is_restored_from_its_own_files_alone(copy: Path) -> None:
    for entry in copy.iterdir():
        if entry.name not in ("lumen.json", "unit_001"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    source, read = random_weights("tiny-smollm"), NativeSource(copy)
    unit = read.restore_unit(1)
    assert list(unit) == list(unit_shapes(source.config, 1))
    for name, tensor in unit.items():
        np.testing.assert_array_equal(tensor, source.read(name))
        np.testing.assert_array_equal(read.read(name), tensor)
    with pytest.raises(CheckpointError, match=r"unit_002.* is missing"):
        read.restore_unit(2)
    with pytest.raises(CheckpointError, match=r"embedding.* is missing"):
        read.read("model.embed_tokens.weight")
    with pytest.raises(CheckpointError, match="3 units; there is no unit 3"):
        read.restore_unit(3)


def test_one_unit_is_held_at_a_time_and_read_once(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = NativeSource(written)
    restored: list[str] = []
    restore = NativeSource._restore

    def counted(self: NativeSource, name: str) -> Any:
        restored.append(name)
        return restore(self, name)

    monkeypatch.setattr(NativeSource, "_restore", counted)
    for name in read.shapes():
        read.read(name)
    assert restored == ["embedding", "unit_000", "unit_001", "unit_002", "head"]


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_truncated_file_is_named_with_sizes_when_opening(copy: Path) -> None:
    path = largest_file(copy / "unit_002")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=rf"{path.name} has {size - 7} bytes, {size} were"):
        NativeSource(copy)


def test_changed_bytes_are_an_error_not_a_crash(copy: Path) -> None:
    # The part of a single tensor: where several fail at once, tensorstore reports the others
    # late, from its own threads, into whichever test runs by then.
    path = largest_file(copy / "embedding")
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match="embedding cannot be restored"):
        NativeSource(copy).read("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "format version None"),
        ('{"format": 99}', "format version 99; this Lumen reads version 1"),
        ('{"format": 1}', "damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, manifest: str, words: str) -> None:
    (tmp_path / "lumen.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=words):
        NativeSource(tmp_path)


class FailingSource(RandomWeights):
    """Stops in the middle, as a full disk or a killed conversion would."""

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        if "layers.2" in name:
            raise KeyboardInterrupt
        return super().read(name)


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    source = FailingSource(random_weights("tiny-smollm").config, "test")
    with pytest.raises(KeyboardInterrupt):
        write_native(source, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_not_touched(copy: Path) -> None:
    before = (copy / "lumen.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write_native(random_weights("tiny-llama"), copy)
    assert (copy / "lumen.json").read_bytes() == before


def test_a_source_that_does_not_match_is_refused_before_writing(tmp_path: Path) -> None:
    write_huggingface(random_weights("tiny-llama"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"Converting .*9 missing"):
        convert_in_child(tmp_path / "hf", tmp_path / "native", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_conversion_in_a_child_reports_tensors_and_changes_the_type(tmp_path: Path) -> None:
    source = random_weights("tiny-qwen2")
    write_huggingface(source, tmp_path / "hf", byte_tokenizer(512))
    seen: list[tuple[int, int]] = []
    convert_in_child(
        tmp_path / "hf",
        tmp_path / "native",
        "bfloat16",
        lambda done, total: seen.append((done, total)),
    )
    count = len(source.shapes())
    assert seen == [(done, count) for done in range(1, count + 1)]
    read = NativeSource(tmp_path / "native")
    assert read.dtype == "bfloat16"
    for name in read.shapes():
        found = read.read(name)
        np.testing.assert_array_equal(found, source.read(name).astype(found.dtype))


def test_revision_follows_content_not_place(written: Path, tmp_path: Path) -> None:
    write_native(random_weights("tiny-smollm"), tmp_path / "same")
    write_native(random_weights("tiny-smollm", seed=1), tmp_path / "other")
    assert NativeSource(tmp_path / "same").revision == NativeSource(written).revision
    assert NativeSource(tmp_path / "other").revision != NativeSource(written).revision


def test_opening_does_not_load_orbax_or_jax(written: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lumen.checkpoint import open_source, "
        f"open_tokenizer; p = Path({str(written)!r}); open_source(p).shapes(); "
        "assert open_tokenizer(p) is not None; "
        "print([name for name in ('jax', 'orbax') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
