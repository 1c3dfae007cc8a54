"""Where weights come from: one protocol for safetensors, GGUF, Orbax and random weights."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lumen.config import ModelConfig


class TensorSource(Protocol):
    """Logical tensors under canonical names, whatever file they lie in.

    Canonical names and orientations are Hugging Face's for the Llama family, matrices as
    [out, in]: `model.embed_tokens.weight`, `model.norm.weight`, `lm_head.weight` (absent when
    tied) and `model.layers.{i}.` + `input_layernorm.weight`, `post_attention_layernorm.weight`,
    `self_attn.{q,k,v,o}_proj.weight`, `self_attn.{q,k,v}_proj.bias` (if qkv_bias),
    `self_attn.{q,k}_norm.weight` (if qk_norm), `mlp.{gate,up,down}_proj.weight`. Rotary pairs
    are (i, i + head_dim / 2).
    """

    @property
    def config(self) -> ModelConfig:
        """The model these tensors belong to."""
        ...

    @property
    def revision(self) -> str:
        """Identifies the exact weights, for the prefix cache; stable over restarts."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name to shape, without reading any data."""
        ...

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """One tensor in its stored dtype. Raises CheckpointError if missing or truncated."""
        ...
