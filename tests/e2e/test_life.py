"""Starting, refusing to start, and stopping."""

import os
import re
import select
import signal
import socket
import subprocess
import sys

import pytest

from tests.e2e.live import TINY, LiveServer
from tools.bench.spawn import running_server

SERVE = [sys.executable, "-m", "serving.launch.serve"]


def refused(*flags):
    """Run lumen-serve, which must end by itself; (status, what it said)."""
    done = subprocess.run([*SERVE, *flags], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize("flag", ["http_port", "grpc_port"])
def test_a_port_in_use_is_named_before_anything_is_loaded(flag):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = {"http_port": 0, "grpc_port": 0, flag: port}
        status, said = refused(*TINY, *(f"--{name}={value}" for name, value in others.items()))
    assert status == 2
    assert re.fullmatch(rf"lumen: Port {port} .*--{flag}.*", said)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model=/nowhere/model"], "/nowhere/model"),
        (["--model=random:tiny-lama"], "tiny-llama"),
        (["--model=random:tiny-llama", "--max_model_len=4096"], "--max_model_len"),
        (["--model=random:tiny-llama", "--num_blocks=31"], "--num_blocks"),
        (["--modle=x"], "modle"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(flags, named):
    status, said = refused(*flags, "--http_port=0", "--grpc_port=0")
    assert status == 2
    assert named in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


def test_an_arena_that_does_not_fit_ends_the_start_and_says_what_would():
    status, said = refused(*TINY, "--num_blocks=100000000", "--http_port=0", "--grpc_port=0")
    assert status == 1
    assert "100000000 blocks" in said
    assert re.search(r"at most \d+ blocks", said)
    assert "Traceback" not in said


def await_ends(fds):
    for fd in fds:
        ready, _, _ = select.select([fd], [], [], 20)
        os.close(fd)
        assert ready, "a process still runs"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopping_leaves_no_process(cache_dir, number):
    flags = [*TINY, f"--cache_dir={cache_dir}"]
    with running_server(flags) as server:
        live = LiveServer(server)
        children = live.children()
        assert set(children) == {"gateway", "worker"}
        ends = [os.pidfd_open(pid) for pid in (*children.values(), live.pid)]
        os.kill(live.pid, number)
        await_ends(ends)
        status = server.process.wait()
    assert status == (0 if number is signal.SIGTERM else -number)


def test_help_fits_a_page():
    done = subprocess.run([*SERVE, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--http_port" in done.stdout
    assert "--supervisor_fds" not in done.stdout
