"""Measures the engine of one replica on fixed work, in this process, beside vLLM's figures.

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
python tools/bench_engine.py --memory_fraction=0.945 --json=docs/results/engine.json
python tools/bench_engine.py --works=a,idle --reps=1 --profile=profiles
python tools/bench_engine.py --model=random:llama-3.1-70b --tensor_parallel=4 --works=a \
  --batches=1,32,128 --num_rows=128 --memory_fraction=0.945
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
from dataclasses import replace
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.errors import LumenError
from serving.sim.workload.azure import read_azure
from tools.bench import results
from tools.bench.engine import bars, start_up
from tools.bench.engine.engine import TINY, EngineSettings, build
from tools.bench.engine.report import markdown
from tools.bench.engine.runner import WORK_NAMES, Options, Outcome, run
from tools.bench.engine.settings_flags import cache_dir, engine_settings
from tools.bench.engine.trace_latency import TraceOptions

_WORKS = flags.DEFINE_list("works", list(WORK_NAMES), "What to measure.")
_BATCHES = flags.DEFINE_list("batches", [], "Decode batches of `a`. Default: those of its bars.")
_PROFILED = flags.DEFINE_list("profiled", [], "Decode batches of `idle`. Default: --batches.")
_REPS = flags.DEFINE_integer("reps", 3, "Runs of each work: one sample each.")
_STARTS = flags.DEFINE_integer("starts", 1, "Cold starts, and warm ones: one sample each.")
_BUDGET = flags.DEFINE_integer(
    "step_tokens", None, "Tokens of one step. Default: every row and one whole prefill call."
)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", 1, "Decode steps of one plan.")
_DEPTH = flags.DEFINE_integer("pipeline_depth", 2, "Plans submitted at a time, 1 or 2.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder to keep the profiles of `idle` in.")
_TRACE = flags.DEFINE_string("trace", "", "CSV file of requests for `itl`. Empty: not measured.")
_TRACE_START = flags.DEFINE_float("trace_start", 0.0, "Where `itl` begins in the trace, in s.")
_TRACE_SECONDS = flags.DEFINE_float("trace_seconds", 180.0, "Length of that window, in s.")
_LOAD = flags.DEFINE_float("load", 0.7, "Share of saturation at which `itl` plays the trace.")
_SATURATION = flags.DEFINE_float("saturation", None, "Requests/s. Default: searched for.")
_TRIAL_SECONDS = flags.DEFINE_float("trial_seconds", 15.0, "Of each trial in that search.")
_TRIALS = flags.DEFINE_integer("trials", 3, "Rates tried in it, after an estimate.")
_GATEWAY = flags.DEFINE_list(
    "gateway",
    ["c", "d"],
    "Works to measure through a gateway and a worker, too; by default those of them that --works "
    "has. Empty: none.",
)
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny model and tiny work, to see that all works.")
_JSON = flags.DEFINE_string("json", "", "Results file to write, raw samples in it.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table. Default: printed.")
_START_ONLY = flags.DEFINE_bool("start_only", False, "Start, tell how long it took, and end.")

_BARS = "Peer, floors and aims are those of one H200."
_LARGE_BARS = (
    f"Floor and aim were set for {bars.LARGE_DEVICES} H200s: 50 and 70 % of the speed of a step "
    "that only reads weights and KV, at 4.25 TB/s."
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    cache = cache_dir()
    try:
        results.check_writable(_JSON.value, _MARKDOWN.value)
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
            gateway=_gateway(),
            batches=_batches(_BATCHES),
            profiled=_batches(_PROFILED),
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


def _gateway() -> tuple[str, ...]:
    """The works named, or by default those of them that are measured in process, too."""
    named = flags.FLAGS["gateway"].present
    return tuple(name for name in _GATEWAY.value if named or name in _WORKS.value)


def _batches(flag: flags.FlagHolder[list[str]]) -> tuple[int, ...] | None:
    if not all(batch.strip().isdecimal() and int(batch) for batch in flag.value):
        told = f"--{flag.name}={','.join(flag.value)}"
        raise ValueError(f"{told}: each must be a whole number, at least 1.")
    return tuple(int(batch) for batch in flag.value) or None


def _trace() -> TraceOptions | None:
    if not _TRACE.value:
        if _SATURATION.value is not None:
            raise ValueError("--saturation is of a trace; give --trace, too.")
        return None
    return TraceOptions(
        trace=read_azure(Path(_TRACE.value)),
        start_s=_TRACE_START.value,
        seconds=_TRACE_SECONDS.value,
        load=_LOAD.value,
        saturation=_SATURATION.value,
        trial_s=_TRIAL_SECONDS.value,
        trials=_TRIALS.value,
    )


def _settings() -> EngineSettings:
    return engine_settings(
        step_tokens=_BUDGET.value,
        decode_steps=_DECODE_STEPS.value,
        pipeline_depth=_DEPTH.value,
    )


def _smoke_settings() -> EngineSettings:
    return replace(
        TINY, decode_steps=_DECODE_STEPS.value, pipeline_depth=_DEPTH.value,
        tensor_parallel=flags.FLAGS.tensor_parallel,
    )  # fmt: skip


def _write(options: Options, outcome: Outcome) -> None:
    settings = {
        **{
            name: getattr(options, name) for name in ("works", "gateway", "reps", "starts", "smoke")
        },
        "trace": options.trace and options.trace.settings(),
        **outcome.facts,
    }
    content = results.results(outcome.rows, settings, {})
    device = outcome.facts.get("device")
    to = (_JSON.value, _MARKDOWN.value)
    told = _LARGE_BARS if options.large else _BARS
    results.publish(content, device, markdown(outcome.rows), told, to)


if __name__ == "__main__":
    app.run(main)
