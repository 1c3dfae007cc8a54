"""Starts the engine, cold and warm, and takes it through the works."""

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from lumen.errors import LumenError
from lumen.model_spec import resolve_model
from serving.results_file import Row
from tools.bench.engine import bars, byte_floor
from tools.bench.engine.engine import EngineSettings, InProcessEngine, build
from tools.bench.engine.gateway import beside_in_process, gateway_engine
from tools.bench.engine.measurements import WORKS, Bench, warm_up
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.report import line, measured, not_measured
from tools.bench.engine.start_up import StartUp, start
from tools.bench.engine.trace_latency import TraceOptions
from tools.bench.engine.works import FULL, SMOKE, Sizes

START = "start"
WORK_NAMES = (START, *WORKS)
GATEWAY_WORKS = ("a", "b", "c", "d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """works: names out of WORK_NAMES. reps: runs of each. starts: processes started for each of
    the cold and the warm start. command: that starts one, with all its flags. cache_dir: of
    compiled programs, for the engine measured; None: one that is thrown away. profile_dir: where
    profiles are kept. trace: what `itl` plays; None: it is not measured. gateway: works that are
    measured through a gateway and a worker, too. batches: of (a), profiled: of `idle`; None: those
    of `FULL`, of `idle` else batches."""

    settings: EngineSettings
    works: tuple[str, ...] = WORK_NAMES
    reps: int = 3
    starts: int = 1
    smoke: bool = False
    command: Sequence[str] = ()
    cache_dir: Path | None = None
    profile_dir: Path | None = None
    trace: TraceOptions | None = None
    gateway: tuple[str, ...] = ()
    batches: tuple[int, ...] | None = None
    profiled: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in self.gateway:
            if name not in GATEWAY_WORKS:
                raise ValueError(
                    f"--gateway={name}: no such work; there are {list(GATEWAY_WORKS)}."
                )
        for name in self.works:
            if name not in WORK_NAMES:
                raise ValueError(f"--works={name}: no such work; there are {list(WORK_NAMES)}.")
        if not self.works:
            raise ValueError("--works must name something.")
        if self.reps < 1 or self.starts < 1:
            raise ValueError("--reps and --starts must be at least 1.")
        if self.gateway and self.settings.pipeline_depth != 2:
            raise ValueError(
                f"--pipeline_depth={self.settings.pipeline_depth}; it must be 2 to go through a "
                "gateway, as a worker's is: give --gateway= to leave that out."
            )

    @property
    def sizes(self) -> Sizes:
        """Of all works."""
        sizes = SMOKE if self.smoke else FULL
        return replace(
            sizes,
            batches=self.batches or sizes.batches,
            profiled=self.profiled or self.batches or sizes.profiled,
        )

    @property
    def large(self) -> bool:
        """Whether the bars of the large model apply."""
        settings = self.settings
        return (
            not self.smoke
            and settings.model == bars.LARGE_MODEL
            and settings.dtype == "bfloat16"
            and 1 < settings.tensor_parallel <= bars.LARGE_DEVICES
        )


@dataclass(slots=True)
class Outcome:
    """rows: all of them. failures: works that broke, one line each. facts: of the engine."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    def add(self, one: Row) -> None:
        """Keep a row and tell of it."""
        self.rows.append(one)
        print(line(one), flush=True)

    def fail(self, name: str, error: Exception) -> None:
        """Keep a failure and tell of it."""
        first = next(iter(str(error).splitlines()), "")
        self.failures.append(f"{name}: {type(error).__name__}: {first}")
        self.add(not_measured(name, "", f"failed: {type(error).__name__}: {first}"))
        traceback.print_exception(error, file=sys.stdout)


def run(options: Options) -> Outcome:
    """Measure on JAX's first device, printing as it goes. An interrupt ends it with what it has.

    Starts, and what goes through a gateway, are measured first: their processes need the device,
    which this one takes later and keeps.
    """
    outcome = Outcome()
    barred = (
        not options.smoke
        and options.settings.model == bars.MODEL
        and options.settings.dtype == "bfloat16"
        and options.settings.tensor_parallel == 1
    )
    try:
        with _own_compile_cache(), tempfile.TemporaryDirectory() as scratch:
            if START in options.works:
                _starts(options, Path(scratch), barred, outcome)
            cache = options.cache_dir or _start_cache(Path(scratch), 0)
            through = _through_gateway(options, cache, Path(scratch), outcome)
            if any(name in WORKS for name in options.works):
                _works(options, cache, barred, outcome)
            in_process = {one["name"]: one for one in outcome.rows}
            for one in through:
                outcome.add(beside_in_process(one, in_process.get(one["name"]), barred))
    except KeyboardInterrupt:
        outcome.failures.append("interrupted: what follows was not measured")
    return outcome


@contextlib.contextmanager
def _own_compile_cache() -> Iterator[None]:
    """Put JAX's cache back in its place: an engine moves it to a folder that is gone afterwards."""
    before = jax.config.jax_compilation_cache_dir
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()  # JAX asks for the place once and remembers


def _starts(options: Options, scratch: Path, barred: bool, outcome: Outcome) -> None:
    try:
        cold, warm = [], []
        for number in range(options.starts):
            folder = _start_cache(scratch, number)
            cold.append(start(options.command, folder))
            warm.append(start(options.command, folder))
    except EngineError as error:
        outcome.fail("start to ready", error)
        return
    for name, found, bar in (("cold", cold, bars.COLD_START), ("warm", warm, bars.WARM_START)):
        outcome.add(_start_row(f"start to ready, {name} compile cache", found, barred, bar))
    outcome.add(_capacity_row(cold[0].kv_tokens, barred))


def _start_cache(scratch: Path, number: int) -> Path:
    """Compiled programs of a cold start; the engine measured then starts from the first ones."""
    return scratch / f"start-{number}"


def _start_row(name: str, found: Sequence[StartUp], barred: bool, bar: bars.Bar) -> Row:
    return measured(
        name, "s", [one.seconds for one in found], bar if barred else bars.NONE,
        f"weights there after {min(one.weights_s for one in found):.1f} s; imports apart",
        weights_s=[one.weights_s for one in found],
    )  # fmt: skip


def _capacity_row(tokens: int, barred: bool) -> Row:
    bar = bars.KV_CAPACITY if barred else bars.NONE
    return measured("KV capacity", "tokens", [tokens], bar)


def _through_gateway(options: Options, cache: Path, scratch: Path, outcome: Outcome) -> list[Row]:
    """Rows of the works that go through a gateway, without any bar."""
    rows: list[Row] = []
    if not options.gateway:
        return rows
    vocab_size = resolve_model(options.settings.model).source.config.vocab_size
    try:
        with gateway_engine(options.settings, vocab_size, cache, scratch) as engine:
            bench = Bench(engine, options.sizes, options.reps, barred=False)
            warm_up(bench)
            for name in options.gateway:
                for one in WORKS[name](bench):
                    print(f"through gateway and worker: {line(one)}", flush=True)
                    rows.append(one)
    except EngineError as error:
        outcome.fail("through gateway and worker", error)
    return rows


def _works(options: Options, cache: Path, barred: bool, outcome: Outcome) -> None:
    with contextlib.ExitStack() as ends:
        try:
            engine = ends.enter_context(_engine(options, cache, outcome))
        except LumenError as error:  # what was measured before it is kept
            outcome.fail("engine in this process", error)
            return
        if all(one["name"] != "KV capacity" for one in outcome.rows):
            tokens = outcome.facts["kv_tokens"]
            assert isinstance(tokens, int)
            outcome.add(_capacity_row(tokens, barred))
        bench = Bench(
            engine, options.sizes, options.reps, barred, options.profile_dir, options.trace,
            _byte_floor(options.settings), options.large,
        )  # fmt: skip
        warm_up(bench)
        for name in options.works:
            if name not in WORKS:
                continue
            try:
                for one in WORKS[name](bench):
                    outcome.add(one)
            except EngineError as error:  # the engine is gone: so is the rest
                outcome.fail(f"({name})", error)
                return


def _byte_floor(settings: EngineSettings) -> Callable[[int, int], float | None]:
    """Of a decode step in milliseconds, by batch and context; None but on the chip it is of."""
    config = resolve_model(settings.model).source.config
    known = byte_floor.CHIP in jax.devices()[0].device_kind
    item_bytes = jnp.dtype(settings.dtype).itemsize
    devices = settings.tensor_parallel

    def floor(batch: int, context: int) -> float | None:
        return byte_floor.decode_ms(config, item_bytes, batch, context, devices) if known else None

    return floor


@contextlib.contextmanager
def _engine(options: Options, cache: Path, outcome: Outcome) -> Iterator[InProcessEngine]:
    built = build(options.settings, cache)
    device, count = jax.devices()[0], options.settings.tensor_parallel
    memory = device.memory_stats() or {}
    outcome.facts.update(
        device=f"{count} x {device.device_kind}" if count > 1 else device.device_kind,
        kv_tokens=built.kv_tokens,
        this_start_s=round(built.seconds, 2),
        peak_bytes_after_start=memory.get("peak_bytes_in_use"),
        engine=asdict(options.settings),
    )
    print(f"Ready after {built.seconds:.1f} s: {built.kv_tokens} tokens of KV", flush=True)
    engine = InProcessEngine(built.executor, options.settings)
    try:
        yield engine
    finally:
        engine.close()
