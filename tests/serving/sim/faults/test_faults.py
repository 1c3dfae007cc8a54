"""200 seeds of message faults, crashes and partitions, each under all invariants."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from serving.engine.request import FinishReason
from serving.errors import InternalError
from serving.sim.faults.run import FaultRun

GROUPS = 20
SEEDS_PER_GROUP = 10


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_seed_breaks_an_invariant(group):
    ends = Counter()
    moved = 0
    for seed in range(group * SEEDS_PER_GROUP, (group + 1) * SEEDS_PER_GROUP):
        try:
            result = FaultRun(seed).run()
        except (InternalError, AssertionError) as error:
            pytest.fail(f"{error}\nReplay: python -m serving.sim.faults.run {seed}")
        ends.update(result.ends.values())
        moved += sum(attempt > 1 for attempt in result.attempts.values())
    # A run in which nothing happens proves nothing: all kinds of ends, and moves between replicas.
    assert ends[FinishReason.LENGTH] + ends[FinishReason.STOP] > 50
    assert ends[FinishReason.CANCELLED] > 0
    assert ends[FinishReason.FAILED] == 0
    assert moved > 5


@pytest.mark.parametrize("seed", [3, 8])
def test_same_seed_same_log(seed):
    logs = []
    for _ in range(2):
        run = FaultRun(seed, keep_log=True)
        run.run()
        logs.append("\n".join(run.world.log).encode())
    assert len(logs[0]) > 10_000
    assert logs[0] == logs[1]


def test_the_replay_command_gives_the_same_run_under_another_hash_seed():
    run = FaultRun(3, keep_log=True)
    result = run.run()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-m", "serving.sim.faults.run", "3"]
    replay = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert replay.stdout == "\n".join([*run.world.log, repr(result)]) + "\n"


def test_another_seed_another_log():
    runs = [FaultRun(seed, keep_log=True) for seed in (3, 4)]
    for run in runs:
        run.run()
    assert runs[0].world.log != runs[1].world.log
