"""Searches seeds of simulated fleets for one that breaks a rule of the protocol.

python tools/chaos.py --seeds=2000 --jobs=2
python tools/chaos.py --replay=chaos-failures/seed-17.json

Every seed is a small fleet, its clients and their misfortunes; the real cores run in virtual time
and all invariants are checked after every event (serving/sim/faults/run.py). The first seed that
breaks a rule is shrunk to the little that it takes, and written to a file that --replay runs again
to the same end, byte for byte. A table shows how often which mishap met requests in which stage.
The exit status is 1 if a rule was broken. What Ctrl-C stops says what was found until then.
"""

import errno
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving.sim.faults.chaos import (
    Failure,
    digest,
    read_run,
    record,
    replay,
    scenario_of,
    write_run,
)
from serving.sim.faults.seed_search import Tally, search
from serving.sim.faults.shrink import shrink
from serving.sim.literal import LiteralError

_SEEDS = flags.DEFINE_integer(
    "seeds", 2000, "How many seeds to run.", lower_bound=1, upper_bound=10_000_000
)
_FIRST = flags.DEFINE_integer("first", 0, "The first of them.", lower_bound=0)
_JOBS = flags.DEFINE_integer(
    "jobs", 1, "Processes side by side, a core each.", lower_bound=1, upper_bound=1024
)
_SHRINK_RUNS = flags.DEFINE_integer(
    "shrink_runs", 1000, "Runs spent on shrinking one seed per broken rule; 0: none.", lower_bound=0
)
_FAILURES = flags.DEFINE_string("failures", "chaos-failures", "Folder for shrunk runs.")
_REPLAY = flags.DEFINE_string("replay", "", "Run such a file again and print its log.")

_PROGRESS_EVERY_S = 5.0


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    try:
        broken = _replay(Path(_REPLAY.value)) if _REPLAY.value else _search()
    except LiteralError as error:
        sys.exit(f"chaos: {error}")
    except OSError as error:
        file = f"{error.filename} cannot be written" if error.filename else "cannot print"
        sys.exit(f"chaos: {file}: {error.strerror}.")
    except KeyboardInterrupt:
        print("chaos: stopped before the end.", file=sys.stderr)
        sys.exit(130)
    sys.exit(int(broken))


def _search() -> bool:
    if _SHRINK_RUNS.value:
        _check_folder(Path(_FAILURES.value))
    started = said_at = time.monotonic()
    found = Tally()
    stopped = ""
    try:
        for tally in search(_FIRST.value, _SEEDS.value, _JOBS.value):
            for failure in tally.failures:
                _report(failure)
            found.add(tally)
            if time.monotonic() >= said_at + _PROGRESS_EVERY_S:
                said_at = time.monotonic()
                print(
                    f"{found.seeds} of {_SEEDS.value} seeds, {_speed(found, started)}", flush=True
                )
    except KeyboardInterrupt:
        stopped = "stopped"
    except BrokenProcessPool:
        stopped = "one of the --jobs processes died (killed, or out of memory; try fewer)"
    if not found.seeds:
        sys.exit(f"chaos: {stopped} before the first seeds were done.")
    print(f"\n{found.coverage.table()}\n")
    missed = found.coverage.missed()
    print(f"Never hit: {len(missed)} cells" + (":" if missed else "."))
    for stage, mishap in missed:
        print(f"  {stage.value} x {mishap.value}")
    print(
        f"\n{found.seeds} seeds from {_FIRST.value} on, {_speed(found, started)}; "
        f"{len(found.failures)} broke a rule."
    )
    if _SHRINK_RUNS.value:
        _shrink_first_of_each_rule(found.failures)
    if stopped:
        sys.exit(f"chaos: {stopped} after {found.seeds} of {_SEEDS.value} seeds.")
    return bool(found.failures)


def _check_folder(path: Path) -> None:
    """Before the search, not after it. Raises OSError if no file can be made there."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def _speed(found: Tally, started: float) -> str:
    cpu_ms = found.cpu_s / found.seeds * 1e3
    wall_ms = (time.monotonic() - started) / found.seeds * 1e3
    return f"{cpu_ms:.1f} ms of a core per seed ({wall_ms:.1f} ms of wall time)"


def _report(failure: Failure) -> None:
    print(
        f"Seed {failure.seed} broke a rule: {failure.message}\n"
        f"  Replay: python -m serving.sim.faults.run {failure.seed}",
        flush=True,
    )


def _shrink_first_of_each_rule(failures: list[Failure]) -> None:
    first: dict[str, Failure] = {}
    for failure in failures:
        first.setdefault(failure.rule, failure)
    for rule, failure in first.items():
        scenario = scenario_of(failure.seed)
        small = shrink(failure.seed, scenario, rule, most_runs=_SHRINK_RUNS.value)
        path = Path(_FAILURES.value) / f"seed-{failure.seed}.json"
        write_run(path, record(small.seed, small.scenario))
        left = small.scenario
        print(
            f"Shrunk seed {failure.seed} in {small.runs} runs to {len(left.workers)} of "
            f"{len(scenario.workers)} workers, {len(left.clients)} of {len(scenario.clients)} "
            f"clients, {len(left.faults)} of {len(scenario.faults)} faults: {rule}\n"
            f"  Replay: python tools/chaos.py --replay={path}",
            flush=True,
        )


def _replay(path: Path) -> bool:
    run = read_run(path)
    log, failure = replay(run.seed, run.scenario)
    print(log, end="")
    if digest(log) == run.log_sha256:
        print("This is the recorded run, to the last byte.", file=sys.stderr)
    else:
        print(f"This is not the run that was recorded: {run.message}", file=sys.stderr)
    return failure is not None


if __name__ == "__main__":
    app.run(main)
