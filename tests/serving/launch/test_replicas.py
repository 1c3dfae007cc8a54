import logging

import jax
import pytest
from rich.progress import Progress

from serving.launch.config import BatchSettings, ModelSettings, ServeConfig
from serving.launch.model import served_model
from serving.launch.replicas import build_replicas


@pytest.mark.parametrize(
    "made", ["0 programs loaded, 10 compiled", "10 programs loaded, 0 compiled"]
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
