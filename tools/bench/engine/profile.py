"""What the device does in a decode step: traced by JAX's profiler, added up by kernel."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from tools.bench.engine.step_clock import StepTime

_MARGIN = 0.2  # of the traced time at both ends, where the trace starts and stops: left out
_PLANE = "/device:GPU"
_STREAM = "Stream"  # lines of a GPU's plane that hold what ran, one per stream


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that ran on the device. Nanoseconds."""

    start: float
    duration: float
    name: str


@dataclass(frozen=True, slots=True)
class KernelTime:
    """All launches of one kernel in a step, on average."""

    name: str
    launches: float
    us: float


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A decode step on the device, on average, in milliseconds.

    step: from result to result before the trace, traced_step: in it; tracing slows the host, and
    where steps are short the device waits for that. busy: something ran. kernels: most time first.
    """

    step: float
    traced_step: float
    busy: float
    kernels: tuple[KernelTime, ...]

    @property
    def idle(self) -> float:
        """Nothing ran in a step that is not traced: kernels take their time in either."""
        return max(self.step - self.busy, 0.0)


class DecodeTrace:
    """Traces some steps of a run in the middle of its decoding; a `StepClock.watch`.

    rows: of the steps meant. folder: where the profile is left. before, steps: how many are timed
    without a trace and then traced.
    """

    def __init__(self, folder: Path, rows: int, before: int, steps: int) -> None:
        self.folder = folder
        self._rows = rows
        self._first, self._last = before, before + steps
        self._seen = 0
        self._on = False
        self._before: list[float] = []
        self._times: list[float] = []

    def __call__(self, step: StepTime) -> None:
        """Take note of a step; starts and stops the profiler."""
        if step.decode_rows != self._rows or step.prefill_tokens:
            return
        self._seen += 1
        if self._seen <= self._first:
            self._before.append(step.at_s)
        if self._seen == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow the loop several times
            options.host_tracer_level = 1
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._on = True
        if self._on:
            self._times.append(step.at_s)
        if self._seen == self._last:
            self.stop()

    def stop(self) -> None:
        """End the trace, if one is on."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def result(self) -> DeviceStep | None:
        """What was seen; None if the profile has no GPU in it or the run had too few steps."""
        if self._seen < self._last:  # what was traced behind them are other steps
            return None
        before = np.diff(self._before)
        traced = np.diff(self._times[1:])  # the first step paid for starting the profiler
        if not before.size or not traced.size:
            return None
        events = _events(self.folder)
        return device_step(events, float(np.median(before)), float(np.median(traced)))


def device_step(events: Sequence[DeviceEvent], step_s: float, traced_s: float) -> DeviceStep | None:
    """Add up what ran in the middle of a trace; None if nothing did.

    step_s, traced_s: a step before and in the trace, as the host saw it.
    """
    if not events:
        return None
    first = min(event.start for event in events)
    last = max(event.start + event.duration for event in events)
    margin = _MARGIN * (last - first)
    begin, end = first + margin, last - margin
    inside = sorted(
        (event for event in events if begin <= event.start < end), key=lambda event: event.start
    )
    busy, until = 0.0, begin
    times: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    for event in inside:
        stop = min(event.start + event.duration, end)
        busy += max(stop - max(event.start, until), 0.0)
        until = max(until, stop)
        times[event.name] += stop - event.start
        launches[event.name] += 1
    steps = (end - begin) / (1e9 * traced_s)
    kernels = tuple(
        KernelTime(name, launches[name] / steps, total / 1e3 / steps)
        for name, total in sorted(times.items(), key=lambda item: -item[1])
    )
    return DeviceStep(1e3 * step_s, 1e3 * traced_s, busy / 1e6 / steps, kernels)


def _events(folder: Path) -> list[DeviceEvent]:
    """Of the latest profile in the folder, if there is one: each has a folder of its own."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    return [event for file in files[-1:] for event in _events_of(file)]


def _events_of(file: Path) -> Iterable[DeviceEvent]:
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    found = sorted((one for one in planes if one.name.startswith(_PLANE)), key=lambda one: one.name)
    for plane in found[:1]:  # of several devices the first: all do the same
        for line in plane.lines:
            if line.name.startswith(_STREAM):
                for event in line.events:
                    yield DeviceEvent(event.start_ns, event.duration_ns, event.name)
