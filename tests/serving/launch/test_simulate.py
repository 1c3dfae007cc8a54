"""lumen-simulate from its command line."""

import json
from pathlib import Path

import pytest

from serving.launch.simulate import main

PROFILE = Path(__file__).parents[3] / "configs/profiles/h200_llama_8b.json"
SCENARIO = f"""
[fleet]
profile = "{PROFILE}"
[workload]
kind = "generated"
lengths = {{ prompt = 300, output = 20 }}
arrivals = {{ poisson = {{ rate = 50 }} }}
count = 20
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return str(path)


def test_it_prints_a_table_and_writes_the_figures(scenario, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main(["lumen-simulate", scenario, f"--json={path}", "--seed=5"]) == 0
    out = capsys.readouterr().out
    assert "all, TTFT" in out
    assert "Assumed by the profile: reading KV" in out
    content = json.loads(path.read_text())
    assert set(content) == {
        "commit", "command", "hardware", "date", "versions", "settings", "rows",
    }  # fmt: skip
    assert content["settings"]["seed"] == 5
    assert content["hardware"].startswith("simulated: 1 x NVIDIA H200")
    ttft = next(row for row in content["rows"] if row["name"] == "all, TTFT")
    assert len(ttft["samples"]) == 20
    assert {"median", "peer", "peer_source", "floor", "unit"} <= set(ttft)


def test_equal_runs_print_equal_hashes(scenario, capsys):
    logs = []
    for more in ([], [], ["--seed=9"]):
        assert main(["lumen-simulate", scenario, "--log_hash", *more]) == 0
        logs.append(capsys.readouterr().out.split("log ")[-1].strip())
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]
    assert len(logs[0]) == 32


def test_single_steps_change_no_figure(scenario, tmp_path, capsys):
    rows = []
    for name, more in (("a", []), ("b", ["--single_steps", "--check"])):
        path = tmp_path / name
        assert main(["lumen-simulate", scenario, f"--json={path}", *more]) == 0
        rows.append(json.loads(path.read_text())["rows"])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "0 scenario files are named"),
        (["a.toml", "b.toml"], "2 scenario files are named"),
        (["nowhere.toml"], "cannot be read"),
        (["--sede=1"], "Unknown command line flag"),
        (["--seed=x"], "seed"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, says, capsys):
    assert main(["lumen-simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.out + captured.err


def test_a_folder_that_is_not_there_is_refused_first(scenario, tmp_path, capsys):
    assert main(["lumen-simulate", scenario, f"--json={tmp_path}/none/x.json"]) == 2
    captured = capsys.readouterr()
    assert "--json: there is no folder" in captured.out + captured.err


def test_help_names_the_flags(capsys):
    assert main(["lumen-simulate", "--help"]) == 0
    assert "--json=FILE" in capsys.readouterr().out


def test_a_results_file_that_cannot_be_written_is_refused_before_the_run(
    scenario, tmp_path, capsys
):
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        assert main(["lumen-simulate", scenario, f"--json={path}"]) == 2
        told = capsys.readouterr()
        assert f"--json: {path} cannot be written: {why}." in told.err
        assert not told.out
    assert [one.name for one in tmp_path.iterdir()] == ["small.toml"]


def test_a_full_disk_costs_the_file_and_not_the_table(scenario, capsys):
    assert main(["lumen-simulate", scenario, "--json=/dev/full"]) == 1
    told = capsys.readouterr()
    assert "all, TTFT" in told.out
    assert "cannot be written: No space left on device." in told.err
