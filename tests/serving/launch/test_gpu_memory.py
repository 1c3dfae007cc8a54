import dataclasses

import pytest

from serving.errors import ConfigurationError
from serving.launch.config import BatchSettings, ModelSettings, ServeConfig
from serving.launch.gpu_memory import JAX_SHARE, claim_for_jax, jax_share, share_of_jax
from serving.launch.model import served_model
from serving.launch.replicas import executor_config

OLD = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def test_by_default_weights_and_kv_get_nine_tenths_of_the_gpu():
    environ: dict[str, str] = {}
    claim_for_jax(0.9, environ)
    assert environ == {JAX_SHARE: "0.95"}
    assert share_of_jax(0.9, environ) * 0.95 == pytest.approx(0.9)


@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.9, 0.95, 0.98])
def test_whatever_the_fraction_it_is_of_the_whole_gpu(fraction):
    environ: dict[str, str] = {}
    claim_for_jax(fraction, environ)
    taken = float(environ[JAX_SHARE])
    assert fraction + 0.0099 <= taken <= min(fraction + 0.0501, 0.991)
    assert share_of_jax(fraction, environ) * taken == pytest.approx(fraction)


@pytest.mark.parametrize("name", [JAX_SHARE, OLD])
def test_what_the_user_gave_to_jax_stands(name):
    environ = {name: "0.5"}
    claim_for_jax(0.9, environ)
    assert environ == {name: "0.5"}
    assert share_of_jax(0.4, environ) == pytest.approx(0.8)
    assert share_of_jax(0.9, environ) == pytest.approx(0.9)  # temporaries keep their room
    assert share_of_jax(0.98, {name: "1.0"}) == pytest.approx(0.98)
    assert 0.0 < share_of_jax(0.9, {name: "0.01"}) < 1.0


@pytest.mark.parametrize("text", ["most", "0", "1.5", "-1", "nan"])
def test_a_share_that_makes_no_sense_is_named(text):
    with pytest.raises(ConfigurationError, match=f"{OLD} is '{text}'.*--memory_fraction decides"):
        jax_share(0.9, {OLD: text})


def test_only_gpus_are_shared_out_so(monkeypatch):
    for name in (JAX_SHARE, OLD):
        monkeypatch.delenv(name, raising=False)
    config = dataclasses.replace(
        ServeConfig(),
        model=ModelSettings(model="random:tiny-llama"),
        batching=BatchSettings(memory_fraction=0.8),
    )
    model = served_model(config.model)
    found = {
        platform: executor_config(config, model, platform).memory_fraction
        for platform in ("cpu", "gpu", "tpu")
    }
    assert found == {"cpu": 0.8, "gpu": pytest.approx(0.8 / 0.85), "tpu": 0.8}
