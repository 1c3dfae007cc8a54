"""The works, each as the rows that it gives on an engine."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.results_file import Row
from tools.bench.engine import bars, trace_latency
from tools.bench.engine.bars import Bar
from tools.bench.engine.engine import Engine, InProcessEngine, Run
from tools.bench.engine.profile import DecodeTrace
from tools.bench.engine.report import kernel_rows, measured, not_measured
from tools.bench.engine.step_clock import SteadyStep, steady_step
from tools.bench.engine.trace_latency import TraceOptions
from tools.bench.engine.works import Lengths, Sizes, alike

_UNTRACED_STEPS = 24  # of the whole batch, before the trace
_TRACED_STEPS = 24
_KERNELS = 25  # of a profile, in the results file and the table


@dataclass(frozen=True, slots=True)
class Bench:
    """What all works are measured with.

    barred: the bars apply: full sizes, on the model and dtype they are of. large: those of the
    large model do. profile_dir: where profiles are kept; None: nowhere. trace: for `itl`; None:
    none was given. byte_floor_ms: of a step, by batch and context, where memory's speed is known.
    """

    engine: Engine
    sizes: Sizes
    reps: int
    barred: bool
    profile_dir: Path | None = None
    trace: TraceOptions | None = None
    byte_floor_ms: Callable[[int, int], float | None] = lambda batch, context: None
    large: bool = False

    def bar(self, bar: Bar) -> Bar:
        """The bar, if it applies."""
        return bar if self.barred else bars.NONE

    def unfit(self, lengths: Lengths, side_by_side: int) -> str | None:
        """Why the engine cannot run these requests, so many of them side by side, if so."""
        engine = self.engine
        if side_by_side > engine.max_requests:
            return f"not measured: the engine runs {engine.max_requests} requests side by side"
        if lengths.longest > engine.max_tokens:
            return f"not measured: a request of this engine has at most {engine.max_tokens} tokens"
        return None

    def run(self, lengths: Lengths) -> Run:
        """Run such requests once."""
        return self.engine.generate(lengths.jobs(self.engine.vocab_size))


def warm_up(bench: Bench) -> None:
    """Run what is not counted: first calls allocate on host and device."""
    sizes = bench.sizes
    lengths = alike(min(4, bench.engine.max_requests), sizes.context, sizes.short)
    if bench.unfit(lengths, 1) is None:
        bench.run(lengths)


def decode(bench: Bench) -> Iterator[Row]:
    """(a): a step of each batch, and what of it is the interpreter's."""
    sizes = bench.sizes
    for batch in sizes.batches:
        name = f"(a) decode step, batch {batch}, context {sizes.context}"
        long = alike(batch, sizes.context, sizes.long)
        reason = bench.unfit(long, batch)
        if reason is not None:
            yield not_measured(name, "ms", reason)
            continue
        runs = [
            (bench.run(long), bench.run(alike(batch, sizes.context, sizes.short)))
            for _ in range(bench.reps)
        ]
        extra = sizes.long - sizes.short
        floor = bench.byte_floor_ms(batch, sizes.context + (sizes.long + sizes.short) // 2)
        found = [steady_step(one.steps, batch) for one, _ in runs]
        steady = [one for one in found if one is not None]
        bar = bars.large_decode(batch, floor) if bench.large else bench.bar(bars.decode(batch))
        samples = [1e3 * (one.seconds - other.seconds) / extra for one, other in runs]
        yield measured(
            name, "ms", samples, bar, _decode_note(steady, floor, float(np.median(samples))),
            byte_floor_ms=floor and round(floor, 4),
            long_s=[round(one.seconds, 4) for one, _ in runs],
            short_s=[round(other.seconds, 4) for _, other in runs],
            steady_ms=[round(one.step, 4) for one in steady],
        )  # fmt: skip
        if steady:
            yield measured(
                f"interpreter time per step, batch {batch}", "ms",
                [one.interpreter for one in steady], bench.bar(bars.INTERPRETER),
                dispatch_ms=[round(one.dispatch, 4) for one in steady],
                planning_ms=[round(one.planning, 4) for one in steady],
                thread_cpu_ms=[round(one.cpu, 4) for one in steady],
            )  # fmt: skip


def _decode_note(steady: list[SteadyStep], floor: float | None, found: float) -> str:
    notes = []
    if steady:
        alone = min(one.step for one in steady)
        notes.append(f"whole batch decoding, nothing else: {alone:.4g} ms")
    if floor is not None:
        share = f"{floor / found:.0%} of that speed"
        notes.append(f"weights and KV at 4.25 TB/s: {floor:.4g} ms, {share}")
    return "; ".join(notes)


def prefill(bench: Bench) -> Iterator[Row]:
    """(b): one prompt alone, then many."""
    sizes = bench.sizes
    for tokens in sizes.prompts:
        yield _timed(
            bench, f"(b) prefill of {tokens} tokens", alike(1, tokens, 1),
            bars.prefill(tokens), "ms", lambda run: 1e3 * run.seconds,
        )  # fmt: skip
    count, tokens = sizes.many, sizes.many_tokens
    yield _timed(
        bench, f"(b) prefill of {count} x {tokens} tokens", alike(count, tokens, 1),
        bars.PREFILL_MANY, "tokens/s", lambda run: count * tokens / run.seconds,
    )  # fmt: skip


def offline(bench: Bench) -> Iterator[Row]:
    """(c): requests of one shape, all at once."""
    count, prompt, output = bench.sizes.offline
    name = f"(c) offline, {count} requests of {prompt} in, {output} out"
    yield _throughput(bench, name, alike(count, prompt, output), bars.OFFLINE)


def mix(bench: Bench) -> Iterator[Row]:
    """(d): requests of log-normal lengths, all at once."""
    lengths = bench.sizes.mix.lengths()
    name = (
        f"(d) offline mix, {bench.sizes.mix.count} requests, {sum(lengths.prompts)} in, "
        f"{sum(lengths.outputs)} out"
    )
    yield _throughput(bench, name, lengths, bars.MIX)


def _throughput(bench: Bench, name: str, lengths: Lengths, bar: Bar) -> Row:
    return _timed(
        bench, name, lengths, bar, "output tokens/s", lambda run: run.output_tokens / run.seconds
    )


def _timed(
    bench: Bench,
    name: str,
    lengths: Lengths,
    bar: Bar,
    unit: str,
    figure: Callable[[Run], float],
) -> Row:
    reason = bench.unfit(lengths, 1)
    if reason is not None:
        return not_measured(name, unit, reason)
    runs = [bench.run(lengths) for _ in range(bench.reps)]
    steps = [len(run.steps) for run in runs]
    return measured(
        name, unit, [figure(run) for run in runs], bench.bar(bar),
        f"{min(steps)} steps" if min(steps) > 1 else "",
        seconds=[round(run.seconds, 4) for run in runs], steps=steps,
    )  # fmt: skip


def idle(bench: Bench) -> Iterator[Row]:
    """What the device does in a step, and how long it does nothing, from a profile."""
    sizes, engine = bench.sizes, bench.engine
    for batch in sizes.profiled:
        name = f"device idle per step, batch {batch}, context {sizes.context}"
        # Rows that start first decode while the others prefill: up to `batch` steps more.
        lengths = alike(batch, sizes.context, _UNTRACED_STEPS + 2 * _TRACED_STEPS + batch)
        reason = bench.unfit(lengths, batch)
        if reason is not None:
            yield not_measured(name, "ms", reason)
        elif not isinstance(engine, InProcessEngine):
            yield not_measured(name, "ms", "not measured: the engine runs in another process")
        else:
            with tempfile.TemporaryDirectory() as scratch:
                folder = bench.profile_dir or Path(scratch)
                yield _idle(bench, engine, name, batch, lengths, folder / f"batch_{batch}")


def _idle(
    bench: Bench, engine: InProcessEngine, name: str, batch: int, lengths: Lengths, folder: Path
) -> Row:
    trace = DecodeTrace(folder, batch, _UNTRACED_STEPS, _TRACED_STEPS)
    engine.clock.watch = trace
    try:
        bench.run(lengths)
    finally:
        engine.clock.watch = None
        trace.stop()
    found = trace.result()
    if found is None:
        return not_measured(
            name, "ms", "not measured: no GPU in the profile, or too few whole steps"
        )
    launches = sum(one.launches for one in found.kernels)
    note = f"of {found.step:.4g} ms, in which the device is busy {found.busy:.4g}; "
    return measured(
        name, "ms", [found.idle], note=f"{note}{launches:.0f} launches",
        step_ms=round(found.step, 4), busy_ms=round(found.busy, 4),
        traced_step_ms=round(found.traced_step, 4),
        kernels=kernel_rows(found.kernels, _KERNELS),
    )  # fmt: skip


def itl(bench: Bench) -> Iterator[Row]:
    """Latency while requests come as in a recorded trace."""
    name, engine = "ITL p99 under a trace", bench.engine
    if bench.trace is None:
        yield not_measured(name, "ms", "not measured: no trace given")
    elif not isinstance(engine, InProcessEngine):
        yield not_measured(name, "ms", "not measured: the engine runs in another process")
    else:
        yield from trace_latency.measure(engine, bench.trace, bench.reps, bench.barred)


WORKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "a": decode,
    "b": prefill,
    "c": offline,
    "d": mix,
    "itl": itl,
    "idle": idle,
}
"""By the name of the flag."""
