"""From settings to replicas: an engine core and its device executor for each."""

import functools

import jax
from rich.progress import Progress, TaskID

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.executor import Executor
from serving.launch.config import ServeConfig
from serving.launch.model import ServedModel

_CPU_CHUNK_TOKENS = 128
"""Longer chunks gain nothing on a CPU (SmolLM2's matrices on 2 cores: 1.6 ms per token at 128,
1.8 at 256, 1.6 at 512) and cost a program each to compile at start."""


def build_replicas(
    config: ServeConfig,
    model: ServedModel,
    devices: list[list[jax.Device]],
    progress: Progress,
) -> list[tuple[EngineCore, Executor]]:
    """Load and compile one replica after another; each compiles in parallel by itself.

    Raises ConfigurationError, CheckpointError or ModelConfigError.
    """
    replicas: list[tuple[EngineCore, Executor]] = []
    for number, mine in enumerate(devices):
        bar = progress.add_task(f"replica {number}: loading weights, compiling", total=None)
        advance = functools.partial(_show, progress, bar)
        settings = executor_config(config, model, mine[0].platform)
        executor = build_device_executor(model.resolved.source, mine, settings, advance)
        core = EngineCore(executor.limits, engine_config(config, model, number))
        replicas.append((core, executor))
    return replicas


def executor_config(config: ServeConfig, model: ServedModel, platform: str) -> DeviceExecutorConfig:
    """Settings of one replica's executor on devices of this platform."""
    batching = config.batching
    dtype = config.devices.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    chunk = min(batching.token_budget, model.max_model_len)
    if platform == "cpu":
        chunk = min(chunk, _CPU_CHUNK_TOKENS)
    return DeviceExecutorConfig(
        max_model_len=model.max_model_len,
        num_rows=batching.num_rows,
        block_size=batching.block_size,
        num_blocks=batching.num_blocks,
        memory_fraction=batching.memory_fraction,
        max_prefill_tokens=chunk,
        max_prefills=batching.max_prefills,
        dtype=dtype,
    )


def engine_config(config: ServeConfig, model: ServedModel, replica: int) -> EngineConfig:
    """Settings of one replica's engine."""
    return EngineConfig(
        eos_token_ids=model.resolved.eos_token_ids,
        replica=replica,
        decode_steps=config.batching.decode_steps,
        max_step_tokens=config.batching.token_budget,
        prefix_caching=config.batching.prefix_cache,
    )


def _show(progress: Progress, bar: TaskID, done: int, total: int, what: str) -> None:
    progress.update(bar, completed=done, total=total)
