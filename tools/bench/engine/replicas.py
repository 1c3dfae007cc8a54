"""Replicas of one worker side by side: whether one slows another down."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lumen.model_spec import resolve_model
from serving.results_file import Row
from tools.bench.engine.bars import Bar
from tools.bench.engine.engine import EngineSettings
from tools.bench.engine.gateway import gateway_engine
from tools.bench.engine.gateway_client import ARRIVALS_S
from tools.bench.engine.load_watch import LoadWatch, Report, steady, step_ms
from tools.bench.engine.lock_watch import LockWatch, LockWatchError
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.report import line, measured, not_measured, with_bar
from tools.bench.engine.works import alike
from tools.bench.spawn import child_running

MOST_SLOWER = 1.03
"""Of the step of a replica that has the worker for itself."""

_FEWEST_REPORTS = 2
_SPARE = 32  # one request more per so many of the batch: dispatch does not count to the last one
_WORKER = "serving.launch.worker"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """replicas: of the worker, one device each, JAX's first ones. alone: devices that are also
    measured with a worker to themselves. context, output: tokens of each request; a replica runs
    as many as it has rows, `waves` times. reps: runs of each setup. cache_dir: of compiled
    programs; None: one that is thrown away. barred: the bar applies."""

    settings: EngineSettings
    replicas: int
    alone: tuple[int, ...]
    context: int
    output: int
    waves: int
    reps: int
    cache_dir: Path | None
    barred: bool

    def __post_init__(self) -> None:
        if min(self.replicas, self.waves, self.reps) < 1:
            raise ValueError("--replicas, --waves and --reps must be at least 1.")
        for device in self.alone:
            if not 0 <= device < self.replicas:
                raise ValueError(
                    f"--alone={device}: with --replicas={self.replicas} devices are numbered from "
                    f"0 to {self.replicas - 1}."
                )
        if self.settings.tensor_parallel != 1:
            raise ValueError("--tensor_parallel must be 1: each replica has one device here.")
        if self.context + self.output > self.settings.max_model_len:
            raise ValueError(
                f"A request has {self.context} + {self.output} tokens, more than --max_model_len="
                f"{self.settings.max_model_len}."
            )


@dataclass(frozen=True, slots=True)
class Found:
    """A stretch of a run in which every replica of a worker ran its whole batch.

    step_ms: of each replica. own_ms, common_ms: how long the interpreter lock was held per step of
    a replica by the replicas' threads, and by the one that serves all of them; None: not known.
    tokens_per_s: that came to clients, of all replicas. seconds: its length. reports: in it.
    """

    step_ms: tuple[float, ...]
    own_ms: float | None
    common_ms: float | None
    tokens_per_s: float
    seconds: float
    reports: int


def found_in(
    reports: Sequence[Report], batch: int, main_thread: int, arrivals: Mapping[int, int]
) -> Found | None:
    """What a run's reports say; None if they are too few.

    batch: requests of each replica. main_thread: of the worker. arrivals: as `GatewayEngine` has
    them.
    """
    whole = steady(reports, batch)
    if len(whole) < _FEWEST_REPORTS:
        return None
    first, last = whole[0], whole[-1]
    seconds = last.at_s - first.at_s
    steps = sum(last.loads[one].steps - first.loads[one].steps for one in last.loads)
    own = common = None
    if first.lock is not None and last.lock is not None:
        seen = last.lock.since(first.lock)
        per_step = 1e3 * seconds / steps
        common = per_step * seen.share([main_thread])
        own = per_step * seen.share(set(seen.held) - {main_thread})
    begin, end = math.ceil(first.at_s / ARRIVALS_S), math.floor(last.at_s / ARRIVALS_S)
    tokens = sum(count for part, count in arrivals.items() if begin <= part < end)
    return Found(
        tuple(step_ms(whole, replica) for replica in sorted(last.loads)),
        own, common, tokens / ((end - begin) * ARRIVALS_S), seconds, len(whole),
    )  # fmt: skip


def run(options: Options) -> tuple[list[Row], list[str]]:
    """(rows, what failed), printing as it goes."""
    rows: list[Row] = []
    failures: list[str] = []
    setups = [*((1, device) for device in options.alone), (options.replicas, None)]
    with tempfile.TemporaryDirectory() as scratch:
        for replicas, device in setups:
            try:
                found = _measure(options, replicas, device, Path(scratch))
            except EngineError as error:
                failures.append(f"{_title(replicas, device)}: {error}")
                continue
            for one in _rows(options, replicas, device, found, rows):
                print(line(one), flush=True)
                rows.append(one)
    return rows, failures


def _title(replicas: int, device: int | None) -> str:
    return f"{replicas} replicas" if device is None else f"device {device} alone"


def _measure(
    options: Options, replicas: int, device: int | None, scratch: Path
) -> list[Found | None]:
    settings, batch = options.settings, options.settings.num_rows
    vocab_size = resolve_model(settings.model).source.config.vocab_size
    programs = options.cache_dir or scratch / "programs"
    environ = {} if device is None else {_VISIBLE: _device_name(device)}
    count = replicas * (options.waves * batch + -(-batch // _SPARE))
    jobs = alike(count, options.context, options.output).jobs(vocab_size)
    found = []
    with gateway_engine(settings, vocab_size, programs, scratch, replicas, environ) as engine:
        engine.generate(alike(2 * replicas, options.context, 2).jobs(vocab_size))
        for _ in range(options.reps):
            assert engine.serve_pid is not None
            worker = child_running(engine.serve_pid, _WORKER)
            with _lock_watch(worker.pid) as lock, LoadWatch(worker.flag("listen"), lock) as loads:
                engine.generate(jobs)
            found.append(found_in(loads.reports, batch, worker.pid, engine.arrivals))
    return found


@contextlib.contextmanager
def _lock_watch(pid: int) -> Iterator[LockWatch | None]:
    """None where the lock cannot be watched, which is said."""
    try:
        watch = LockWatch(pid)
    except LockWatchError as error:
        print(f"The interpreter lock is not watched: {error}.", flush=True)
        yield None
        return
    with watch:
        yield watch


def _device_name(device: int) -> str:
    """The device as CUDA is told of it: one of those that may be seen here."""
    visible = os.environ.get(_VISIBLE)
    return visible.split(",")[device] if visible else str(device)


def _rows(
    options: Options,
    replicas: int,
    device: int | None,
    found: Sequence[Found | None],
    before: Sequence[Row],
) -> Iterator[Row]:
    title, batch = _title(replicas, device), options.settings.num_rows
    whole = [one for one in found if one is not None]
    if not whole:
        yield not_measured(title, "ms", "not measured: the whole batch ran for too short a time")
        return
    for replica in range(replicas):
        number = replica if device is None else device
        name = f"decode step of batch {batch}, {_name(replicas, number)}"
        row = measured(
            name, "ms", [one.step_ms[replica] for one in whole],
            reports=[one.reports for one in whole],
            seconds=[round(one.seconds, 2) for one in whole],
        )  # fmt: skip
        alone = next((one for one in before if one["name"].endswith(_name(1, number))), None)
        yield row if device is not None or alone is None else _beside(row, alone, options.barred)
    made = [sum(1e3 * batch / ms for ms in one.step_ms) for one in whole]
    shares = [one.tokens_per_s / count for one, count in zip(whole, made, strict=True)]
    yield measured(
        f"output tokens of all, {title}", "tokens/s", [one.tokens_per_s for one in whole],
        note=f"came to clients meanwhile, {100 * min(shares):.0f} % of those made",
        made_per_s=[round(count, 1) for count in made],
    )  # fmt: skip
    locks = [
        (one.own_ms, one.common_ms) for one in whole
        if one.own_ms is not None and one.common_ms is not None
    ]  # fmt: skip
    if locks:
        steps = [1e3 / sum(1e3 / ms for ms in one.step_ms) for one in whole]
        taken = max((own + common) / ms for (own, common), ms in zip(locks, steps, strict=True))
        yield measured(
            f"interpreter lock held per step and replica, {title}", "ms",
            [own + common for own, common in locks],
            note=f"taken {100 * taken:.0f} % of the time",
            replica_thread_ms=[round(own, 4) for own, _ in locks],
            main_thread_ms=[round(common, 4) for _, common in locks],
        )  # fmt: skip


def _name(replicas: int, device: int) -> str:
    return f"device {device} alone" if replicas == 1 else f"device {device} of {replicas}"


def _beside(row: Row, alone: Row, barred: bool) -> Row:
    """A step among others, beside that of the same device alone."""
    slower = row["median"] / alone["median"]
    note = f"{100 * (slower - 1):+.2f} % beside alone"
    row = {**row, "times_alone": round(slower, 4), "note": note}
    return with_bar(row, Bar(None, MOST_SLOWER * alone["median"])) if barred else row
