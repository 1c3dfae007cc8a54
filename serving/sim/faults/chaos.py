"""Search of seeds for broken rules, and files from which a failing run is run again."""

import hashlib
import json
import re
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

from lumen.errors import LumenError
from serving.cluster.gateway_events import GatewayConfig
from serving.sim.faults.coverage import Coverage
from serving.sim.faults.run import FaultRun
from serving.sim.faults.scenario import Scenario, draw_scenario
from serving.sim.literal import LiteralError, from_literal, to_literal
from serving.sim.world import World

_MOST_REPLICAS = 1024  # of a worker in a file
_PREAMBLE = re.compile(r"^seed \d+, [\d.]+ s: ")


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that broke a rule.

    rule: the message without what differs from run to run, so that two runs that break the same
    rule can be told from two that do not. message: the error in full. at: virtual seconds.
    """

    seed: int
    rule: str
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A run that can be run again. log_sha256: of its log and its end; see `record`."""

    seed: int
    scenario: Scenario
    rule: str
    message: str
    log_sha256: str


def scenario_of(seed: int) -> Scenario:
    """What that seed's run is made of."""
    return draw_scenario(World(seed).chance("scenario"))


def run_seed(
    seed: int, scenario: Scenario | None = None, coverage: Coverage | None = None
) -> Failure | None:
    """Run a seed, or a scenario under that seed's network; None if no rule was broken."""
    run = FaultRun(seed, scenario, coverage=coverage)
    return _fails(run)


def replay(seed: int, scenario: Scenario) -> tuple[str, Failure | None]:
    """The whole log of a run, its end as the last line, and how it failed."""
    run = FaultRun(seed, scenario, keep_log=True)
    failure = _fails(run)
    assert run.world.log is not None
    end = f"broken: {failure.message}" if failure else "no rule was broken"
    return "\n".join([*run.world.log, end]) + "\n", failure


def record(seed: int, scenario: Scenario) -> RecordedRun:
    """Run it once more and note down how it goes. Raises ValueError if it breaks no rule."""
    log, failure = replay(seed, scenario)
    if failure is None:
        raise ValueError(f"Seed {seed} breaks no rule with this scenario.")
    return RecordedRun(seed, scenario, failure.rule, failure.message, digest(log))


def digest(log: str) -> str:
    """What tells two logs apart."""
    return hashlib.sha256(log.encode()).hexdigest()


def write_run(path: Path, run: RecordedRun) -> None:
    """Store a run as JSON that is good to read: small parts on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_readable(to_literal(run)) + "\n", encoding="utf-8")


def read_run(path: Path) -> RecordedRun:
    """Raises LiteralError if the file cannot be read or is no such run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LiteralError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise LiteralError(f"{path} is not JSON: {error}.") from None
    try:
        run: RecordedRun = from_literal(RecordedRun, content)
    except LumenError as error:  # LiteralError, and what settings say of themselves
        raise LiteralError(f"{path}: {error}") from None
    for place, worker in enumerate(run.scenario.workers):
        if not 1 <= worker.replicas <= _MOST_REPLICAS:
            raise LiteralError(
                f"{path}: scenario.workers[{place}].replicas is {worker.replicas}; it must be from "
                f"1 to {_MOST_REPLICAS}."
            )
    for place, fault in enumerate(run.scenario.faults):
        workers = run.scenario.workers
        if not (
            0 <= fault.worker < len(workers) and 0 <= fault.replica < workers[fault.worker].replicas
        ):
            raise LiteralError(
                f"{path}: scenario.faults[{place}] names a worker that is not there."
            )
    _check_times(path, run.scenario.gateway)
    try:
        FaultRun(run.seed, run.scenario)
    except (ValueError, ArithmeticError, MemoryError, LumenError) as error:
        raise LiteralError(f"{path}: no fleet can be made of its scenario: {error}") from None
    return run


def _check_times(path: Path, gateway: GatewayConfig) -> None:
    """A gateway that waits for nothing never lets time go on."""
    for field in fields(gateway):
        value = getattr(gateway, field.name)
        if isinstance(value, float) and not value > 0:
            raise LiteralError(
                f"{path}: scenario.gateway.{field.name} is {value}; it must be more than 0."
            )


def rule_of(error: BaseException) -> str:
    """The rule that an error says is broken: its message without numbers and names of requests.

    An error that no rule raised is named after its type and the function it came from.
    """
    message = _PREAMBLE.sub("", str(error))
    if type(error).__module__ == "builtins":
        frames = traceback.extract_tb(error.__traceback__)
        where = f" in {frames[-1].name}" if frames else ""
        message = f"{type(error).__name__}{where}"
    message = re.sub(r"[0-9]+(\.[0-9]+)?", "#", message)
    return re.sub(r"[\[(]#?(, #)*,?[\])]", "#", message)


def _fails(run: FaultRun) -> Failure | None:
    try:
        run.run()
    # A core that falls over is as broken as one that contradicts itself.
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Failure(run.world.seed, rule_of(error), message, run.world.now)
    return None


def _readable(value: object, indent: str = "") -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if len(indent) + len(flat) <= 100 or not isinstance(value, dict | list) or not value:
        return flat
    deeper = indent + "  "
    if isinstance(value, list):
        parts = [_readable(one, deeper) for one in value]
    else:
        parts = [f"{json.dumps(key)}: {_readable(one, deeper)}" for key, one in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    inner = f",\n{deeper}".join(parts)
    return f"{opening}\n{deeper}{inner}\n{indent}{closing}"
