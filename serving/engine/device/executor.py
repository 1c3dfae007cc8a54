"""Runs step plans on the devices of one replica."""

import threading
from collections import deque
from dataclasses import dataclass, field

import jax
import numpy as np
from lumen_kernels.paged_attention.options import Arena

from lumen.model import LoadedModel
from serving.engine.device.compilation import CompileWatch
from serving.engine.device.mixed_call import mixed_size_of
from serving.engine.device.passes import DevicePasses, Sampled
from serving.engine.device.prefill_calls import pack_chunks
from serving.engine.device.programs import Programs
from serving.engine.executor import ExecutorLimits
from serving.engine.plan import NO_ROWS, Int32, LogprobArrays, StepPlan, StepResult
from serving.errors import ExecutorError


@dataclass(slots=True)
class _InFlight:
    """A submitted plan. Decode steps are dispatched one by one, `prefilled` waits for the rest."""

    plan: StepPlan
    steps: list[Sampled] = field(default_factory=list)
    prefills: list[Sampled] = field(default_factory=list)
    prefilled: list[jax.Array] = field(default_factory=list)


class DeviceExecutor:
    """Runs plans on the devices of one replica: `serving.engine.executor.Executor` with JAX.

    All programs are compiled before; the arena is donated from call to call and never copied. The
    token last drawn for each row stays on the device and is the input of the row's next step.
    A plan of several steps is dispatched two steps ahead of its stop tokens: one runs, one waits;
    steps dispatched past the end of the plan are undone by forgetting them: what they wrote to the
    arena lies beyond the rows' lengths. Plans submitted behind it wait until its end is known.

    Made by `build_device_executor`.
    """

    def __init__(
        self, model: LoadedModel, programs: Programs, limits: ExecutorLimits, arena: Arena
    ) -> None:
        self._passes = DevicePasses(model, programs, limits, arena)
        self._rows = self._passes.rows
        self._limits = limits
        self._in_flight: deque[_InFlight] = deque()
        self._waiting: deque[StepPlan] = deque()
        self._interrupted = threading.Event()
        self._failure: str | None = None
        self._watch = CompileWatch()

    @property
    def limits(self) -> ExecutorLimits:
        """Constant after construction."""
        return self._limits

    @property
    def model(self) -> LoadedModel:
        """The weights, to be looked at."""
        return self._passes.model

    def compilations_since_start(self) -> int:
        """Programs compiled inside `submit` and `collect`: none, or serving has a gap."""
        return self._watch.count

    def interrupt(self) -> None:
        """End the multi-step plan in progress, or the next one, after the steps in flight.

        Any thread may call this. An interrupt that finds no such plan shortens the next: the plan
        may just be on its way.
        """
        self._interrupted.set()

    def rehearse(self) -> None:
        """Run every program once, on padding, and wait for it.

        A GPU loads a program's kernels when it first runs: some milliseconds that no request should
        wait for. Raises what the device raises.
        """
        self._passes.rehearse()

    def submit(self, plan: StepPlan) -> None:
        """Dispatch the plan and return without waiting for the device."""
        with self._watch:
            self._waiting.append(plan)
            self._start_waiting()

    def collect(self) -> StepResult:
        """Wait for the oldest plan not yet collected.

        A failure of the device comes back as `StepResult.error`; everything after it fails too.
        Raises ExecutorError if no plan was submitted.
        """
        if not self._in_flight:
            raise ExecutorError("collect() was called without a submitted plan; submit one first.")
        with self._watch:
            flight = self._in_flight[0]
            try:
                result = self._finish(flight) if self._failure is None else None
            except Exception as error:  # whatever it was, the device state is unknown now
                self._fail(error)
                result = None
            self._in_flight.popleft()
            self._start_waiting()
        if result is None:
            nothing = np.zeros((0, 0), np.int32)
            return StepResult(flight.plan.step_id, NO_ROWS, nothing, error=self._failure)
        return result

    def _fail(self, error: Exception) -> None:
        self._failure = f"{type(error).__name__}: {error}"

    def _start_waiting(self) -> None:
        """Dispatch plans in order, none past a multi-step plan whose end is open."""
        while self._waiting and not (self._in_flight and self._in_flight[-1].plan.steps > 1):
            flight = _InFlight(self._waiting.popleft())
            self._in_flight.append(flight)
            if self._failure is not None:
                continue
            try:
                self._start(flight)
            except Exception as error:  # reported by collect
                self._fail(error)

    def _start(self, flight: _InFlight) -> None:
        plan, passes = flight.plan, self._passes
        self._rows.apply(plan)
        if mixed := mixed_size_of(plan, self._limits.mixed_sizes):
            flight.steps.append(passes.mixed(mixed, plan))
            return
        if plan.decode_rows.size:
            self._decode(flight)
            if plan.steps > 1 and not self._interrupted.is_set():
                self._decode(flight)
        for call in pack_chunks(plan.prefills, passes.call_sizes):
            made = passes.prefill(call, dict(plan.masks))
            if isinstance(made, Sampled):
                flight.prefills.append(made)
            else:
                flight.prefilled.append(made)

    def _decode(self, flight: _InFlight) -> None:
        """One decode step of the plan's rows; only the first can have masks."""
        masks = {} if flight.steps else dict(flight.plan.masks)
        flight.steps.append(self._passes.decode(flight.plan.decode_rows, masks))

    def _finish(self, flight: _InFlight) -> StepResult:
        """Read what the plan drew; a multi-step plan is driven to its end."""
        plan = flight.plan
        jax.block_until_ready(flight.prefilled)
        columns = [
            np.concatenate([part.on_host() for part in (*flight.steps[:1], *flight.prefills)])
            if flight.steps or flight.prefills
            else NO_ROWS
        ]
        while plan.steps > 1:
            taken = len(columns)
            if taken == plan.steps or self._rows.any_stops(plan.decode_rows, columns[-1]):
                self._undo(flight, taken)
                break
            if len(flight.steps) < plan.steps and not self._interrupted.is_set():
                self._decode(flight)
            if len(flight.steps) == taken:
                break
            columns.append(flight.steps[taken].on_host())
        if plan.steps > 1:
            self._interrupted.clear()
        drew = plan.drawing_rows()
        if not drew.size:
            return StepResult(plan.step_id, NO_ROWS, np.zeros((0, 0), np.int32))
        tokens = np.stack(columns, axis=1)
        return StepResult(plan.step_id, drew, tokens, self._logprobs(flight, drew, len(columns)))

    def _undo(self, flight: _InFlight, taken: int) -> None:
        """Forget the steps dispatched after the first `taken`."""
        extra = len(flight.steps) - taken
        if not extra:
            return
        self._passes.forget(flight.plan.decode_rows, extra, flight.steps[taken - 1].after)
        del flight.steps[taken:]

    def _logprobs(self, flight: _InFlight, rows: Int32, steps: int) -> LogprobArrays | None:
        """Log-probabilities of everything drawn, if any row asked; zeros for rows without."""
        if not self._rows.wants_logprobs(rows):
            return None
        best = self._limits.max_logprobs
        chosen = np.zeros((rows.size, steps), np.float32)
        top_ids = np.zeros((rows.size, steps, best), np.int32)
        top = np.zeros((rows.size, steps, best), np.float32)
        first = 0
        groups = [flight.steps, *([part] for part in flight.prefills)]
        for group in groups:
            for step, part in enumerate(group):
                if part.logprobs:
                    found = [np.asarray(array)[: part.count] for array in part.logprobs]
                    place = slice(first, first + part.count)
                    chosen[place, step], top_ids[place, step], top[place, step] = found
            first += group[0].count if group else 0
        return LogprobArrays(chosen, top_ids, top)
