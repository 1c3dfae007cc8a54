"""config.json and generation_config.json to ModelConfig."""

import json
from pathlib import Path
from typing import Any

import pytest

from lumen.config import RopeScaling
from lumen.errors import ModelConfigError
from lumen.hf_config import hf_config_dict, parse_model_config, read_model_config
from lumen.presets import PRESETS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen2", "eos_token_id": 151645}


def test_llama_3_in_the_form_of_transformers_4() -> None:
    config = parse_model_config({**LLAMA, "rope_scaling": SCALING})
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (8, 128, False)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.bos_token_id == 128000


def test_both_forms_of_rope_parameters_mean_the_same() -> None:
    old = {**LLAMA, "rope_scaling": SCALING}
    new = {**LLAMA, "rope_parameters": {**SCALING, "rope_theta": 500000.0}}
    del new["rope_theta"]
    assert parse_model_config(new) == parse_model_config(old)


def test_linear_scaling_with_the_oldest_key() -> None:
    config = parse_model_config({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_default_rope_type_is_no_scaling() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e6}
    config = parse_model_config({**LLAMA, "rope_parameters": parameters})
    assert (config.rope_theta, config.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({}, (151645,)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": [7, 8]}, (7, 8))],
)
def test_generation_config_decides_on_the_end_of_text(
    generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert parse_model_config(QWEN, generation).eos_token_ids == expected


def test_families_differ_in_biases_norms_and_defaults() -> None:
    qwen2 = parse_model_config(QWEN)
    qwen3 = parse_model_config({**QWEN, "model_type": "qwen3"})
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)
    bare = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "eos_token_id")}
    assert parse_model_config(bare).num_kv_heads == 32
    assert parse_model_config(bare).eos_token_ids == (2,)
    assert parse_model_config({**bare, "model_type": "qwen3"}).eos_token_ids == ()
    assert parse_model_config({**bare, "hidden_size": 2048, "model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 256}, 256),
        ({"model_type": "qwen2", "sliding_window": 256}, None),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": True}, None),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 256,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            256,
        ),
    ],
)
def test_sliding_window(changes: dict[str, Any], window: int | None) -> None:
    sizes = {"num_hidden_layers": 28}
    assert parse_model_config({**LLAMA, **sizes, **changes}).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, "gpt_neox.*GPTNeoX"),
        ({"model_type": "mixtral"}, "mixtral.*supported are llama, mistral, qwen2, qwen3"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*linear and llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "4096"}, "hidden_size.*integer"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_key_value_heads": 5}, "multiple of num_kv_heads"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 8},
            "24 of 32 layers",
        ),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelConfigError, match=words):
        parse_model_config({**LLAMA, **changes})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_the_way_through_config_json(name: str) -> None:
    config = PRESETS[name]
    fields = json.loads(json.dumps(hf_config_dict(config, "float32")))
    read = parse_model_config(fields)
    assert read == type(config)(
        **{**{f: getattr(config, f) for f in config.__slots__}, "unit_layers": read.unit_layers}
    )


def test_files_are_read_and_their_faults_named(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="not valid JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelConfigError, match="holds a list"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_model_config(tmp_path).eos_token_ids == (5,)
