"""From settings to replicas: an engine core and its device executor for each."""

import logging
import os
from collections.abc import Callable

import jax
from rich.progress import Progress, TaskID

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.device import DeviceExecutorConfig, build_device_executor
from serving.engine.device.build import LOADED, WEIGHTS
from serving.engine.device.config import gpu_mixed_calls
from serving.engine.executor import Executor
from serving.launch.config import ServeConfig
from serving.launch.gpu_memory import share_of_jax
from serving.launch.model import ServedModel, cache_dir

_log = logging.getLogger(__name__)

_CPU_CHUNK_TOKENS = 128
"""Longer chunks gain nothing on a CPU (SmolLM2's matrices on 2 cores: 1.6 ms per token at 128,
1.8 at 256, 1.6 at 512) and cost a program each to compile at start."""

_CALLS = tuple(128 << doublings for doublings in range(16))
"""Tokens of prefill calls on an accelerator. Shorter ones take as long: weights have to stream."""


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
        advance = _shown(progress, bar, number)
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
    calls: tuple[int, ...] | None = None
    if platform == "cpu":
        chunk = min(chunk, _CPU_CHUNK_TOKENS)
    else:
        # Several prompts share a call: it may well be longer than one of them.
        chunk = 1 << (batching.token_budget.bit_length() - 1)
        calls = (*(size for size in _CALLS if size < chunk), chunk)
    memory_fraction = batching.memory_fraction
    mixed: tuple[tuple[int, int], ...] = ()
    if platform == "gpu":
        mixed = gpu_mixed_calls(batching.num_rows, chunk) if batching.mixed_calls else ()
        memory_fraction = share_of_jax(memory_fraction, os.environ)
    return DeviceExecutorConfig(
        max_model_len=model.max_model_len,
        num_rows=batching.num_rows,
        block_size=batching.block_size,
        num_blocks=batching.num_blocks,
        memory_fraction=memory_fraction,
        max_prefill_tokens=chunk,
        max_prefills=batching.max_prefills,
        prefill_buckets=calls,
        mixed_calls=mixed,
        dtype=dtype,
        cache_dir=cache_dir(config.model) / "programs",
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


def _shown(progress: Progress, bar: TaskID, replica: int) -> Callable[[int, int, str], None]:
    """Shows how far a replica is, and how many programs came ready from an earlier start."""
    loaded = compiled = 0

    def show(done: int, total: int, what: str) -> None:
        nonlocal loaded, compiled
        if what.endswith(LOADED):
            loaded += 1
        elif what != WEIGHTS:
            compiled += 1
        _log.debug("replica %d, %d of %d: %s", replica, done, total, what)
        made = f"{loaded} programs loaded, {compiled} compiled"
        step = made if loaded or compiled else "loading weights"
        progress.update(bar, completed=done, total=total, description=f"replica {replica}: {step}")
        if done == total:
            _log.info("replica %d: %s", replica, made)

    return show
