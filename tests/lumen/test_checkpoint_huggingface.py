"""Reading and writing Hugging Face directories."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lumen.checkpoint import HuggingFaceSource, check
from lumen.checkpoint.huggingface_writer import write_huggingface
from lumen.errors import CheckpointError
from lumen.random_weights import random_weights


@pytest.mark.parametrize("preset", ["tiny-llama3", "tiny-smollm", "tiny-qwen2", "tiny-qwen3"])
def test_weights_survive_the_way_through_files(tmp_path: Path, preset: str) -> None:
    source = random_weights(preset)
    write_huggingface(source, tmp_path / "model")
    read = HuggingFaceSource(tmp_path / "model")
    check(read)
    assert read.shapes() == dict(source.shapes())
    for name in source.shapes():
        np.testing.assert_array_equal(read.read(name), source.read(name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_and_read_without_copies(tmp_path: Path, dtype: str) -> None:
    source = random_weights("tiny-llama")
    write_huggingface(source, tmp_path / "model", dtype=dtype)
    read = HuggingFaceSource(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = read.read(name)
    assert tensor.dtype == np.dtype(dtype if dtype == "float16" else ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensor, source.read(name).astype(tensor.dtype))
    assert not tensor.flags.writeable
    assert not tensor.flags.owndata


def test_shards_with_an_index(tmp_path: Path) -> None:
    source = random_weights("tiny-llama")
    write_huggingface(source, tmp_path / "model", shard_bytes=200_000)
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    read = HuggingFaceSource(tmp_path / "model")
    check(read)
    for name in source.shapes():
        np.testing.assert_array_equal(read.read(name), source.read(name))

    (tmp_path / "model" / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the {len(shards)}.*{shards[1]}"):
        HuggingFaceSource(tmp_path / "model")


def changed_tensors(
    directory: Path, change: Callable[[dict[str, np.ndarray]], None]
) -> HuggingFaceSource:
    write_huggingface(random_weights("tiny-smollm"), directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return HuggingFaceSource(directory)


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.sinks"] = np.zeros(3, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((98, 72), np.float32)

    with pytest.raises(CheckpointError) as caught:
        check(changed_tensors(tmp_path / "model", change))
    assert "1 missing: model.norm.weight" in str(caught.value)
    assert "1 unexpected: model.layers.0.self_attn.sinks" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight (expected [99, 72], found [98, 72])" in str(
        caught.value
    )


def test_long_lists_are_cut(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if ".layers.2." in name]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=r"9 missing: .* and 4 more"):
        check(changed_tensors(tmp_path / "model", change))


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    source = changed_tensors(tmp_path / "model", change)
    check(source)
    assert "lm_head.weight" not in source.shapes()


def test_truncated_and_damaged_files_are_named_with_sizes(tmp_path: Path) -> None:
    write_huggingface(random_weights("tiny-smollm"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=f"truncated.*{len(whole)}.*{len(whole) - 1000}"):
        HuggingFaceSource(tmp_path / "model")
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"truncated: its header.*100 bytes"):
        HuggingFaceSource(tmp_path / "model")
    for damaged in (b"", b"GGUF" * 10, (2).to_bytes(8, "little") + b"[]", whole[:8] + b"x" * 9999):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            HuggingFaceSource(tmp_path / "model")
    path.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        HuggingFaceSource(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="PyTorch weight files only"):
        HuggingFaceSource(tmp_path / "model")


def test_unknown_number_types_are_refused_when_read(tmp_path: Path) -> None:
    source = changed_tensors(
        tmp_path / "model",
        lambda tensors: tensors.update({"model.norm.weight": np.zeros(72, np.int8)}),
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*I8"):
        source.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="no tensor named nonsense"):
        source.read("nonsense")


def test_revision_is_stable_and_tells_weights_apart(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_huggingface(random_weights("tiny-llama", seed), tmp_path / name)
    revisions = [HuggingFaceSource(tmp_path / name).revision for name in "abc"]
    assert revisions[0] == revisions[1]
    assert revisions[0] != revisions[2]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert HuggingFaceSource(tmp_path / "a").revision != revisions[0]


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    source = changed_tensors(
        tmp_path / "model",
        lambda tensors: tensors.update({"model.norm.weight": np.full(72, 1e5, np.float32)}),
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*too large for float16"):
        write_huggingface(source, tmp_path / "half", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(CheckpointError, match="exists already"):
        write_huggingface(source, tmp_path / "model")
