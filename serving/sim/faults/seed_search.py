"""Runs many seeds, on several cores if asked, and adds up what they show."""

import multiprocessing
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from serving.sim.faults.chaos import Failure, run_seed
from serving.sim.faults.coverage import Coverage

_SEEDS_AT_A_TIME = 25


@dataclass(slots=True)
class Tally:
    """What some seeds came to. cpu_s: seconds of one core."""

    seeds: int = 0
    cpu_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def add(self, other: "Tally") -> None:
        """Take over what other seeds came to."""
        self.seeds += other.seeds
        self.cpu_s += other.cpu_s
        self.failures.extend(other.failures)
        self.coverage.add(other.coverage)


def search(first: int, count: int, jobs: int = 1) -> Iterator[Tally]:
    """Run seeds first .. first + count - 1; yields what each few of them came to, in order.

    With jobs > 1 in as many processes, which import everything anew. Raises BrokenProcessPool if
    one of them dies.
    """
    groups = [
        range(start, min(start + _SEEDS_AT_A_TIME, first + count))
        for start in range(first, first + count, _SEEDS_AT_A_TIME)
    ]
    if jobs == 1:
        yield from map(run_seeds, groups)
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C reaches every process of the terminal; the one that waits for the others ends them.
    ignored = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(
        min(jobs, len(groups)), mp_context=context, initializer=signal.signal, initargs=ignored
    ) as pool:
        yield from pool.map(run_seeds, groups)


def run_seeds(seeds: range) -> Tally:
    """Run these seeds in this process."""
    started = time.process_time()
    tally = Tally(seeds=len(seeds))
    for seed in seeds:
        failure = run_seed(seed, coverage=tally.coverage)
        if failure is not None:
            tally.failures.append(failure)
    tally.cpu_s = time.process_time() - started
    return tally
