"""Named model shapes: public ones for random weights, tiny ones for tests."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lumen.config import ModelConfig, RopeScaling
from lumen.errors import ModelConfigError

_LLAMA_3_1_8B = ModelConfig(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_position=131072, rope_theta=500000.0,
    rms_norm_eps=1e-5, unit_layers=4,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    bos_token_id=128000, eos_token_ids=(128001, 128008, 128009),
)  # fmt: skip

_LLAMA_3_1_70B = replace(
    _LLAMA_3_1_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
)

_QWEN_2_5_14B = ModelConfig(
    family="qwen2", vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_layers=48,
    num_heads=40, num_kv_heads=8, head_dim=128, max_position=32768, rope_theta=1000000.0,
    rms_norm_eps=1e-6, unit_layers=4, qkv_bias=True,
    bos_token_id=151643, eos_token_ids=(151645, 151643),
)  # fmt: skip

_QWEN_2_5_72B = replace(
    _QWEN_2_5_14B, hidden_size=8192, intermediate_size=29568, num_layers=80, num_heads=64
)

_TINY_LLAMA = ModelConfig(
    family="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=4,
    num_heads=4, num_kv_heads=2, head_dim=16, max_position=512, rope_theta=10000.0,
    rms_norm_eps=1e-5, unit_layers=2, bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip

PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-3.1-8b": _LLAMA_3_1_8B,
        "llama-3.1-70b": _LLAMA_3_1_70B,
        "qwen2.5-14b": _QWEN_2_5_14B,
        "qwen2.5-72b": _QWEN_2_5_72B,
        "tiny-llama": _TINY_LLAMA,
        # Llama 3.1's rope scaling, with an original context short enough that it bites.
        "tiny-llama3": replace(
            _TINY_LLAMA, rope_theta=500000.0,
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        "tiny-llama-linear": replace(_TINY_LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
        # The default model's awkward heads: 9 query heads, 3 KV heads, tied embeddings, and a
        # vocabulary and feed-forward width that 2 does not divide.
        "tiny-smollm": replace(
            _TINY_LLAMA, vocab_size=509, hidden_size=72, intermediate_size=99, num_layers=3,
            num_heads=9, num_kv_heads=3, head_dim=8, unit_layers=1, tie_embeddings=True,
        ),
        # The window is shorter than the prompts of the tests.
        "tiny-mistral": replace(_TINY_LLAMA, family="mistral", sliding_window=16),
        "tiny-qwen2": replace(
            _TINY_LLAMA, family="qwen2", qkv_bias=True, tie_embeddings=True, rms_norm_eps=1e-6,
            num_layers=2, unit_layers=1,
        ),
        # Heads wider than hidden_size / num_heads, as in Qwen3.
        "tiny-qwen3": replace(
            _TINY_LLAMA, family="qwen3", qk_norm=True, head_dim=32, rms_norm_eps=1e-6,
            num_layers=2,
        ),
    }
)  # fmt: skip
"""Preset name to configuration. Sizes are those of the public config.json files."""


def preset(name: str) -> ModelConfig:
    """The configuration of a preset. Raises ModelConfigError naming the known ones."""
    if name not in PRESETS:
        raise ModelConfigError(
            f"There is no preset named {name!r}; known presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]
