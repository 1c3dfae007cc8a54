"""The models of `lumen.decoder` written down once more, plainly: numpy, float32, no cache.

Reads the canonical tensors themselves, so it shares neither the placement of weights nor any
kernel with what it is to check. The rotation's frequencies are those of `lumen.rope`, which has
goldens of its own.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lumen.checkpoint.layout import EMBEDDING, FINAL_NORM, HEAD
from lumen.config import ModelConfig
from lumen.rope import inverse_frequencies
from lumen.tensor_source import TensorSource

Floats = npt.NDArray[np.float32]


class PlainModel:
    """Weights on the host, and the forward pass over a whole text."""

    def __init__(self, source: TensorSource) -> None:
        self._config = source.config
        self._tensors = {
            name: np.asarray(source.read(name), np.float32) for name in source.shapes()
        }

    def logits(self, tokens: npt.NDArray[np.int32]) -> Floats:
        """Of the token after each of the tokens: int32 [n] to float32 [n, vocabulary]."""
        config, tensors = self._config, self._tensors
        hidden = tensors[EMBEDDING][tokens]
        cos, sin = _rotation(len(tokens), config)
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            mine = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            x = _normed(hidden, mine["input_layernorm.weight"], config)
            hidden = hidden + _attended(x, mine, cos, sin, config)
            x = _normed(hidden, mine["post_attention_layernorm.weight"], config)
            gate, up = (x @ mine[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ mine["mlp.down_proj.weight"].T
        x = _normed(hidden, tensors[FINAL_NORM], config)
        logits: Floats = x @ tensors[EMBEDDING if config.tie_embeddings else HEAD].T
        return logits


def _attended(
    x: Floats, tensors: dict[str, Floats], cos: Floats, sin: Floats, config: ModelConfig
) -> Any:
    count = len(x)
    heads = {}
    for name in "qkv":
        out = x @ tensors[f"self_attn.{name}_proj.weight"].T
        out = out + tensors.get(f"self_attn.{name}_proj.bias", np.float32(0))
        heads[name] = out.reshape(count, -1, config.head_dim)
        if config.qk_norm and name != "v":
            heads[name] = _normed(heads[name], tensors[f"self_attn.{name}_norm.weight"], config)
    q, k = (_rotated(heads[name], cos, sin) for name in "qk")
    group = config.num_heads // config.num_kv_heads
    k, v = (np.repeat(one, group, axis=1) for one in (k, heads["v"]))
    scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(config.head_dim**-0.5)
    distance = np.arange(count)[:, None] - np.arange(count)
    seen = (distance >= 0) & (distance < (config.sliding_window or count))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights.astype(np.float32), v)
    return out.reshape(count, -1) @ tensors["self_attn.o_proj.weight"].T


def _normed(x: Floats, weight: Floats, config: ModelConfig) -> Floats:
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(config.rms_norm_eps))
    return (x * scale * weight).astype(np.float32)


def _rotation(count: int, config: ModelConfig) -> tuple[Floats, Floats]:
    angles = np.arange(count, dtype=np.float32)[:, None] * inverse_frequencies(config)
    return np.cos(angles)[:, None], np.sin(angles)[:, None]


def _rotated(x: Floats, cos: Floats, sin: Floats) -> Floats:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
