"""Scenario files: what they say is what runs, and every wrong key is named."""

from pathlib import Path

import pytest

from serving.errors import ConfigurationError
from serving.policy.dispatch import fewest_requests
from serving.sim.fleet.report import rows_of
from serving.sim.fleet.run import FleetRun
from serving.sim.fleet.scenario import read_scenario

CONFIGS = Path(__file__).parents[4] / "configs"
PROFILE = CONFIGS / "profiles/h200_llama_8b.json"

GOOD = f"""
seed = 3
[fleet]
profile = "{PROFILE}"
replicas = 2
num_blocks = 200
report_s = 0.1
sample_s = 0.1
[engine]
prefix_caching = true
watermark = 0.05
[policy]
dispatch = "fewest_requests"
[workload]
kind = "generated"
lengths = {{ prompt = 300, output = 20 }}
arrivals = {{ poisson = {{ rate = 50 }} }}
count = 40
[workload.classes]
chat = {{ share = 0.5, ttft_s = 1.0, tpot_s = 1e-6 }}
batch = {{ share = 0.5, priority = "low" }}
"""


def written(tmp_path, text):
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return path


def test_a_scenario_is_what_its_file_says(tmp_path):
    scenario = read_scenario(written(tmp_path, GOOD))
    config = scenario.config
    assert (scenario.name, scenario.seed, config.replicas) == ("scenario", 3, 2)
    assert (config.num_blocks, config.report_s) == (200, 0.1)
    assert config.engine.prefix_caching
    assert config.engine.watermark == 0.05
    assert config.dispatch is fewest_requests
    assert len(scenario.workload.requests) == 40
    other = read_scenario(written(tmp_path, GOOD), seed=4)
    assert other.seed == 4
    assert other.workload.requests != scenario.workload.requests


def test_the_report_has_classes_promises_and_everything_else(tmp_path):
    scenario = read_scenario(written(tmp_path, GOOD))
    result = FleetRun(scenario.config, scenario.workload, seed=scenario.seed).run()
    rows = {row["name"]: row for row in rows_of(result, scenario.workload)}
    chat = sum(request.service.name == "chat" for request in scenario.workload.requests)
    assert len(rows["all, TTFT"]["samples"]) == 40
    assert len(rows["chat, TTFT"]["samples"]) == chat
    assert rows["chat, TTFT as promised"]["samples"] == [1.0]
    assert rows["chat, TPOT as promised"]["samples"] == [0.0]
    assert "batch, TTFT as promised" not in rows
    assert sum(count for _, count in rows["all, ITL"]["counts"]) == 40 * 19
    assert rows["requests not finished"]["samples"] == [0.0]
    assert rows["requests not finished"]["ends"] == {"length": 40}
    assert rows["output tokens"]["median"] == pytest.approx(800 / result.seconds, rel=1e-4)
    assert 0 < rows["KV use"]["median"] < 1
    assert rows["requests finished"]["median"] == pytest.approx(40 / result.seconds, rel=1e-4)
    assert rows["virtual time"]["median"] == pytest.approx(result.seconds, rel=1e-4)
    for name in ("running", "waiting"):
        found = [getattr(sample, name) for sample in result.samples]
        assert rows[name]["samples"] == found
    assert max(rows["running"]["samples"]) > 0
    assert rows["KV use, fullest replica"]["largest"] == max(one.kv_most for one in result.samples)
    for name in ("preemptions", "prompt tokens found in the prefix cache"):
        assert rows[name]["samples"] == [0.0]
    assert rows["clients sent away, each time"]["samples"] == [0.0]


@pytest.mark.parametrize("path", sorted((CONFIGS / "scenarios").glob("*.toml")), ids=str)
def test_shipped_scenarios_are_whole(path):
    assert read_scenario(path).workload.requests


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seed = 3", "sede = 3", "unknown key 'sede'"),
        ("seed = 3", 'seed = "3"', "seed: found '3'; expected a whole number"),
        ("seed = 3", "seed = -3", "seed is -3; it must not be negative"),
        ("seed = 3", "seed = ", "is not valid TOML"),
        ("replicas = 2", "replica = 2", "fleet: unknown key 'replica'"),
        ("replicas = 2", "replicas = 0", "replicas is 0; it must be 1 or more"),
        ("replicas = 2", "replicas = 2.5", "fleet.replicas: found 2.5"),
        ("num_blocks = 200", "num_blocks = 0", "num_blocks is 0"),
        ("num_blocks = 200", "num_blocks = 4", "40 requests have more than the 256 tokens"),
        ("report_s = 0.1", "report_s = 0", "report_s is 0.0; it must be more than 0"),
        ("h200_llama_8b.json", "none.json", "cannot be read"),
        ("prefix_caching = true", "prefix_caching = 1", "prefix_caching: found 1"),
        ("prefix_caching = true", "decode_steps = 4", "engine: unknown key 'decode_steps'"),
        ("watermark = 0.05", "watermark = 2.0", "watermark is 2.0"),
        ("fewest_requests", "best", "policy.dispatch: found 'best'; expected one of least_loaded"),
        ("[policy]\ndispatch", "[policy]\ndispach", "policy: unknown key 'dispach'"),
        ("[fleet]", "[flet]", "unknown key 'flet'"),
        ('kind = "generated"', 'kind = "drawn"', "workload.kind: found 'drawn'"),
        ("count = 40", "number = 40", "workload: unknown key 'number'"),
    ],
)
def test_a_wrong_scenario_is_refused_by_name(tmp_path, old, new, says):
    assert old in GOOD
    with pytest.raises(ConfigurationError, match=says.replace("(", r"\(")) as caught:
        read_scenario(written(tmp_path, GOOD.replace(old, new)))
    assert "scenario.toml" in str(caught.value)


def test_a_scenario_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_scenario(tmp_path / "none.toml")
