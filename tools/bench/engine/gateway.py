"""The engine behind a gateway: lumen-serve's own processes, asked by clients in theirs."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from serving.results_file import Row
from tools.bench.engine.bars import Bar
from tools.bench.engine.engine import EngineSettings, Run
from tools.bench.engine.gateway_client import READY
from tools.bench.engine.receipts import EngineError
from tools.bench.engine.report import MEASURED, with_bar
from tools.bench.engine.works import Job
from tools.bench.spawn import running_server
from tools.bench.summary import TIMES

MOST_CLIENTS = 4
"""Processes that ask: one would be busy most of the time with some 10,000 messages per second."""

_PER_CLIENT = 64  # requests, of those that run side by side

FLOOR, AIM = 0.95, 0.98
"""Of the speed in process."""

_ROOT = Path(__file__).parents[3]
_QUEUE = 4096  # requests that may wait in the gateway: all come at once
_STOP_S = 10.0
_JAX_TAKES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_JAX_DEFAULT = 0.75  # of a GPU, where the environment says nothing


def serve_flags(
    settings: EngineSettings, cache_dir: Path, environ: Mapping[str, str], replicas: int = 1
) -> list[str]:
    """Flags of lumen-serve for so many engines with these settings in its one worker.

    The sizes of calls are not among them: a worker derives them from its budget. cache_dir:
    Lumen's. environ: says how much of a GPU JAX takes; `memory_fraction` of the settings is of
    that, lumen-serve's is of all. Raises ValueError for what a worker cannot be told.
    """
    if settings.pipeline_depth != 2:
        raise ValueError("--pipeline_depth must be 2 to go through a gateway: a worker's is.")
    budget = settings.step_tokens or settings.num_rows + settings.prefill_buckets[-1]
    taken = next((float(environ[name]) for name in _JAX_TAKES if environ.get(name)), _JAX_DEFAULT)
    flags: dict[str, Any] = {
        "model": settings.model,
        "max_model_len": settings.max_model_len,
        "replicas": replicas,
        "tensor_parallel": settings.tensor_parallel,
        "dtype": settings.dtype,
        "num_rows": settings.num_rows,
        "token_budget": budget,
        "max_prefills": settings.max_prefills,
        "mixed_calls": bool(settings.mixed_calls),
        "decode_steps": settings.decode_steps,
        "block_size": settings.block_size,
        "memory_fraction": settings.memory_fraction * taken,
        "max_queued_requests": _QUEUE,
        "cache_dir": cache_dir,
    }
    if settings.num_blocks is not None:
        flags["num_blocks"] = settings.num_blocks
    return ["--noprefix_cache", *(f"--{name}={value}" for name, value in flags.items())]


class GatewayEngine:
    """A running gateway as an `Engine`. Use as a context manager: it starts the clients.

    address: of its gRPC. serve_pid: of lumen-serve; None: it is not known. The others: as `Engine`
    has them. arrivals: of the last run, tokens that came to clients by `ARRIVALS_S` of
    `time.perf_counter`.
    """

    def __init__(
        self,
        address: str,
        vocab_size: int,
        max_requests: int,
        max_tokens: int,
        serve_pid: int | None = None,
    ) -> None:
        self._address = address
        self.serve_pid = serve_pid
        self.arrivals: Counter[int] = Counter()
        self._clients: list[subprocess.Popen[str]] = []
        self.vocab_size = vocab_size
        self.max_requests = max_requests
        self.max_tokens = max_tokens

    def generate(self, jobs: Sequence[Job]) -> Run:
        """Run jobs that come all at once, greedily. Raises EngineError unless every token came."""
        busy = [
            (client, jobs[number :: len(self._clients)])
            for number, client in enumerate(self._clients[: len(jobs)])
        ]
        for client, mine in busy:
            _say(client, [(job.prompt, job.output_tokens) for job in mine])
        for client, _ in busy:
            if _heard(client) != READY:
                raise EngineError("A client of the gateway did not get ready.")
        for client, _ in busy:
            _say(client, "go")
        answers = [_heard(client) for client, _ in busy]
        if errors := [error for answer in answers for error in answer["errors"]]:
            raise EngineError(f"{len(errors)} of {len(jobs)} requests failed: {errors[0]}.")
        tokens = sum(answer["tokens"] for answer in answers)
        wanted = sum(job.output_tokens for job in jobs)
        if tokens != wanted:
            raise EngineError(f"The gateway brought {tokens} tokens, not {wanted}.")
        self.arrivals.clear()
        for answer in answers:
            self.arrivals.update(dict(answer["arrivals"]))
        started = min(answer["started"] for answer in answers)
        return Run(max(answer["ended"] for answer in answers) - started, tokens, ())

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tools.bench.engine.gateway_client", self._address]
        for _ in range(min(-(-self.max_requests // _PER_CLIENT), MOST_CLIENTS)):
            self._clients.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=_environ(),
                )
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients:
            assert client.stdin is not None
            with contextlib.suppress(OSError):  # it may have died
                client.stdin.close()
        for client in self._clients:
            try:
                client.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                client.kill()
                client.wait()
            assert client.stdout is not None
            client.stdout.close()
        self._clients.clear()


def _environ() -> dict[str, str]:
    """Ours, such that what we start is of this checkout, whatever is installed."""
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _say(client: subprocess.Popen[str], what: object) -> None:
    assert client.stdin is not None
    try:
        client.stdin.write(json.dumps(what) + "\n")
        client.stdin.flush()
    except OSError as error:
        raise EngineError("A client of the gateway ended; its messages above say why.") from error


def _heard(client: subprocess.Popen[str]) -> Any:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise EngineError("A client of the gateway ended; its messages above say why.")
    return json.loads(line)


@contextlib.contextmanager
def gateway_engine(
    settings: EngineSettings,
    vocab_size: int,
    programs: Path,
    scratch: Path,
    replicas: int = 1,
    environ: Mapping[str, str] | None = None,
) -> Iterator[GatewayEngine]:
    """Start a gateway and a worker with so many replicas, and stop them in the end.

    programs: the folder of compiled programs that an engine in this process uses: the worker uses
    it too. scratch: a folder for what Lumen keeps beside them. environ: what is different there
    from here. Raises EngineError if they do not start.
    """
    cache = scratch / "gateway"
    cache.mkdir(exist_ok=True)
    programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (cache / "programs").exists():
        (cache / "programs").symlink_to(programs.resolve())  # where lumen-serve has them
    flags = serve_flags(settings, cache, os.environ, replicas)
    try:
        with running_server(flags, {**_environ(), **(environ or {})}) as server:
            engine = GatewayEngine(
                server.grpc, vocab_size, replicas * settings.num_rows, settings.max_model_len,
                server.process.pid,
            )  # fmt: skip
            with engine:
                yield engine
    except RuntimeError as error:
        raise EngineError(str(error)) from error


def beside_in_process(through: Row, in_process: Row | None, barred: bool) -> Row:
    """A row measured through the gateway, beside the one of the same work in process.

    share: of the speed in process; floor and aim are shares of it, too. in_process: None if that
    was not measured.
    """
    row = {**through, "name": f"{through['name']}, through gateway and worker"}
    if in_process is None or {through["status"], in_process["status"]} != {MEASURED}:
        return row
    alone, both = in_process["median"], through["median"]
    time = row["unit"] in TIMES
    share = alone / both if time else both / alone
    note = f"{100 * share:.1f} % of the speed in process"
    bar = Bar(None, *(alone / part if time else alone * part for part in (FLOOR, AIM)))
    row |= {"share_of_in_process": round(share, 4), "note": note}
    return with_bar(row, bar) if barred else row
