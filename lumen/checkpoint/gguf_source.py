"""Weights in a GGUF file, under canonical names and in the canonical row order."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lumen.checkpoint.gguf_config import gguf_model_config
from lumen.checkpoint.gguf_file import GgufFile
from lumen.checkpoint.layout import EMBEDDING, FINAL_NORM, HEAD
from lumen.checkpoint.revision import fingerprint
from lumen.config import ModelConfig
from lumen.errors import CheckpointError

_OUTER = {"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufSource:
    """A TensorSource over one GGUF file; quantised tensors are dequantised to float32 as read."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises CheckpointError for a damaged or truncated file and ModelConfigError for an
        unsupported model.
        """
        self.file = GgufFile(path)
        if self.file.metadata.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path} is one part of a GGUF split into "
                f"{self.file.metadata['split.count']}; merge the parts into one file first."
            )
        self._stored = {
            _canonical(name): name for name in self.file.tensors if name != _ROPE_FACTORS
        }
        if EMBEDDING not in self._stored:
            raise CheckpointError(f"{path} holds no token_embd.weight; it is not a whole model.")
        factors = self.file.read(_ROPE_FACTORS) if _ROPE_FACTORS in self.file.tensors else None
        self._config = gguf_model_config(
            self.file.metadata,
            vocab_size=self.file.tensors[self._stored[EMBEDDING]].shape[0],
            tied=HEAD not in self._stored,
            rope_factors=factors,
        )

    @property
    def config(self) -> ModelConfig:
        """The model the file's metadata describes."""
        return self._config

    @cached_property
    def revision(self) -> str:
        """Fingerprint of configuration, header, size and sampled content."""
        tensors = {
            name: (self.file.tensors[stored].kind, self.file.tensors[stored].shape)
            for name, stored in self._stored.items()
        }
        return fingerprint(self._config, tensors, [self.file.path])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name to shape. Tensors without a canonical name keep the file's."""
        return {name: self.file.tensors[stored].shape for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor, float32 if it was quantised. Raises CheckpointError if missing."""
        if name not in self._stored:
            raise CheckpointError(f"{self.file.path} holds no tensor for {name}.")
        values = self.file.read(self._stored[name])
        if self._config.family == "llama":
            if ".self_attn.q_proj." in name:
                return _halves_from_pairs(values, self._config.num_heads)
            if ".self_attn.k_proj." in name:
                return _halves_from_pairs(values, self._config.num_kv_heads)
        return values


def _canonical(stored: str) -> str:
    base, _, kind = stored.rpartition(".")
    if base in _OUTER and kind == "weight":
        return _OUTER[base]
    match base.split("."):
        case ["blk", layer, part] if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.{kind}"
    return stored


def _halves_from_pairs(
    rows: np.ndarray[Any, np.dtype[Any]], heads: int
) -> np.ndarray[Any, np.dtype[Any]]:
    """Reorder [heads * head_dim, ...] from rotary pairs (2i, 2i+1) to (i, i + head_dim / 2).

    llama.cpp stores q and k of architecture "llama", and of no other, in the first order.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
