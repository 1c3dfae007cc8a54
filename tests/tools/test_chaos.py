"""tools/chaos.py from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"
# Runs the tool with a worker that never forgets an attempt whose end was acknowledged.
BROKEN = f"""
import runpy, sys
sys.path.insert(0, {str(TOOL.parents[1])!r})
from serving.cluster.worker_core import WorkerCore
WorkerCore._forget = lambda *arguments: None
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


def chaos(*arguments, code=None, hash_seed="7"):
    start = ["-c", code] if code else [str(TOOL)]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )  # fmt: skip


def test_clean_seeds_end_with_a_table_and_status_0():
    done = chaos("--seeds=3", "--first=5")
    assert done.returncode == 0, done.stderr
    assert "3 seeds from 5 on" in done.stdout
    assert "0 broke a rule." in done.stdout
    assert "ms of a core per seed" in done.stdout
    assert "sent, not accepted" in done.stdout
    assert "Never hit: " in done.stdout


def test_a_broken_core_is_reported_shrunk_and_replayed(tmp_path):
    found = chaos("--seeds=2", f"--failures={tmp_path}", code=BROKEN)
    assert found.returncode == 1, found.stderr
    assert "Seed 0 broke a rule: InternalError: Attempt 1 of r" in found.stdout
    assert "Replay: python -m serving.sim.faults.run 0" in found.stdout
    assert "2 broke a rule." in found.stdout
    (file,) = tmp_path.iterdir()
    assert file.name == "seed-0.json"
    assert f"Replay: python tools/chaos.py --replay={file}" in found.stdout
    again = chaos(f"--replay={file}", code=BROKEN, hash_seed="12345")
    assert again.returncode == 1
    assert again.stderr == "This is the recorded run, to the last byte.\n"
    assert "may be kept for ever" in again.stdout.splitlines()[-1]
    mended = chaos(f"--replay={file}")
    assert mended.returncode == 0
    assert mended.stdout.splitlines()[-1] == "no rule was broken"
    assert "This is not the run that was recorded" in mended.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds=0"], "--seeds=0"),
        (["--first=-1"], "--first=-1"),
        (["--jobs=0"], "--jobs=0"),
        (["17"], "Unexpected argument '17'"),
        (["--replay=/nowhere/run.json"], "run.json cannot be read: No such file or directory"),
        ([f"--replay={__file__}"], "is not JSON"),
        ([f"--failures={__file__}"], "test_chaos.py cannot be written: Not a directory."),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_by_name(arguments, message):
    done = chaos(*arguments)
    assert done.returncode == 1
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


STOPPED = f"""
import runpy, sys
sys.path.insert(0, {str(TOOL.parents[1])!r})
import serving.sim.faults.seed_search as it
run_seeds = it.run_seeds
def run(seeds):
    if seeds.start:
        raise KeyboardInterrupt
    return run_seeds(seeds)
it.run_seeds = run
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


def test_a_search_that_is_stopped_says_what_it_found():
    done = chaos("--seeds=50", code=STOPPED)
    assert done.returncode == 1
    assert "25 seeds from 0 on" in done.stdout
    assert done.stderr == "chaos: stopped after 25 of 50 seeds.\n"
