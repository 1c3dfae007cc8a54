"""Work itl: latency of tokens while requests come as they did in a recorded trace.

The trace's window is played at a share of saturation (`saturation` says what that is and how it is
found): its times are compressed or stretched so that its requests come at that rate, bursts and
lengths as recorded, prompts random, output lengths forced, the engine empty at first. A request's
time to first token counts from when it was due. ITL is the gap between two consecutive tokens of a
request as the loop published them, over all tokens of all requests.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.results_file import Row
from serving.sim.workload.requests import Workload
from tools.bench.engine.bars import NONE, Bar
from tools.bench.engine.engine import InProcessEngine
from tools.bench.engine.latency import (
    StepKind,
    gaps_ms,
    histogram,
    percentile,
    quantiles,
    step_kinds,
)
from tools.bench.engine.receipts import EngineError, Receipt
from tools.bench.engine.report import measured, not_measured
from tools.bench.engine.saturation import RateSearch, Served, queue_of, service_rate
from tools.bench.engine.trace import endless, mean_lengths, timed_jobs, window
from tools.bench.engine.works import Job, TimedJob

_FLOOR, _AIM = 3.0, 2.0  # p99 over p50
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """trace: the whole of it. start_s, seconds: the window of it. load: share of saturation.
    saturation: requests per second, if known; None: searched for, in trial_s seconds with a backlog
    and in `trials` trials of as many."""

    trace: Workload
    start_s: float = 0.0
    seconds: float = 180.0
    load: float = 0.7
    saturation: float | None = None
    trial_s: float = 15.0
    trials: int = 3

    def settings(self) -> dict[str, float | None]:
        """All but the trace, for the results file."""
        names = ("start_s", "seconds", "load", "saturation", "trial_s", "trials")
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        for name in ("seconds", "load", "trial_s", "trials"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of the trace must be more than 0.")
        if self.start_s < 0:
            raise ValueError("start_s of the trace must be at least 0.")
        if self.saturation is not None and self.saturation <= 0:
            raise ValueError("--saturation must be more than 0 requests/s.")


@dataclass(frozen=True, slots=True)
class _Played:
    """receipts: of jobs in order. started: their at_s count from it. late_s: the most by which a
    job was handed over after it was due. seconds: until the last token."""

    receipts: Sequence[Receipt]
    started: float
    late_s: float
    seconds: float


def measure(
    engine: InProcessEngine, options: TraceOptions, reps: int, barred: bool
) -> Iterator[Row]:
    """Saturation; then ITL, time to first token and steps at the load, a sample per repetition."""
    try:
        stretch = window(options.trace, options.start_s, options.seconds, engine.max_tokens)
    except ValueError as error:
        yield not_measured("ITL under a trace", "ms", f"not measured: {error}")
        return
    saturation = options.saturation
    facts: dict[str, Any] = {}
    if saturation is None:
        saturation, facts = _search(engine, stretch, options)
    name = f"saturation, {_described(stretch, options)}"
    if saturation is None:
        yield not_measured(name, "requests/s", "not measured: no rate tried had a bounded queue")
        return
    prompt, output = mean_lengths(stretch)
    tokens = saturation * (prompt + output)
    note = "" if facts else "as given; "
    if facts and facts["unbounded"] is None:
        note = "no rate tried was beyond it: it may be higher; "
    note += f"{tokens:.0f} tokens/s in and out, {saturation * output:.0f} out"
    yield measured(name, "requests/s", [saturation], note=note, **facts)
    rate = options.load * saturation
    jobs = timed_jobs(stretch, rate, engine.vocab_size)
    runs = []
    for _ in range(reps):
        engine.clock.steps = []
        played = _play(engine, jobs)
        for receipt in played.receipts:
            receipt.check_whole()
        runs.append((played, engine.clock.steps))
    at = f"at {rate:.4g} requests/s, {100 * options.load:.0f} % of saturation"
    yield from _latency_rows([played for played, _ in runs], jobs, at, barred)
    yield from _step_rows([kind for _, steps in runs[:1] for kind in step_kinds(steps)], at)


def _described(stretch: Workload, options: TraceOptions) -> str:
    left_out = f", {stretch.left_out} longer ones left out" if stretch.left_out else ""
    return (
        f"{len(stretch.requests)} requests of {options.seconds:g} s of the trace from "
        f"{options.start_s:g} s on{left_out}"
    )


def _search(
    engine: InProcessEngine, stretch: Workload, options: TraceOptions
) -> tuple[float | None, dict[str, Any]]:
    """(the highest rate found bounded, what was tried); leaves the engine empty."""
    source = endless(stretch, engine.vocab_size)
    running, estimate = _backlogged(engine, stretch, source, options.trial_s)
    print(f"  served with a backlog: {estimate:.4g} requests/s", flush=True)
    search = RateSearch(estimate, options.trials)
    tried = []
    while (rate := search.next()) is not None:
        count = max(round(rate * options.trial_s), 1)
        jobs = [TimedJob(number / rate, next(source)) for number in range(count)]
        played = _play(engine, jobs, options.trial_s)
        firsts = [one.times[0] - played.started for one in played.receipts if one.times]
        queue = queue_of([job.at_s for job in jobs], firsts, options.trial_s)
        bounded = queue.bounded(rate)
        search.tell(rate, bounded)
        tried.append({"rate": rate, **dataclasses.asdict(queue), "bounded": bounded})
        print(f"  {rate:.4g} requests/s: {queue}, bounded: {bounded}", flush=True)
        running += played.receipts
    for receipt in running:
        engine.cancel(receipt)
    engine.drain()
    for receipt in running:
        if not receipt.cancelled:
            receipt.check_whole()
    return search.bounded, {
        "estimate": estimate,
        "unbounded": search.unbounded,
        "trial_s": options.trial_s,
        "tried": tried,
    }


def _backlogged(
    engine: InProcessEngine, stretch: Workload, source: Iterator[Job], seconds: float
) -> tuple[list[Receipt], float]:
    """What was handed over, and requests per second served, while half a batch always waits."""
    receipts: list[Receipt] = []
    waiting: list[Receipt] = []
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        waiting = [one for one in waiting if not one.times]
        while len(waiting) <= engine.max_requests // 2:
            waiting.append(engine.submit(next(source)))
            receipts.append(waiting[-1])
        time.sleep(_POLL_S)
    for receipt in waiting:
        engine.cancel(receipt)
    begun = [one for one in receipts if one.times]
    served = Served(
        [one.times[0] - started for one in begun],
        [len(one.job.prompt) for one in begun],
        [at - started for one in begun for at in one.times],
    )
    rate = service_rate(served, *mean_lengths(stretch), seconds)
    if not rate:
        raise EngineError(f"Nothing was served in the second half of {seconds:g} s; raise trial_s.")
    return receipts, rate


def _play(
    engine: InProcessEngine, jobs: Sequence[TimedJob], seconds: float | None = None
) -> _Played:
    """Hand each job over when it is due, however many still run.

    seconds: return after so long, having cancelled those that have no token yet; what runs goes
    on. None: wait until all have ended.
    """
    late = 0.0
    receipts = []
    started = time.perf_counter()
    for job in jobs:
        due = started + job.at_s
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        receipts.append(engine.submit(job.job))
        late = max(late, time.perf_counter() - due)
    if seconds is None:
        return _Played(receipts, started, late, engine.drain() - started)
    time.sleep(max(started + seconds - time.perf_counter(), 0.0))
    for receipt in receipts:
        if not receipt.times:
            engine.cancel(receipt)
    return _Played(receipts, started, late, seconds)


def _latency_rows(
    runs: Sequence[_Played], jobs: Sequence[TimedJob], at: str, barred: bool
) -> Iterator[Row]:
    gaps = [gaps_ms(run.receipts) for run in runs]
    if not all(one.size for one in gaps):
        yield not_measured(f"ITL p99 {at}", "ms", "not measured: no request has two tokens")
        return
    p50s, p99s = ([percentile(one, percent) for one in gaps] for percent in (50, 99))
    p50 = float(np.median(p50s))
    yield measured(f"ITL p50 {at}", "ms", p50s)
    yield measured(
        f"ITL p99 {at}", "ms", p99s,
        Bar(None, _FLOOR * p50, _AIM * p50) if barred else NONE,
        f"{np.median(p99s) / p50:.3g} times p50; {gaps[0].size} gaps",
        p99_over_p50=[round(p99 / one, 4) for p99, one in zip(p99s, p50s, strict=True)],
        quantiles=[quantiles(one) for one in gaps],
        histogram=[histogram(one) for one in gaps],
    )  # fmt: skip
    firsts = [
        np.array([
            1e3 * (receipt.times[0] - run.started - job.at_s)
            for receipt, job in zip(run.receipts, jobs, strict=True)
        ])
        for run in runs
    ]  # fmt: skip
    for percent in (50, 99):
        yield measured(
            f"TTFT p{percent} {at}", "ms", [percentile(one, percent) for one in firsts],
            quantiles=[quantiles(one) for one in firsts],
            handed_over_late_ms=[round(1e3 * run.late_s, 3) for run in runs],
        )  # fmt: skip
    tokens = sum(job.job.output_tokens for job in jobs)
    yield measured(
        f"output {at}", "output tokens/s", [tokens / run.seconds for run in runs],
        note=f"{min(run.seconds for run in runs):.1f} s until the last token",
    )  # fmt: skip


def _step_rows(kinds: Sequence[StepKind], at: str) -> Iterator[Row]:
    for kind in kinds:
        note = (
            f"{kind.count} steps, {100 * kind.share:.3g} % of the time; p99 {kind.p99_ms:.4g}, "
            f"most {kind.most_ms:.4g} ms; {kind.decode_rows:.4g} rows decode"
        )
        name = f"step with {kind.prefill} prefill tokens {at}"
        yield measured(name, "ms", [kind.median_ms], note=note, **dataclasses.asdict(kind))
