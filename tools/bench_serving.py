"""Measures a running server, or one it starts: latency percentiles, throughput, errors.

python tools/bench_serving.py --spawn --concurrency=1,16 --requests=32
python tools/bench_serving.py --url=http://127.0.0.1:8000 --rates=0.5,1,2,4 --output=out.json
python tools/bench_serving.py --spawn --spawn_flags=--replicas=1 --peer_python=PYTHON
"""

import asyncio
import contextlib
import functools
import json
import shlex
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving import results_file
from serving.results_file import Row
from tools.bench import results
from tools.bench.clients import Client, GrpcClient, OpenAIClient
from tools.bench.compare import compare
from tools.bench.load import run_open_loop, run_streams
from tools.bench.peer import Peer
from tools.bench.spawn import running_server
from tools.bench.summary import rows_of, streams_name, table_of
from tools.bench.workload import LengthRange, Workload

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "OpenAI-compatible server to measure.")
_GRPC = flags.DEFINE_string("grpc", "127.0.0.1:8001", "lumen.v1 server to measure.")
_PROTOCOL = flags.DEFINE_enum("protocol", "openai", ["openai", "grpc"], "What to speak.")
_MODEL = flags.DEFINE_string("model", "", "Model to ask for. Empty: the first one listed.")
_SPAWN = flags.DEFINE_bool("spawn", False, "Start lumen-serve on free ports and measure that.")
_SPAWN_FLAGS = flags.DEFINE_string(
    "spawn_flags", "", "Flags for that lumen-serve, in quotes, separated by spaces."
)
_RATES = flags.DEFINE_list(
    "rates", [], "Open loop: Poisson arrivals at each of these rates (1/s), one after another."
)
_CONCURRENCY = flags.DEFINE_list(
    "concurrency", ["1"], "Without --rates: each of these numbers of streams, one after another."
)
_REQUESTS = flags.DEFINE_integer("requests", 32, "Requests per rate or number of streams.")
_WARM_UP = flags.DEFINE_integer("warm_up", 2, "Requests sent first and not counted.")
_PROMPT_LEN = flags.DEFINE_string("prompt_len", "128", "Prompt tokens: N or LOW:HIGH.")
_OUTPUT_LEN = flags.DEFINE_string("output_len", "64", "Output tokens, forced: N or LOW:HIGH.")
_TOKEN_IDS = flags.DEFINE_string("token_ids", "100:500", "Token ids prompts are drawn from.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of prompts, lengths and arrivals.")
_TIMEOUT = flags.DEFINE_float("timeout_s", 600.0, "Longest a request may take.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON file to write.")
_PEER_PYTHON = flags.DEFINE_string(
    "peer_python",
    "",
    "A Python with torch and transformers: compare with transformers' generate on the same "
    "machine, taking turns, for each of --concurrency (lengths must be fixed).",
)
_PEER_MODEL = flags.DEFINE_string(
    "peer_model", "", "Hugging Face folder for the peer. Empty: the default model, written out."
)
_PEER_THREADS = flags.DEFINE_integer("peer_threads", None, "torch threads; by default torch's own.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Turns of each side when comparing.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    try:
        workload = Workload(
            LengthRange.parse(_PROMPT_LEN.value),
            LengthRange.parse(_OUTPUT_LEN.value),
            LengthRange.parse(_TOKEN_IDS.value),
            _SEED.value,
        )
        with _served() as (url, grpc_address):
            rows, versions = asyncio.run(_measure(workload, url, grpc_address))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"bench_serving: {error}")
    settings = {
        flag.name: flag.value for flag in (
            _PROTOCOL, _SPAWN_FLAGS, _RATES, _CONCURRENCY, _REQUESTS, _PROMPT_LEN, _OUTPUT_LEN,
            _SEED, _REPETITIONS,
        )
    }  # fmt: skip
    content = results.results(rows, settings, versions)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no edge to wrap at
    console.print(table_of(f"{content['hardware']}, {content['date']}", rows))
    if _OUTPUT.value:
        results_file.write(Path(_OUTPUT.value), content)
        print(f"Wrote {_OUTPUT.value}")


@contextlib.contextmanager
def _served() -> Iterator[tuple[str, str]]:
    if not _SPAWN.value:
        yield _URL.value, _GRPC.value
        return
    with running_server(shlex.split(_SPAWN_FLAGS.value)) as server:
        yield server.http, server.grpc


async def _measure(
    workload: Workload, url: str, grpc_address: str
) -> tuple[list[Row], dict[str, str]]:
    client = _client(url, grpc_address)
    try:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            if _PEER_PYTHON.value:
                return await _compare(client, workload, progress)
            return await _loads(client, workload, progress), {}
    finally:
        await client.aclose()


def _client(url: str, grpc_address: str) -> Client:
    if _PROTOCOL.value == "grpc":
        return GrpcClient(grpc_address, _TIMEOUT.value)
    return OpenAIClient(url, _MODEL.value or _first_model(url), _TIMEOUT.value)


def _first_model(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10.0) as response:
        return str(json.load(response)["data"][0]["id"])


async def _loads(client: Client, workload: Workload, progress: Progress) -> list[Row]:
    """Every rate, or every number of streams, one after another."""
    warm_up = workload.tasks(_WARM_UP.value, salt=1)
    await run_streams(client, warm_up, len(warm_up), lambda: None)
    rows = []
    loads = [("rate", float(rate)) for rate in _RATES.value] or [
        ("streams", int(count)) for count in _CONCURRENCY.value
    ]
    for number, (kind, amount) in enumerate(loads):
        name = f"{amount:g} requests/s" if kind == "rate" else streams_name(int(amount))
        bar = progress.add_task(name, total=_REQUESTS.value)
        tasks = workload.tasks(
            _REQUESTS.value, rate=amount if kind == "rate" else None, salt=2 + number
        )
        ended = functools.partial(progress.advance, bar)
        if kind == "rate":
            records = await run_open_loop(client, tasks, ended)
        else:
            records = await run_streams(client, tasks, int(amount), ended)
        rows.extend(rows_of(name, records))
    return rows


async def _compare(
    client: Client, workload: Workload, progress: Progress
) -> tuple[list[Row], dict[str, str]]:
    for length in (workload.prompt_len, workload.output_len):
        if length.low != length.high:
            raise ValueError("The peer takes one batch of equal lengths; give N, not LOW:HIGH.")
    streams = [int(count) for count in _CONCURRENCY.value]
    total = (_REPETITIONS.value + 1) * (sum(streams) + len(streams))
    bar = progress.add_task("beside transformers", total=total)
    with (
        _peer_model() as model_dir,
        Peer(_PEER_PYTHON.value, model_dir, _PEER_THREADS.value) as peer,
    ):
        rows = await compare(
            client, peer, workload, streams, _REPETITIONS.value, lambda: progress.advance(bar)
        )
        return rows, peer.facts["versions"]


@contextlib.contextmanager
def _peer_model() -> Iterator[Path]:
    """The peer's weights; those of the default model are written out for the while."""
    if _PEER_MODEL.value:
        yield Path(_PEER_MODEL.value)
        return
    # Imported here: only this case needs the model library, and JAX with it.
    from lumen.checkpoint.huggingface_writer import write_huggingface
    from lumen.model_spec import resolve_model

    model = resolve_model(None)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / model.model_id
        write_huggingface(model.source, target, model.tokenizer, None, lambda done, total: None)
        yield target


if __name__ == "__main__":
    app.run(main)
