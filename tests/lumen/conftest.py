"""Models for the tests of the model library: tiny ones made here, SmolLM2 where it can be had."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lumen.config import ModelConfig
from lumen.default_model import default_model
from lumen.errors import ModelUnavailableError
from lumen.tensor_source import TensorSource

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's native checkpoint, downloaded on first use."""
    try:
        return default_model()
    except ModelUnavailableError as error:
        pytest.skip(f"the default model cannot be had here: {error}")


def gguf_name(name: str) -> str:
    base, _, kind = name.rpartition(".")
    if base.startswith("model.layers."):
        layer, _, part = base.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[base]}.{kind}"


def pairs_from_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order: element i of a head's first half before element i of its second."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


GgufWriter = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> GgufWriter:
    """Write a source as a GGUF file, the way llama.cpp's converter lays it out.

    kinds: canonical tensor name to its GGUF type, F32 if absent. metadata: further keys.
    """

    def write(
        source: TensorSource,
        kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
        metadata: dict[str, Any] | None = None,
        extra: dict[str, np.ndarray] | None = None,
        filename: str = "model.gguf",
    ) -> Path:
        config = source.config
        path = tmp_path / filename
        writer = gguf.GGUFWriter(path, config.family)
        describe(writer, config)
        for key, value in (metadata or {}).items():
            writer.add_key_value(key, value, *_gguf_type(value))
        for name in source.shapes():
            tensor = np.asarray(source.read(name), dtype=np.float32)
            if config.family == "llama" and ".q_proj." in name:
                tensor = pairs_from_halves(tensor, config.num_heads)
            if config.family == "llama" and ".k_proj." in name:
                tensor = pairs_from_halves(tensor, config.num_kv_heads)
            kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(gguf_name(name), gguf.quantize(tensor, kind), raw_dtype=kind)
        for name, tensor in (extra or {}).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def describe(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])


def _gguf_type(value: Any) -> tuple[Any, ...]:
    kind = gguf.GGUFValueType
    if isinstance(value, list):
        return (kind.ARRAY, kind.STRING if isinstance(value[0], str) else kind.INT32)
    simple = {bool: kind.BOOL, int: kind.UINT32, float: kind.FLOAT32, str: kind.STRING}
    return (simple[type(value)],)
