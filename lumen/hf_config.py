"""Reads Hugging Face's config.json (and generation_config.json) into a ModelConfig.

Understands llama, mistral, qwen2 and qwen3, in the form transformers 4 wrote (`rope_theta`,
`rope_scaling`) and in that of transformers 5 (`rope_parameters`). Whatever would change the
arithmetic and is not supported is refused by name: a model served with a switch ignored would
answer, and answer wrongly.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lumen.config import ModelConfig, RopeScaling, default_unit_layers
from lumen.errors import ModelConfigError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers assumes where config.json is silent and the families differ.
_DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_SPECIAL_IDS: dict[str, tuple[int, int]] = {"llama": (1, 2), "mistral": (1, 2)}


def read_model_config(directory: Path) -> ModelConfig:
    """The configuration of the model in a Hugging Face directory.

    Raises ModelConfigError if config.json is absent, is not JSON, or asks for something
    unsupported.
    """
    config = _read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(config, generation)


def parse_model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """A ModelConfig from the contents of config.json and generation_config.json.

    End-of-sequence ids are those of generation_config.json if it names any, else config.json's.
    Raises ModelConfigError for unknown architectures, unsupported features and missing sizes.
    """
    family = config.get("model_type")
    if family not in SUPPORTED_FAMILIES:
        architectures = ", ".join(config.get("architectures") or ()) or "none named"
        raise ModelConfigError(
            f"model_type {family!r} (architectures: {architectures}) is not supported; "
            f"supported are {', '.join(SUPPORTED_FAMILIES)}."
        )
    _refuse_unsupported_features(config)
    num_layers = _size(config, "num_hidden_layers")
    num_heads = _size(config, "num_attention_heads")
    hidden_size = _size(config, "hidden_size")
    rope_theta, rope_scaling = _rope(config)
    bos_default, eos_default = _DEFAULT_SPECIAL_IDS.get(family, (None, None))
    eos = _token_ids(generation or {}, "eos_token_id")
    if not eos:
        eos = _token_ids({"eos_token_id": eos_default, **config}, "eos_token_id")
    bos = _token_ids({"bos_token_id": bos_default, **config}, "bos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(config, family, num_heads),
        head_dim=_head_dim(config, family, hidden_size, num_heads),
        max_position=_size(config, "max_position_embeddings", _DEFAULT_MAX_POSITION[family]),
        rope_theta=rope_theta,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        unit_layers=default_unit_layers(num_layers),
        rope_scaling=rope_scaling,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(config, family, num_layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
    )


def hf_config_dict(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers 4 and 5 read as this model.

    dtype: "float32", "bfloat16" or "float16", recorded as the stored type of the weights.
    """
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    fields: dict[str, Any] = {
        "architectures": [f"{architecture[config.family]}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) if len(config.eos_token_ids) > 1 else
        next(iter(config.eos_token_ids), None),
        "torch_dtype": dtype,
    }  # fmt: skip
    if config.family == "mistral":
        fields["sliding_window"] = config.sliding_window
    elif config.sliding_window is not None:
        if config.family == "llama":
            raise ModelConfigError("Hugging Face's llama format cannot express a sliding window.")
        fields |= {
            "use_sliding_window": True,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0,
        }
    if (scaling := config.rope_scaling) is not None:
        fields["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            fields["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    return fields


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def _refuse_unsupported_features(config: Mapping[str, Any]) -> None:
    family = config["model_type"]
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unnamed")
        raise ModelConfigError(
            f"quantization_config (method {method}) is not supported; "
            f"use a checkpoint in bfloat16, float16 or float32, or a GGUF file."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelConfigError(f"hidden_act {activation!r} is not supported; only 'silu' is.")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ModelConfigError(
                f"{name} is set for a {family} model, which is not supported; "
                f"biases are supported on q, k and v of qwen2 only."
            )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(name):
            raise ModelConfigError(
                f"{name} is {config[name]}: mixtures of experts are not supported; "
                f"supported are dense {', '.join(SUPPORTED_FAMILIES)} models."
            )
    partial = config.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise ModelConfigError(f"partial_rotary_factor {partial} is not supported; only 1.0 is.")


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelConfigError(f"config.json lacks {name}, which has no default.")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelConfigError(f"{name} in config.json is {value!r}; it must be an integer.")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelConfigError(f"config.json lacks {name}, which has no default.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelConfigError(f"{name} in config.json is {value!r}; it must be a number.")
    return float(value)


def _kv_heads(config: Mapping[str, Any], family: str, num_heads: int) -> int:
    if "num_key_value_heads" in config:
        return _size(config, "num_key_value_heads", num_heads)
    return _DEFAULT_KV_HEADS.get(family, num_heads)


def _head_dim(config: Mapping[str, Any], family: str, hidden_size: int, num_heads: int) -> int:
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if family == "qwen3":
        return 128
    if num_heads <= 0 or hidden_size % num_heads:
        raise ModelConfigError(
            f"hidden_size ({hidden_size}) is not a multiple of num_attention_heads "
            f"({num_heads}) and config.json names no head_dim."
        )
    return hidden_size // num_heads


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling, from `rope_parameters` or `rope_theta` and `rope_scaling`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelConfigError(f"rope parameters are {parameters!r}; they must be a JSON object.")
    theta = _number(parameters, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in (None, "default"):
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(parameters, "factor"))
    if kind == "llama3":
        original = parameters.get("original_max_position_embeddings")
        return theta, RopeScaling(
            kind="llama3",
            factor=_number(parameters, "factor"),
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
            original_max_position=_size(
                {"original_max_position_embeddings": original}, "original_max_position_embeddings"
            ),
        )
    raise ModelConfigError(
        f"rope type {kind!r} is not supported; supported are default, linear and llama3."
    )


def _sliding_window(config: Mapping[str, Any], family: str, num_layers: int) -> int | None:
    if family == "llama":
        return None
    window = config.get("sliding_window", 4096)
    if family == "mistral":
        return None if window is None else _size({"sliding_window": window}, "sliding_window")
    if not config.get("use_sliding_window", False) or window is None:
        return None
    first = _size(config, "max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) == {"sliding_attention"}:
        return _size({"sliding_window": window}, "sliding_window")
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    raise ModelConfigError(
        f"{sliding} of {num_layers} layers use sliding-window attention; "
        f"a window in all layers or in none is supported."
    )


def _token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ModelConfigError(f"{name} is {value!r}; it must be a token id or a list of them.")
    return tuple(ids)
