import pytest

from lumen.errors import LumenError
from serving.errors import ConfigurationError
from serving.launch.config import DEFAULT_MAX_MODEL_LEN, BatchSettings, ModelSettings
from serving.launch.model import check_arena_holds_a_request, served_model


def test_name_and_length_come_from_the_model_unless_given():
    model = served_model(ModelSettings(model="random:tiny-llama"))
    assert (model.model_id, model.max_model_len) == ("random:tiny-llama", 512)
    model = served_model(
        ModelSettings(model="random:tiny-llama", model_name="tiny", max_model_len=100)
    )
    assert (model.model_id, model.max_model_len) == ("tiny", 100)


def test_long_models_are_cut_to_a_length_that_starts_on_small_machines():
    model = served_model(ModelSettings(model="random:llama-3.1-8b"))
    assert model.max_model_len == DEFAULT_MAX_MODEL_LEN


def test_a_length_beyond_the_model_is_refused():
    with pytest.raises(ConfigurationError, match=r"--max_model_len is 513.*512"):
        served_model(ModelSettings(model="random:tiny-llama", max_model_len=513))


def test_an_unknown_preset_is_refused():
    with pytest.raises(LumenError, match="tiny-lama"):
        served_model(ModelSettings(model="random:tiny-lama"))


def test_an_arena_too_small_for_one_request_is_refused_with_what_would_do():
    model = served_model(ModelSettings(model="random:tiny-llama"))
    check_arena_holds_a_request(BatchSettings(num_blocks=32), model)
    check_arena_holds_a_request(BatchSettings(), model)
    with pytest.raises(ConfigurationError, match=r"--num_blocks=31.*raise it to 32"):
        check_arena_holds_a_request(BatchSettings(num_blocks=31), model)
