"""The supervisor with small real processes; a supervisor process of its own where it is killed."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest

# Announces its pid, then waits for SIGTERM; its flags say how it misbehaves.
CHILD = """
import os, signal, sys
from serving.launch.lifeline import watch_supervisor
fds = tuple(int(x) for x in sys.argv[-1].split("=")[1].split(","))
announce = watch_supervisor(fds)
mode = sys.argv[1]
if mode == "broken":
    sys.exit(1)
if mode == "misconfigured":
    sys.exit(2)
stopped = []
signal.signal(signal.SIGTERM, (lambda *_: None) if mode == "stubborn" else (lambda *_: sys.exit(0)))
announce("ready", pid=os.getpid())
while True:
    signal.pause()
"""

# Prints what it hears, one JSON line each.
SUPERVISOR = """
import json, sys
from serving.launch.supervisor import ChildPlan, Supervisor
plans = [
    ChildPlan(name, (sys.executable, "-c", {child!r}, mode), stop_grace_s=0.3)
    for name, mode in json.loads(sys.argv[1])
]
def hear(name, event):
    print(json.dumps([name, event]), flush=True)
sys.exit(Supervisor(plans, hear).run())
"""


class Running:
    def __init__(self, *children):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR.format(child=CHILD), json.dumps(children)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def ended(self):
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@pytest.fixture
def run():
    started = []

    def start(*children):
        started.append(Running(*children))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.communicate()


def await_end(pid_fd):
    ready, _, _ = select.select([pid_fd], [], [], 20)
    os.close(pid_fd)
    assert ready, "the process still runs"


def test_a_dead_child_is_started_again_and_sigterm_stops_all_in_reverse_order(run):
    running = run(("worker", "good"), ("gateway", "good"))
    pids = {}
    while len(pids) < 2:
        name, event = running.hear()
        pids[name] = event["pid"]
    os.kill(pids["worker"], signal.SIGKILL)
    name, event = running.hear()
    assert name == "worker"
    assert event["pid"] != pids["worker"]
    ends = [os.pidfd_open(pid) for pid in (event["pid"], pids["gateway"])]
    running.process.send_signal(signal.SIGTERM)
    status, err = running.ended()
    assert status == 0
    assert "the worker ended (signal SIGKILL)" in err
    for end in ends:
        await_end(end)


@pytest.mark.parametrize(
    ("mode", "said"),
    [("broken", "3 times in a row"), ("misconfigured", "cannot start (exit status 2)")],
)
def test_a_child_that_cannot_start_ends_everything(run, mode, said):
    running = run(("worker", mode), ("gateway", "good"))
    status, err = running.ended()
    assert status == 1
    assert said in err


def test_a_stubborn_child_is_killed_after_its_grace(run):
    running = run(("worker", "stubborn"))
    _, event = running.hear()
    end = os.pidfd_open(event["pid"])
    running.process.send_signal(signal.SIGINT)
    status, err = running.ended()
    assert status == 0
    assert "did not stop in time" in err
    await_end(end)


@pytest.mark.parametrize("mode", ["good", "stubborn"])
def test_children_end_when_the_supervisor_is_killed(run, mode):
    running = run(("worker", mode))
    _, event = running.hear()
    end = os.pidfd_open(event["pid"])
    running.process.kill()
    await_end(end)


def test_a_second_signal_kills_at_once(run):
    running = run(("worker", "stubborn"))
    _, event = running.hear()
    end = os.pidfd_open(event["pid"])
    running.process.send_signal(signal.SIGTERM)
    assert "second signal" in running.process.stderr.readline()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=20) == 0
    await_end(end)
