"""Turns GGUF metadata into a ModelConfig."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lumen.config import ModelConfig, RopeScaling, default_unit_layers
from lumen.errors import ModelConfigError

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")


def gguf_model_config(
    metadata: Mapping[str, Any],
    vocab_size: int,
    tied: bool,
    rope_factors: np.ndarray[Any, np.dtype[Any]] | None,
) -> ModelConfig:
    """The configuration of the model in a GGUF file.

    vocab_size: rows of the embedding table. tied: no separate head is stored.
    rope_factors: the file's `rope_freqs.weight` [head_dim / 2], the divisor of each rotary
        frequency, or None.
    Raises ModelConfigError for other architectures, mixtures of experts, partial rotary
    embeddings and scalings other than linear and Llama 3's.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelConfigError(
            f"GGUF architecture {architecture!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    read = _Metadata(metadata, architecture)
    if read.optional("expert_count", 0):
        raise ModelConfigError(
            f"{architecture}.expert_count is {read.optional('expert_count', 0)}: "
            f"mixtures of experts are not supported."
        )
    hidden_size = read.size("embedding_length")
    num_heads = read.size("attention.head_count")
    num_layers = read.size("block_count")
    head_dim = read.optional("attention.key_length", hidden_size // num_heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if read.optional(name, head_dim) != head_dim:
            raise ModelConfigError(
                f"{architecture}.{name} is {read.optional(name, head_dim)} but heads have "
                f"{head_dim} elements; rotary embeddings over whole, equal heads are supported."
            )
    theta = read.number("rope.freq_base", 10000.0)
    eos = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return ModelConfig(
        family=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=read.size("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=read.optional("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=read.size("context_length"),
        rope_theta=theta,
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon", None),
        unit_layers=default_unit_layers(num_layers),
        rope_scaling=_rope_scaling(read, theta, head_dim, rope_factors),
        tie_embeddings=tied,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        sliding_window=read.optional("attention.sliding_window", 0) or None,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
    )


class _Metadata:
    """The keys of one architecture, with sentences for those that are absent or odd."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def optional(self, name: str, default: int) -> int:
        value = self._metadata.get(f"{self._architecture}.{name}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelConfigError(
                    f"{self._architecture}.{name} differs between layers; "
                    f"only models whose layers are alike are supported."
                )
            value = value[0]
        return int(value)

    def size(self, name: str) -> int:
        if f"{self._architecture}.{name}" not in self._metadata:
            raise ModelConfigError(f"The GGUF metadata lacks {self._architecture}.{name}.")
        return self.optional(name, 0)

    def number(self, name: str, default: float | None) -> float:
        value = self._metadata.get(f"{self._architecture}.{name}", default)
        if value is None:
            raise ModelConfigError(f"The GGUF metadata lacks {self._architecture}.{name}.")
        # Stored as float32: its shortest decimal form gives back 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value)))

    def text(self, name: str) -> str | None:
        value = self._metadata.get(f"{self._architecture}.{name}")
        return None if value is None else str(value)


def _rope_scaling(
    read: _Metadata,
    theta: float,
    head_dim: int,
    factors: np.ndarray[Any, np.dtype[Any]] | None,
) -> RopeScaling | None:
    kind = read.text("rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise ModelConfigError(
            f"rope scaling {kind!r} in the GGUF metadata is not supported; "
            f"supported are none, linear and Llama 3's frequency factors."
        )
    if factors is not None:
        return _llama3_scaling(theta, head_dim, factors)
    linear = read.number("rope.scaling.factor", 1.0)
    return RopeScaling("linear", linear) if kind == "linear" and linear != 1.0 else None


def _llama3_scaling(
    theta: float, head_dim: int, factors: np.ndarray[Any, np.dtype[Any]]
) -> RopeScaling:
    """The scaling whose frequency divisors are `factors`.

    GGUF stores only the divisors. Llama 3.1 to 3.3 all use the constants below and differ in
    the factor, which is the largest divisor; anything else is refused.
    """
    scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, 8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    expected = 1.0 / ((1.0 - kept) / scaling.factor + kept)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ModelConfigError(
            "The GGUF file's rope_freqs.weight is not a Llama 3 scaling, the only frequency "
            "factors supported."
        )
    return scaling
