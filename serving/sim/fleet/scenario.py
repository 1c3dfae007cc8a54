"""Scenario files: a fleet, a workload and a policy in TOML.

    seed = 1

    [fleet]                     # FleetConfig; profile: a file, relative to this one
    profile = "../profiles/h200_llama_8b.json"
    replicas = 16

    [engine]                    # of every replica, where it differs from run.DEFAULT_ENGINE
    prefix_caching = true

    [policy]
    dispatch = "least_loaded"   # or "fewest_requests"

    [workload]                  # serving.sim.workload.spec
    kind = "generated"
    ...

Only [fleet] with a profile and [workload] have to be there. Workloads without a seed of their own
take the scenario's.
"""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.engine.config import EngineConfig
from serving.errors import ConfigurationError
from serving.policy.dispatch import DISPATCHES
from serving.sim.fleet.run import DEFAULT_ENGINE, FleetConfig
from serving.sim.profile import read_profile
from serving.sim.workload.requests import Workload
from serving.sim.workload.spec import from_spec
from serving.sim.workload.spec_section import Section

_TABLES = ("seed", "fleet", "engine", "policy", "workload")
_WHOLE = ("replicas", "replicas_per_worker", "num_blocks", "queue")
_SECONDS = ("network_s", "report_s", "sample_s")
_ENGINE_WHOLE = ("pipeline_depth", "max_step_tokens", "spread_steps", "min_prefill_tokens")
_ENGINE_FLAGS = ("prefill_first", "prefix_caching")


@dataclass(frozen=True, slots=True)
class FleetScenario:
    """What a scenario file describes. name: the file's."""

    name: str
    config: FleetConfig
    workload: Workload
    seed: int


def read_scenario(path: Path, seed: int | None = None) -> FleetScenario:
    """Read a scenario file; seed: instead of the file's.

    Raises ConfigurationError naming the file and the key; WorkloadFileError and ProfileError for
    the files that it names.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"Scenario {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Scenario {path} is not valid TOML: {error}.") from error
    whole = Section(str(path), content, _TABLES)
    if seed is None:
        seed = whole.whole("seed", 0)
    if seed < 0:
        raise ConfigurationError(f"{path}: seed is {seed}; it must not be negative.")
    workload = from_spec(
        _seeded(whole.get("workload"), seed), path.parent, where=f"{path}.workload"
    )
    config = _fleet(whole, path)
    most = _longest(config)
    tall = sum(request.prompt + request.output > most for request in workload.requests)
    if tall:
        raise ConfigurationError(
            f"{path}.workload: {tall} requests have more than the {most} tokens that a replica of "
            "this fleet takes; leave them out with max_tokens."
        )
    return FleetScenario(path.stem, config, workload, seed)


def _seeded(spec: object, seed: int) -> Any:
    """The workload's table, with the scenario's seed where it has none."""
    return {"seed": seed, **spec} if isinstance(spec, dict) else spec


def _longest(config: FleetConfig) -> int:
    limits = config.profile.limits(config.num_blocks)
    return min(limits.max_model_len, limits.num_blocks * limits.block_size)


def _fleet(whole: Section, path: Path) -> FleetConfig:
    fleet = whole.section("fleet", ("profile", *_WHOLE, *_SECONDS))
    values: dict[str, Any] = {key: fleet.whole(key) for key in _WHOLE if key in fleet}
    values.update({key: fleet.number(key) for key in _SECONDS if key in fleet})
    dispatch = "least_loaded"
    if "policy" in whole:
        policy = whole.section("policy", ("dispatch",))
        dispatch = policy.text("dispatch")
        if dispatch not in DISPATCHES:
            raise policy.wrong("dispatch", f"one of {', '.join(DISPATCHES)}")
    try:
        return FleetConfig(
            profile=read_profile(path.parent / fleet.text("profile")),
            engine=_engine(whole),
            dispatch=DISPATCHES[dispatch],
            **values,
        )
    except ConfigurationError as error:
        raise type(error)(f"{path}: {error}") from error


def _engine(whole: Section) -> EngineConfig:
    values: dict[str, Any] = {}
    if "engine" in whole:
        engine = whole.section("engine", (*_ENGINE_WHOLE, *_ENGINE_FLAGS, "watermark"))
        values.update({key: engine.whole(key) for key in _ENGINE_WHOLE if key in engine})
        for key in _ENGINE_FLAGS:
            if key in engine:
                values[key] = engine.get(key)
                if not isinstance(values[key], bool):
                    raise engine.wrong(key, "true or false")
        if "watermark" in engine:
            values["watermark"] = engine.number("watermark")
    return replace(DEFAULT_ENGINE, **values)
