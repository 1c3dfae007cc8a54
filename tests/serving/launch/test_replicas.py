import dataclasses
import logging

import jax
import pytest
from rich.progress import Progress

from serving.launch.config import BatchSettings, ModelSettings, ServeConfig
from serving.launch.model import served_model
from serving.launch.replicas import build_replicas, executor_config


@pytest.mark.parametrize(
    "made", ["0 programs loaded, 11 compiled", "11 programs loaded, 0 compiled"]
)
def test_a_second_start_says_that_all_was_loaded(made, tmp_path_factory, caplog):
    folder = tmp_path_factory.getbasetemp() / "programs-of-two-starts"
    config = ServeConfig(
        model=ModelSettings(model="random:tiny-smollm", cache_dir=str(folder), max_model_len=32),
        batching=BatchSettings(num_rows=1, token_budget=16, num_blocks=4),
    )
    progress = Progress(disable=True)
    with caplog.at_level(logging.INFO, "serving.launch.replicas"):
        build_replicas(config, served_model(config.model), [jax.devices()[:1]], progress)
    assert progress.tasks[0].description == f"replica 0: {made}"
    assert progress.tasks[0].finished
    assert caplog.messages == [f"replica 0: {made}"]


@pytest.mark.parametrize(
    ("platform", "budget", "most", "calls", "mixed"),
    [
        ("cpu", 512, 64, None, ()),  # as long as the model takes
        ("gpu", 4608, 4096, (128, 256, 512, 1024, 2048, 4096), ((256, 16), (512, 16), (1024, 16))),
        ("tpu", 256, 256, (128, 256), ()),
        ("gpu", 100, 64, (64,), ()),
    ],
)
def test_calls_fit_the_budget_and_the_platform(platform, budget, most, calls, mixed):
    config = ServeConfig(
        model=ModelSettings(model="random:tiny-smollm", max_model_len=64),
        batching=BatchSettings(token_budget=budget),
    )
    made = executor_config(config, served_model(config.model), platform)
    assert made.max_prefill_tokens == most
    assert made.prefill_buckets == calls
    assert made.mixed_calls == mixed
    off = dataclasses.replace(config, batching=BatchSettings(mixed_calls=False))
    assert executor_config(off, served_model(off.model), platform).mixed_calls == ()
