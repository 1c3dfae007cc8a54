"""One live run on the CPU, recorded, for all tests of this room."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from lumen.presets import preset
from lumen.random_weights import RandomWeights
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.request import FinishReason
from tests.serving.incident.live_run import live_run


@dataclass(frozen=True)
class Recorded:
    """The logs of a live run, and how its requests ended."""

    engine: Path
    worker: Path
    gateway: Path
    ends: dict[str, FinishReason]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Recorded:
    config = DeviceExecutorConfig(
        max_model_len=128,
        num_rows=4,
        num_blocks=12,
        max_prefill_tokens=32,
        max_prefills=1,
        prefill_buckets=(32,),
        batch_sizes=(4,),
        cache_dir=tmp_path_factory.mktemp("programs"),
    )
    source = RandomWeights(preset("tiny-smollm"), "tiny-smollm")
    executor = build_device_executor(source, jax.devices()[:1], config)
    folder = tmp_path_factory.mktemp("logs")
    ends = asyncio.run(live_run(executor, folder))
    paths = {name: next(folder.glob(f"{name}-*")) for name in ("engine", "worker", "gateway")}
    return Recorded(**paths, ends=ends)
