"""Engines to measure: what every one offers, and the one that runs in this process."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax

from lumen.model_spec import resolve_model
from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.device import (
    DeviceExecutorConfig,
    build_device_executor,
    compile_children,
)
from serving.engine.events import AddRequest, CancelRequest
from serving.engine.executor import Executor
from serving.engine.loop import LoopPorts, ReplicaThread
from serving.engine.request import EngineRequest, Priority, RequestOutput, SamplingParams
from serving.errors import ConfigurationError
from serving.policy.snapshot import ReplicaLoad
from tools.bench.engine.receipts import EngineError, Receipt, Receipts
from tools.bench.engine.step_clock import StepClock, StepTime
from tools.bench.engine.works import Job

_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Run:
    """What jobs that came all at once took.

    seconds: from the first request handed over to the last token received. steps: of the loop
    that ran them; empty where it is in another process.
    """

    seconds: float
    output_tokens: int
    steps: Sequence[StepTime]


class Engine(Protocol):
    """Something that generates: in this process, or behind a gateway."""

    @property
    def vocab_size(self) -> int:
        """Token ids prompts may have."""
        ...

    @property
    def max_requests(self) -> int:
        """Requests it runs side by side."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and output of one request."""
        ...

    def generate(self, jobs: Sequence[Job]) -> Run:
        """Run jobs that come all at once. Raises EngineError unless every token came."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The engine in this process: model and dtype, the executor's and the loop's settings.

    Names are those of `DeviceExecutorConfig` and `EngineConfig`. num_blocks: None: what
    memory_fraction of the device's memory leaves. step_tokens: None: every row and a whole
    prefill call. tensor_parallel: devices of the replica, JAX's first ones.
    """

    model: str
    dtype: str
    max_model_len: int
    num_rows: int
    block_size: int
    prefill_buckets: tuple[int, ...]
    max_prefills: int
    memory_fraction: float
    num_blocks: int | None
    step_tokens: int | None
    decode_steps: int
    pipeline_depth: int
    compile_threads: int
    tensor_parallel: int = 1
    mixed_calls: tuple[tuple[int, int], ...] = ()
    batch_sizes: tuple[int, ...] | None = None


TINY = EngineSettings(
    model="random:tiny-llama", dtype="float32", max_model_len=128, num_rows=4, block_size=16,
    prefill_buckets=(16, 32), max_prefills=2, memory_fraction=0.9, num_blocks=64, step_tokens=None,
    decode_steps=1, pipeline_depth=2, compile_threads=2,
)  # fmt: skip
"""An engine that any machine starts in seconds, to see that a tool works."""


def executor_config(settings: EngineSettings, cache_dir: Path | None) -> DeviceExecutorConfig:
    """The executor's part of the settings. Raises ConfigurationError."""
    return DeviceExecutorConfig(
        max_model_len=settings.max_model_len,
        num_rows=settings.num_rows,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        memory_fraction=settings.memory_fraction,
        max_prefill_tokens=settings.prefill_buckets[-1],
        max_prefills=settings.max_prefills,
        prefill_buckets=settings.prefill_buckets,
        mixed_calls=settings.mixed_calls,
        batch_sizes=settings.batch_sizes,
        dtype=settings.dtype,
        compile_threads=settings.compile_threads,
        cache_dir=cache_dir,
    )


def engine_config(settings: EngineSettings) -> EngineConfig:
    """The loop's part of the settings. Raises ConfigurationError."""
    return EngineConfig(
        pipeline_depth=settings.pipeline_depth,
        decode_steps=settings.decode_steps,
        max_step_tokens=settings.step_tokens,
        prefix_caching=False,
    )


def check_settings(settings: EngineSettings) -> None:
    """Raise ConfigurationError or LumenError for what can be refused before anything starts."""
    resolve_model(settings.model)
    executor_config(settings, None)
    engine_config(settings)


def devices_of(settings: EngineSettings) -> list[jax.Device]:
    """The replica's devices, JAX's first ones. Raises ConfigurationError if there are too few."""
    wanted, found = settings.tensor_parallel, jax.devices()
    if not 1 <= wanted <= len(found):
        raise ConfigurationError(
            f"--tensor_parallel={wanted}; JAX sees {len(found)} devices here, so it must be from 1 "
            f"to {len(found)}."
        )
    return found[:wanted]


@dataclass(frozen=True, slots=True)
class Built:
    """An executor that is ready, and what it took: until the weights were there, in all."""

    executor: Executor
    kv_tokens: int
    weights_s: float
    seconds: float


def build(settings: EngineSettings, cache_dir: Path | None) -> Built:
    """Start the backend, load, allocate, compile: everything but imports.

    cache_dir: of compiled programs. Raises ConfigurationError or LumenError.
    """
    started = time.perf_counter()
    compile_children.prepare()
    weights_s = 0.0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal weights_s
        if name == "weights":
            weights_s = time.perf_counter() - started

    source = resolve_model(settings.model).source
    config = executor_config(settings, cache_dir)
    executor = build_device_executor(source, devices_of(settings), config, progress)
    limits = executor.limits
    return Built(
        executor,
        limits.num_blocks * limits.block_size,
        weights_s,
        time.perf_counter() - started,
    )


class InProcessEngine:
    """A replica's own loop on a thread of its own, as in a worker, without a network.

    The prefix cache is off: every prompt is computed. `clock` sees every step.
    """

    def __init__(self, executor: Executor, settings: EngineSettings) -> None:
        self.clock = StepClock(executor)
        self._limits = executor.limits
        core = EngineCore(executor.limits, engine_config(settings))
        ports = LoopPorts(core, self.clock, self._publish, time.monotonic)
        self._thread = ReplicaThread(ports, self._failed)
        self._requests = 0
        self._receipts = Receipts()
        self._failure = ""
        gc.collect()
        gc.freeze()  # as a worker does
        self._thread.start()

    @property
    def vocab_size(self) -> int:
        """Token ids prompts may have."""
        return self._limits.vocab_size

    @property
    def max_requests(self) -> int:
        """Rows of the batch."""
        return self._limits.num_rows

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and output of one request."""
        return self._limits.max_model_len

    def generate(self, jobs: Sequence[Job]) -> Run:
        """Run jobs that come all at once, greedily, in class batch: only their end counts.

        Raises EngineError unless every token came.
        """
        self.clock.steps = []
        started = time.perf_counter()
        receipts = [self.submit(job, Priority.LOW) for job in jobs]
        ended = self.drain()
        for receipt in receipts:
            receipt.check_whole()
        tokens = sum(len(receipt.tokens) for receipt in receipts)
        return Run(ended - started, tokens, self.clock.steps)

    def submit(self, job: Job, priority: Priority = Priority.HIGH) -> Receipt:
        """Hand over one request, greedy; what becomes of it is in the receipt, as it comes.

        Raises EngineError if the engine has failed.
        """
        if self._failure:
            raise EngineError(f"The engine failed earlier: {self._failure}")
        self._requests += 1
        receipt = self._receipts.add(str(self._requests), job)
        sampling = SamplingParams(temperature=0.0, max_tokens=job.output_tokens, ignore_eos=True)
        request = EngineRequest(receipt.request_id, 1, job.prompt, sampling, priority=priority)
        self._thread.post(AddRequest(request))
        return receipt

    def cancel(self, receipt: Receipt) -> None:
        """End a request early; if it has ended nothing happens."""
        self._thread.post(CancelRequest(receipt.request_id, 1))

    def drain(self) -> float:
        """Wait until every request submitted has ended; when that was, on `time.perf_counter`.

        Raises EngineError if the engine fails.
        """
        receipts = self._receipts
        receipts.close()
        receipts.done.wait()
        if self._failure:
            raise EngineError(f"The engine failed: {self._failure}")
        self._receipts = Receipts()
        return receipts.ended_at

    def close(self) -> None:
        """Stop the loop."""
        self._thread.stop()
        self._thread.join(_STOP_S)

    def _publish(self, outputs: tuple[RequestOutput, ...], load: ReplicaLoad) -> None:
        if outputs:
            self._receipts.take(outputs)

    def _failed(self, reason: str) -> None:
        self._failure = reason
        self._receipts.done.set()
