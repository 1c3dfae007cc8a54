"""Runs an engine core against a modelled executor, one event at a time, checking everything."""

from collections import deque

import numpy as np
import pytest

from serving.engine.config import EngineConfig
from serving.engine.core import EngineCore
from serving.engine.events import (
    AddRequest,
    CancelRequest,
    Fail,
    Interrupt,
    PlanStep,
    Publish,
    StepDone,
    Submit,
)
from serving.engine.executor import ExecutorLimits
from serving.engine.request import EngineRequest, FinishReason, Priority, SamplingParams
from serving.sim.modelled_executor import ModelledExecutor

EOS = 7


def limits_of(**changes) -> ExecutorLimits:
    """A small executor: 4 rows, 24 blocks of 4 tokens."""
    values = {
        "num_rows": 4,
        "num_blocks": 24,
        "slots_per_block": 6,
        "block_size": 4,
        "max_model_len": 64,
        "max_prefill_tokens": 8,
        "max_prefills": 2,
        "vocab_size": 97,
        "max_logprobs": 3,
        "model_revision": "r1",
    }
    return ExecutorLimits(**{**values, **changes})


def config_of(**changes) -> EngineConfig:
    values = {"eos_token_ids": (EOS,), "pipeline_depth": 1}
    return EngineConfig(**{**values, **changes})


class Driver:
    """A shell with the clock in the test's hand."""

    def __init__(self, limits=None, config=None, eos_every=0, check=True) -> None:
        limits = limits_of(**(limits or {}))
        config = config_of(**(config or {}))
        self.limits = limits
        self.executor = ModelledExecutor(
            limits, eos_token_ids=config.eos_token_ids, eos_every=eos_every
        )
        self.core = EngineCore(limits, config)
        self.check = check
        self.now = 0.0
        self.plans = []
        self.in_flight = deque()
        self.requests: dict[tuple[str, int], EngineRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list] = {}
        self.ends: dict[str, FinishReason] = {}
        self.details: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.interrupts = 0
        self.fails = []

    def add(
        self,
        request_id,
        prompt,
        priority=Priority.HIGH,
        emitted=(),
        deadline=None,
        attempt=1,
        **sampling,
    ):
        sampling = {"temperature": 0.0, "max_tokens": 8, **sampling}
        request = EngineRequest(
            request_id,
            attempt,
            tuple(prompt),
            SamplingParams(**sampling),
            tuple(emitted),
            priority,
            deadline,
        )
        self.requests[request_id] = request
        self.tokens[request_id] = list(emitted)
        self.logprobs[request_id] = []
        return self.handle(AddRequest(request))

    def cancel(self, request_id):
        return self.handle(CancelRequest(request_id, self.requests[request_id].attempt))

    def plan(self):
        """PlanStep; the plan if one was submitted."""
        for effect in self.handle(PlanStep()):
            if isinstance(effect, Submit):
                return effect.plan
        return None

    def collect(self):
        self.in_flight.popleft()
        return self.handle(StepDone(self.executor.collect()))

    def step(self):
        """Fill the pipeline, then collect one step."""
        while self.plan() is not None:
            pass
        if self.in_flight:
            self.collect()

    def run(self, most=2000):
        for _ in range(most):
            if self.core.is_idle():
                return
            self.step()
        raise AssertionError("the engine did not come to rest")

    def handle(self, event):
        effects = self.core.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, Submit):
                self.plans.append(effect.plan)
                self.in_flight.append(effect.plan)
                self.executor.submit(effect.plan)
            elif isinstance(effect, Publish):
                for output in effect.outputs:
                    self.take(output)
            elif isinstance(effect, Interrupt):
                self.interrupts += 1
                self.executor.interrupt()
            elif isinstance(effect, Fail):
                self.fails.append(effect)
        if self.check:
            self.core.check_invariants()
            assert self.executor.violations == []
        return effects

    def take(self, output):
        name = output.request_id
        assert name not in self.ends, "an output after the end"
        assert output.start_index == len(self.tokens[name])
        self.tokens[name].extend(output.tokens)
        self.logprobs[name].extend(output.logprobs)
        self.cached[name] = output.cached_tokens
        if output.finish is not None:
            self.ends[name] = output.finish
            self.details[name] = output.detail

    def reference(self, request_id):
        request = self.requests[request_id]
        most = min(
            request.sampling.max_tokens,
            self.limits.max_model_len - len(request.prompt),
            self.limits.num_blocks * self.limits.block_size - len(request.prompt),
        )
        return list(self.executor.function.reference_tokens(request.prompt, most, request.sampling))

    def assert_as_reference(self, *request_ids):
        for request_id in request_ids or self.requests:
            assert self.tokens[request_id] == self.reference(request_id), request_id
            stopped = self.ends[request_id] is FinishReason.STOP
            request = self.requests[request_id]
            own = request.sampling.stop_token_ids
            stops = own if request.sampling.ignore_eos else (*own, *self.core.config.eos_token_ids)
            assert stopped == (
                self.tokens[request_id][-1] in stops
                and len(self.tokens[request_id]) > request.sampling.min_tokens
            )

    def books(self):
        return self.core.accounting()

    def assert_at_rest(self):
        """Invariant 3 of an idle system."""
        assert self.core.is_idle()
        assert (self.books().in_use, self.books().in_flight) == (0, 0)

    def running(self):
        """Ids of the requests that hold a row, and those that wait: private on purpose."""
        return {r.request_id for r in self.core._batch.requests if r is not None}

    def waiting(self):
        return [r.request_id for r in self.core._waiting]


def prompt_of(length, seed=0):
    """Any tokens but the end token, the same for the same arguments."""
    return [int(t) for t in np.random.default_rng(seed).integers(8, 97, length)]


@pytest.fixture
def make_driver():
    """Driver(limits={...}, config={...}): changes against a small executor and the plain loop."""
    return Driver


@pytest.fixture
def make_prompt():
    return prompt_of
