"""lumen-simulate: a fleet in virtual time, described by a scenario file."""

import gc
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from lumen.errors import LumenError
from serving import results_file
from serving.errors import ConfigurationError
from serving.launch.flags import EXIT_CONFIGURATION
from serving.launch.supervisor import say
from serving.results_file import Row
from serving.sim.fleet.report import rows_of, table_of
from serving.sim.fleet.run import FleetResult, FleetRun
from serving.sim.fleet.scenario import FleetScenario, read_scenario

HELP = """lumen-simulate: run a fleet in virtual time and say how it did.

  lumen-simulate configs/scenarios/h200_mixed.toml --json=result.json

The cores that serve run as they are; only the devices' time is foretold, by a profile. What a
scenario file may say stands in serving/sim/fleet/scenario.py, workloads in
serving/sim/workload/spec.py.

  --json=FILE    write all figures, raw samples in it
  --seed=NUMBER  instead of the scenario's
  --log_hash     print a hash of the event log: equal for equal runs
  --check        have every core look for contradictions after every event (slow)
  --single_steps take every step by itself (slow; changes no figure)
"""


def run() -> None:
    """The console script."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Read the scenario, run it, report. Returns the exit status."""
    if any(word in ("--help", "-h", "--helpfull", "--helpshort") for word in argv[1:]):
        print(HELP)
        return 0
    try:
        values, scenario = _parse(argv)
        json_path = Path(values.json) if values.json else None
        if json_path is not None:
            _check_writable(json_path)
        fleet = FleetRun(
            scenario.config,
            scenario.workload,
            seed=scenario.seed,
            checked=values.check,
            hash_log=values.log_hash,
            stretches=not values.single_steps,
        )
        began = time.perf_counter()
        result = _run(fleet)
        took_s = time.perf_counter() - began
        _report(scenario, result, took_s, json_path)
    except LumenError as error:
        say(str(error))
        return EXIT_CONFIGURATION
    except OSError as error:  # a full disk, or nobody reads what is printed
        say(f"The figures cannot be written: {error.strerror}.")
        return 1
    except KeyboardInterrupt:
        say("Stopped before the end; no figures were written.")
        return 130
    return 0


def _check_writable(path: Path) -> None:
    """Before the run, not after it. Raises ConfigurationError."""
    if not path.parent.is_dir():
        raise ConfigurationError(f"--json: there is no folder {path.parent}.")
    try:
        new = not path.exists()
        with path.open("a", encoding="utf-8"):
            pass
        if new:
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigurationError(f"--json: {path} cannot be written: {why}.") from error


def _run(fleet: FleetRun) -> FleetResult:
    """Little in a run refers to itself: to look for it would be a fifth of the time."""
    gc.disable()
    try:
        return fleet.run()
    finally:
        gc.enable()


def _parse(argv: list[str]) -> tuple[Any, FleetScenario]:
    values = flags.FlagValues()  # type: ignore[no-untyped-call]  # absl leaves it untyped
    flags.DEFINE_string("json", "", "Results file.", flag_values=values)
    flags.DEFINE_integer("seed", None, "Instead of the scenario's.", flag_values=values)
    for name in ("log_hash", "check", "single_steps"):
        flags.DEFINE_boolean(name, False, "See HELP.", flag_values=values)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise ConfigurationError(f"{error} `lumen-simulate --help` lists what there is.") from error
    if len(rest) != 1:
        raise ConfigurationError(
            f"{len(rest)} scenario files are named; name one, for example "
            "configs/scenarios/h200_mixed.toml."
        )
    return values, read_scenario(Path(rest[0]), values.seed)


def _report(
    scenario: FleetScenario, result: FleetResult, took_s: float, json_path: Path | None
) -> None:
    config, workload = scenario.config, scenario.workload
    rows = rows_of(result, workload)
    requests = len(workload.requests)
    console = Console(soft_wrap=True)
    console.print(
        f"{scenario.name}: {requests} requests of {workload.name} in {workload.seconds:.1f} s on "
        f"{config.replicas} x {config.profile.name}, seed {scenario.seed}",
        highlight=False,
    )
    for sentence in config.profile.assumed:
        console.print(f"Assumed by the profile: {sentence}", highlight=False)
    console.print(table_of(rows))
    console.print(
        f"{result.steps} steps, {result.events} events in {took_s:.1f} s: "
        f"{requests / took_s:.0f} requests per second",
        highlight=False,
    )
    if result.log is not None:
        console.print(f"log {result.log}", highlight=False)
    if json_path is not None:
        _write(json_path, scenario, rows)
        console.print(f"Wrote {json_path}", highlight=False)


def _write(path: Path, scenario: FleetScenario, rows: list[Row]) -> None:
    config, profile = scenario.config, scenario.config.profile
    settings = {
        "scenario": scenario.name,
        "seed": scenario.seed,
        "replicas": config.replicas,
        "profile source": profile.source,
        "assumed": profile.assumed,
        "workload": scenario.workload.name,
        "requests": len(scenario.workload.requests),
        "left out": scenario.workload.left_out,
    }
    content = results_file.content(
        rows,
        settings,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        hardware=f"simulated: {config.replicas} x {profile.hardware} (profile {profile.name})",
        packages=("numpy", "lumen-jax"),
    )
    results_file.write(path, content)


if __name__ == "__main__":
    run()
