"""Compiles everything, then checks and times one case after another."""

import contextlib
import dataclasses
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
from lumen_kernels.errors import KernelArgumentError
from lumen_kernels.target import Target

from serving.results_file import Row
from tools.bench.kernels import (
    add_norm,
    block_copy,
    ceilings,
    decode,
    dense_chain,
    kv_write,
    matmul,
    merge,
    prefill,
    rotary_write,
)
from tools.bench.kernels.case import Bench, Case, DoesNotFitError, WrongResultError
from tools.bench.kernels.operations import Operations, lumen_operations
from tools.bench.kernels.pool import KvPool
from tools.bench.kernels.report import MEASURED, measured_row, other_row
from tools.bench.kernels.sizes import FULL, FURTHER, SMOKE
from tools.bench.kernels.timing import Timing, compile_all, default_threads

ARENA_OPERATIONS: dict[str, Callable[[Bench, KvPool], list[Case]]] = {
    "decode": decode.cases,
    "prefill": prefill.cases,
    "block_copy": block_copy.cases,
    "kv_write": kv_write.cases,
    "rotary_write": rotary_write.cases,
}
OTHER_OPERATIONS: dict[str, Callable[[Bench], list[Case]]] = {
    "matmul": matmul.cases,
    "add_norm": add_norm.cases,
    "dense_chain": dense_chain.cases,
    "merge": merge.cases,
}
OPERATIONS = (*ARENA_OPERATIONS, *OTHER_OPERATIONS)

_ARENA_SHARE = 0.8  # of free memory; operands, results and XLA's temporaries need the rest
_NO_STATISTICS_BYTES = 64 << 20  # arena where a device does not say how much memory it has


class NoSuchRowError(Exception):
    """Nothing is left to measure."""


@dataclass(frozen=True, slots=True)
class Options:
    """only: names out of OPERATIONS. match: of those, rows with this regular expression in their
    name. pages: block sizes, all shapes with the first, few with the others. arena_gib: None: most
    of free memory."""

    only: tuple[str, ...] = OPERATIONS
    match: str = ""
    pages: tuple[int, ...] = (16, 64)
    arena_gib: float | None = None
    reps: int = 5
    batch_ms: float = 20.0
    smoke: bool = False

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in OPERATIONS:
                raise ValueError(f"--only={name}: no such operation; there are {list(OPERATIONS)}.")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"--match={self.match}: no regular expression: {error}.") from error
        for page in self.pages:
            if page not in (16, 32, 64, 128):
                raise ValueError(f"--pages={page}: a block has 16, 32, 64 or 128 tokens.")
        if not self.only or not self.pages:
            raise ValueError("--only and --pages must name something.")
        if self.reps < 1 or self.batch_ms < 0:
            raise ValueError("--reps must be at least 1 and --batch_ms not negative.")
        if self.arena_gib is not None and self.arena_gib <= 0:
            raise ValueError(f"--arena_gib={self.arena_gib}: must be positive.")


@dataclass(slots=True)
class Outcome:
    """rows: all of them. failures: those that were wrong or broke, one line each."""

    rows: list[Row]
    failures: list[str]
    facts: dict[str, object]


def run(
    options: Options, operations: Operations | None = None, target: Target | None = None
) -> Outcome:
    """Measure on JAX's first device, printing as it goes. An interrupt ends it with what it has.

    operations: this checkout's if None. target: what they are traced for, the device's if None.
    Raises NoSuchRowError.
    """
    device = jax.devices()[0]
    bench = Bench(
        sizes=SMOKE if options.smoke else FULL,
        operations=operations or lumen_operations(),
        target=target or Target.of([device]),
        timing=Timing(options.reps, options.batch_ms / 1e3),
    )
    pools = _pools(options, bench, device)
    named = re.compile(options.match).search
    with_pools = []
    for pool in pools:
        seen = bench if pool is pools[0] else dataclasses.replace(bench, sizes=FURTHER)
        group = [
            one for name in options.only if name in ARENA_OPERATIONS
            for one in ARENA_OPERATIONS[name](seen, pool) if named(one.name)
        ]  # fmt: skip
        with_pools.append((pool, group))
    others = [
        one for name in options.only if name in OTHER_OPERATIONS
        for one in OTHER_OPERATIONS[name](bench) if named(one.name)
    ]  # fmt: skip
    if not others and not any(group for _, group in with_pools):
        raise NoSuchRowError(
            f"--match={options.match}: no row of {', '.join(options.only)} has it."
        )
    limits = ceilings.cases(bench)
    cases = [*limits, *others, *(one for _, group in with_pools for one in group)]
    programs = list({id(p): p for one in cases for p in one.programs}.values())
    seconds = compile_all(programs, default_threads())
    print(f"{len(programs)} programs compiled in {seconds:.1f} s", flush=True)

    runner = _Runner([], [])
    try:
        runner.ceilings(limits)
        for case in others:
            runner.one(case)
        for pool, group in with_pools:
            with _filled(pool, group):
                for case in group:
                    runner.one(case, pool)
    except KeyboardInterrupt:
        runner.failures.append("interrupted: what follows was not measured")
    facts = {
        "device": device.device_kind,
        "backend": bench.target.backend.value,
        "arena_gib": {pool.block_size: round(pool.bytes / 2**30, 2) for pool in pools},
        "programs": len(programs),
        "compile_s": round(seconds, 1),
    }
    return Outcome(runner.rows, runner.failures, facts)


def _pools(options: Options, bench: Bench, device: jax.Device) -> list[KvPool]:
    if not any(name in ARENA_OPERATIONS for name in options.only):
        return []
    if options.arena_gib is not None:
        size = options.arena_gib * 2**30
    else:
        memory = device.memory_stats() or {}
        free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
        size = _ARENA_SHARE * free if free and not options.smoke else _NO_STATISTICS_BYTES
    pages = options.pages[:1] if options.smoke else options.pages
    return [KvPool(bench.sizes.model, page, size, bench.target) for page in pages]


@contextlib.contextmanager
def _filled(pool: KvPool, cases: Sequence[Case]) -> Iterator[None]:
    """The pool's arena allocated for these cases: one at a time fits."""
    if cases:
        pool.fill()
    try:
        yield
    finally:
        pool.release()


@dataclass(slots=True)
class _Runner:
    rows: list[Row]
    failures: list[str]
    _ceilings: ceilings.Ceilings | None = None

    def ceilings(self, cases: Sequence[Case]) -> None:
        """Measure what the device can do. Nothing works if this does not: errors pass through."""
        found = [(case, case.measure()) for case in cases]
        self._ceilings = ceilings.of_measurements(found)
        for case, measurement in found:
            self._add(measured_row(case, measurement, self._ceilings))

    def one(self, case: Case, pool: KvPool | None = None) -> None:
        """Check and time a case; what goes wrong becomes its row."""
        started = time.perf_counter()
        try:
            found = case.measure()
        except (NotImplementedError, DoesNotFitError, KernelArgumentError) as error:
            self._add(other_row(case, f"not measured: {error}"))
        except WrongResultError as error:
            self._failed(case, f"WRONG, not timed: {error}")
        except Exception as error:
            first_line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if all(first_line not in failure for failure in self.failures):
                traceback.print_exc(file=sys.stdout)
            self._failed(case, f"failed: {first_line}")
        else:
            seconds = time.perf_counter() - started
            self._add(measured_row(case, found, self._ceilings), f"[{seconds:.1f} s]")
            return
        if pool is not None:
            pool.fill()  # whatever state it was left in

    def _failed(self, case: Case, status: str) -> None:
        self.failures.append(f"{case.name}: {status}")
        self._add(other_row(case, status))

    def _add(self, one: Row, took: str = "") -> None:
        self.rows.append(one)
        told = one["status"]
        if told == MEASURED:
            rates = f"{one['tb_s'] or 0:.2f} TB/s, {one['tflop_s'] or 0:.0f} TFLOP/s"
            told = f"{one['us']:.4g} us, {rates}"
        parts = (f"{one['name']}: {told}", one["verdict"], one["note"], took)
        print("  ".join(part for part in parts if part), flush=True)
