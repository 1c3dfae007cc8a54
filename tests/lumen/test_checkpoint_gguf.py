"""Reading GGUF files: names, row order, dequantisation, configuration, damage."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from lumen.checkpoint import GgufSource, check
from lumen.config import RopeScaling
from lumen.errors import CheckpointError, ModelConfigError
from lumen.presets import preset
from lumen.random_weights import RandomWeights, random_weights

Kind = gguf.GGMLQuantizationType
GgufWriter = Callable[..., Path]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-smollm", "tiny-qwen2", "tiny-qwen3"])
def test_tensors_come_back_under_canonical_names_and_order(
    write_gguf: GgufWriter, name: str
) -> None:
    source = random_weights(name)
    read = GgufSource(write_gguf(source))
    check(read)
    assert replace(read.config, unit_layers=source.config.unit_layers) == source.config
    for tensor in source.shapes():
        np.testing.assert_array_equal(read.read(tensor), source.read(tensor), err_msg=tensor)


def test_stored_types(write_gguf: GgufWriter) -> None:
    source = random_weights("tiny-llama")
    half, brain, eight = (
        f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    )
    read = GgufSource(write_gguf(source, {half: Kind.F16, brain: Kind.BF16, eight: Kind.Q8_0}))
    assert read.read(half).dtype.name == "float16"
    assert read.read(brain).dtype.name == "bfloat16"
    np.testing.assert_array_equal(read.read(half), source.read(half).astype(np.float16))
    expected = gguf.dequantize(gguf.quantize(source.read(eight), Kind.Q8_0), Kind.Q8_0)
    assert read.read(eight).dtype == np.float32
    np.testing.assert_array_equal(read.read(eight), expected)
    assert not np.array_equal(read.read(eight), source.read(eight))


def test_quantised_query_rows_are_reordered_after_dequantisation(write_gguf: GgufWriter) -> None:
    source = random_weights("tiny-llama")
    name = "model.layers.3.self_attn.q_proj.weight"
    read = GgufSource(write_gguf(source, {name: Kind.Q8_0}))
    np.testing.assert_allclose(read.read(name), source.read(name), atol=2e-3)


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Llama 3.1's rule, element by element, as published with the model."""
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1.0) / 3.0
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3_frequency_factors_become_its_scaling(write_gguf: GgufWriter) -> None:
    source = RandomWeights(replace(preset("tiny-llama"), rope_theta=500000.0), "test")
    factors = llama3_divisors(500000.0, 16, 32.0)
    read = GgufSource(write_gguf(source, extra={"rope_freqs.weight": factors}))
    assert read.config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    check(read)
    with pytest.raises(ModelConfigError, match="not a Llama 3 scaling"):
        GgufSource(write_gguf(source, extra={"rope_freqs.weight": factors + 0.5}))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
    ],
)
def test_unsupported_models_are_refused(
    write_gguf: GgufWriter, metadata: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelConfigError, match=words):
        GgufSource(write_gguf(random_weights("tiny-llama"), metadata=metadata))


def test_linear_scaling_and_unknown_architecture(write_gguf: GgufWriter, tmp_path: Path) -> None:
    source = random_weights("tiny-llama")
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(source, metadata=metadata)
    assert GgufSource(path).config.rope_scaling == RopeScaling("linear", 4.0)
    other = path.read_bytes().replace(b"llama", b"bloom")
    (tmp_path / "other.gguf").write_bytes(other)
    with pytest.raises(ModelConfigError, match=r"'bloom'.*llama, qwen2, qwen3"):
        GgufSource(tmp_path / "other.gguf")


def test_missing_and_unknown_tensors_are_named(write_gguf: GgufWriter) -> None:
    source = random_weights("tiny-llama")
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    read = GgufSource(write_gguf(source, extra=extra))
    with pytest.raises(CheckpointError, match=r"1 unexpected: blk\.0\.attn_sinks\.weight"):
        check(read)
    with pytest.raises(CheckpointError, match="no tensor for nonsense"):
        read.read("nonsense")


def test_truncation_is_found_at_every_place(write_gguf: GgufWriter, tmp_path: Path) -> None:
    whole = write_gguf(random_weights("tiny-smollm")).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    for length in (20, 40, 300, 1500, len(whole) // 2, len(whole) - 40):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"damaged\.gguf is truncated.*{length} bytes"):
            GgufSource(damaged)
    damaged.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufSource(damaged)
    damaged.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(CheckpointError, match="GGUF version 1"):
        GgufSource(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufSource(tmp_path / "absent.gguf")


def test_revision_is_stable_and_tells_weights_apart(write_gguf: GgufWriter) -> None:
    paths = [
        write_gguf(random_weights("tiny-llama", seed), filename=f"{index}.gguf")
        for index, seed in enumerate((0, 0, 1))
    ]
    revisions = [GgufSource(path).revision for path in paths]
    assert revisions[0] == revisions[1] != revisions[2]
