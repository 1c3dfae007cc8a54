"""Runs the real engine core and loops on a real executor, and compares greedy outputs."""

import dataclasses
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.device import DeviceExecutor
from serving.engine.events import AddRequest
from serving.engine.loop import LoopPorts, ReplicaThread
from serving.engine.plan import StepPlan
from serving.engine.request import EngineRequest, RequestOutput, SamplingParams, TokenLogprobs

TIE = 1e-3
"""Invariant 2: outputs may part where the two best logits are this close."""


@dataclasses.dataclass
class Generated:
    """Tokens of one request and the log-probabilities that came with them."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0

    def margins(self) -> list[float]:
        """How far the best token was ahead of the second, per token."""
        return [one.top[0][1] - one.top[1][1] for one in self.logprobs]


def assert_same_greedy(reference: Generated, other: Generated) -> None:
    """Token by token up to the first near tie of the reference, and at least one token."""
    assert len(reference.tokens) == len(other.tokens)
    for expected, got, margin in zip(
        reference.tokens, other.tokens, reference.margins(), strict=True
    ):
        if expected != got:
            assert margin <= TIE, (expected, got, margin)
            return


class CountingExecutor:
    """Passes everything on and counts how often a row was assigned."""

    def __init__(self, executor: DeviceExecutor, **limits: int) -> None:
        self._executor = executor
        self.limits = dataclasses.replace(executor.limits, **limits)
        self.assignments = 0
        self.longest_chunk = 0
        self.widest_decode = 0

    def submit(self, plan: StepPlan) -> None:
        self.assignments += len(plan.assignments)
        for chunk in plan.prefills:
            self.longest_chunk = max(self.longest_chunk, chunk.tokens.size)
        self.widest_decode = max(self.widest_decode, plan.decode_rows.size)
        self._executor.submit(plan)

    def collect(self):
        return self._executor.collect()

    def interrupt(self) -> None:
        self._executor.interrupt()


@contextmanager
def _replica(
    core: EngineCore, executor: CountingExecutor
) -> Iterator[tuple[ReplicaThread, queue.SimpleQueue]]:
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    ports = LoopPorts(core, executor, lambda outputs, _: arrived.put(outputs), time.monotonic)
    thread = ReplicaThread(ports, arrived.put)
    thread.start()
    try:
        yield thread, arrived
    finally:
        thread.stop()
        assert thread.join(30)


def generate(
    executor: CountingExecutor,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    top: int = 2,
    together: bool = True,
    **config,
) -> list[Generated]:
    """`count` greedy tokens after each prompt; one after another unless `together`."""
    core = EngineCore(executor.limits, EngineConfig(**config))
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=top)
    done = [Generated() for _ in prompts]
    with _replica(core, executor) as (thread, arrived):
        waves = [range(len(prompts))] if together else [[i] for i in range(len(prompts))]
        for wave in waves:
            for i in wave:
                thread.post(AddRequest(EngineRequest(str(i), 1, tuple(prompts[i]), sampling)))
            left = len(wave)
            while left:
                outputs = arrived.get(timeout=120)
                assert not isinstance(outputs, str), outputs
                left -= sum(_take(done, output) for output in outputs)
    books = core.accounting()
    assert books.in_use == books.in_flight == 0
    core.check_invariants()
    return done


def _take(done: list[Generated], output: RequestOutput) -> bool:
    """Add a run of tokens to its request; whether that was its last."""
    mine = done[int(output.request_id)]
    assert output.start_index == len(mine.tokens)
    mine.tokens.extend(output.tokens)
    mine.logprobs.extend(output.logprobs)
    mine.cached_tokens = output.cached_tokens
    if output.finish is None:
        return False
    assert output.finish.value == "length", output.detail
    return True
