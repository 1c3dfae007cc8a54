"""Measures the engine of one replica on fixed work, in this process, beside vLLM's figures.

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
python tools/bench_engine.py --memory_fraction=0.945 --json=docs/results/engine.json
python tools/bench_engine.py --works=a,idle --reps=1 --profile=profiles
JAX_PLATFORMS=cpu python tools/bench_engine.py --smoke

(a) the time of one decode step at batch 1 to 256 and a context of 1,024: that of 128 output tokens
less that of 16, by 112; with it the interpreter's time per step. (b) prefill of one prompt of 1,024
to 16,384 tokens and of 32 of 2,048. (c) 512 requests of 1,024 in and 256 out, (d) 512 of log-normal
lengths, all at once. start: from the first call after the imports to ready, cold and warm, each in
a process of its own; KV capacity. itl: latency under a recorded trace (--trace, of the Azure Public
Dataset's form) at a share of saturation: `tools.bench.engine.trace_latency` and `saturation` say
exactly what both are. idle: what the device does in a traced decode step.
Works named by --gateway are first sent through lumen-serve's own gateway and worker, over gRPC, by
clients in processes of their own.

Requests go through the replica's own loop; the prefix cache is off, lengths are forced, and a run
in which one token is missing is a failure. On a GPU JAX takes 75 % of the memory by default, and
--memory_fraction is a share of what it took: 0.945 of 95 % are the 90 % that the peer had.
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.errors import LumenError
from serving.engine.device.config import gpu_mixed_calls
from tools.bench import results
from tools.bench.engine import start_up
from tools.bench.engine.engine import EngineSettings, build
from tools.bench.engine.report import markdown
from tools.bench.engine.runner import WORK_NAMES, Options, Outcome, run
from tools.bench.engine.trace import read_trace
from tools.bench.engine.trace_latency import TraceOptions

_MODEL = flags.DEFINE_string("model", "random:llama-3.1-8b", "What --model of lumen-serve takes.")
_WORKS = flags.DEFINE_list("works", list(WORK_NAMES), "What to measure.")
_REPS = flags.DEFINE_integer("reps", 3, "Runs of each work: one sample each.")
_STARTS = flags.DEFINE_integer("starts", 1, "Cold starts, and warm ones: one sample each.")
_TENSOR = flags.DEFINE_integer("tensor_parallel", 1, "Devices of the replica.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Precision.")
_ROWS = flags.DEFINE_integer("num_rows", 512, "Requests run side by side.")
_BLOCK = flags.DEFINE_integer("block_size", 64, "Tokens of one KV block.")
_CHUNKS = flags.DEFINE_list(
    "chunks", ["128", "256", "512", "1024", "2048", "4096"], "Sizes of prefill calls, ascending."
)
_PREFILLS = flags.DEFINE_integer(
    "max_prefills", 32, "Prompts that one step prefills, packed together."
)
_BUDGET = flags.DEFINE_integer(
    "step_tokens", None, "Tokens of one step. Default: every row and one whole prefill call."
)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 1, "Decode steps of one plan.")
_DEPTH = flags.DEFINE_integer("pipeline_depth", 2, "Plans submitted at a time, 1 or 2.")
_MIXED = flags.DEFINE_bool(
    "mixed_calls", True, "Decodes and short prompt chunks of a step in one pass over the weights."
)
_MODEL_LEN = flags.DEFINE_integer("max_model_len", 16448, "Tokens of one request.")
_MEMORY = flags.DEFINE_float("memory_fraction", 0.9, "Share of the memory JAX has.")
_BLOCKS = flags.DEFINE_integer("num_blocks", None, "KV blocks. Default: what memory leaves.")
_THREADS = flags.DEFINE_integer("compile_threads", 8, "Programs compiled at a time.")
_CACHE = flags.DEFINE_string("cache_dir", "", "Compiled programs. Default: an empty folder.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder to keep the profiles of `idle` in.")
_TRACE = flags.DEFINE_string("trace", "", "CSV file of requests for `itl`. Empty: not measured.")
_TRACE_START = flags.DEFINE_float("trace_start", 0.0, "Where `itl` begins in the trace, in s.")
_TRACE_SECONDS = flags.DEFINE_float("trace_seconds", 180.0, "Length of that window, in s.")
_LOAD = flags.DEFINE_float("load", 0.7, "Share of saturation at which `itl` plays the trace.")
_SATURATION = flags.DEFINE_float("saturation", None, "Requests/s. Default: searched for.")
_TRIAL_SECONDS = flags.DEFINE_float("trial_seconds", 15.0, "Of each trial in that search.")
_TRIALS = flags.DEFINE_integer("trials", 3, "Rates tried in it, after an estimate.")
_GATEWAY = flags.DEFINE_list(
    "gateway", ["c", "d"], "Works to measure through a gateway and a worker, too. Empty: none."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny model and tiny work, to see that all works.")
_JSON = flags.DEFINE_string("json", "", "Results file to write, raw samples in it.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table. Default: printed.")
_START_ONLY = flags.DEFINE_bool("start_only", False, "Start, tell how long it took, and end.")

_BARS = "Peer, floors and aims are those of one H200."


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    cache = Path(_CACHE.value) if _CACHE.value else None
    try:
        options = Options(
            settings=_smoke_settings() if _SMOKE.value else _settings(),
            works=tuple(_WORKS.value),
            reps=_REPS.value,
            starts=_STARTS.value,
            smoke=_SMOKE.value,
            command=(sys.executable, *sys.argv),
            cache_dir=cache,
            profile_dir=Path(_PROFILE.value) if _PROFILE.value else None,
            trace=_trace(),
            gateway=tuple(_GATEWAY.value),
        )
        if _START_ONLY.value:
            print(start_up.report(build(options.settings, cache)))
            return
        outcome = run(options)
    except (ValueError, LumenError) as error:
        sys.exit(f"bench_engine: {error}")
    _write(options, outcome)
    if outcome.failures:
        sys.exit("bench_engine: " + "; ".join(outcome.failures))


def _trace() -> TraceOptions | None:
    if not _TRACE.value:
        return None
    return TraceOptions(
        requests=read_trace(Path(_TRACE.value)),
        start_s=_TRACE_START.value,
        seconds=_TRACE_SECONDS.value,
        load=_LOAD.value,
        saturation=_SATURATION.value,
        trial_s=_TRIAL_SECONDS.value,
        trials=_TRIALS.value,
    )


def _settings() -> EngineSettings:
    chunks = tuple(int(size) for size in _CHUNKS.value)
    return EngineSettings(
        model=_MODEL.value,
        dtype=_DTYPE.value,
        max_model_len=_MODEL_LEN.value,
        num_rows=_ROWS.value,
        block_size=_BLOCK.value,
        prefill_buckets=chunks,
        mixed_calls=gpu_mixed_calls(_ROWS.value, chunks[-1]) if _MIXED.value else (),
        max_prefills=_PREFILLS.value,
        memory_fraction=_MEMORY.value,
        num_blocks=_BLOCKS.value,
        step_tokens=_BUDGET.value,
        decode_steps=_DECODE_STEPS.value,
        pipeline_depth=_DEPTH.value,
        compile_threads=_THREADS.value,
        tensor_parallel=_TENSOR.value,
    )


def _smoke_settings() -> EngineSettings:
    return EngineSettings(
        model="random:tiny-llama",
        dtype="float32",
        max_model_len=128,
        num_rows=4,
        block_size=16,
        prefill_buckets=(16, 32),
        max_prefills=2,
        memory_fraction=0.9,
        num_blocks=64,
        step_tokens=None,
        decode_steps=_DECODE_STEPS.value,
        pipeline_depth=_DEPTH.value,
        compile_threads=2,
    )


def _write(options: Options, outcome: Outcome) -> None:
    settings = {
        **{name: getattr(options, name) for name in ("works", "reps", "starts", "smoke")},
        **outcome.facts,
    }
    content = results.results(outcome.rows, settings, {})
    device = outcome.facts.get("device")
    to = (_JSON.value, _MARKDOWN.value)
    results.publish(content, device, markdown(outcome.rows), _BARS, to)


if __name__ == "__main__":
    app.run(main)
