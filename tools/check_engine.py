"""Checks that the engine computes what it should, on the device it runs on.

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
python tools/check_engine.py --memory_fraction=0.945 --json=docs/results/engine_check.json
JAX_PLATFORMS=cpu python tools/check_engine.py --smoke

fast: log-probabilities of the best 20 tokens and of one more, by the engine's own programs, against
plain XLA with the same weights at the same positions (`tools.check.fast_path`); prefill and decode
at each of --batches rows of mixed lengths. tokens: a tiny float32 model through the whole engine,
every greedy token against a recomputation in numpy without a cache (`tools.check.token_by_token`).
hole: on a device filled up, half of the weights are dropped and one array takes their place
(`tools.check.hole`).

Ends with status 1 if a tolerance is broken or a token differs. Errors are in nats.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from lumen_kernels.target import Target

from lumen.errors import LumenError
from lumen.model_spec import resolve_model
from lumen.presets import preset
from serving.results_file import Row
from tools.bench import results
from tools.bench.engine.engine import EngineSettings, devices_of
from tools.bench.engine.settings_flags import cache_dir, engine_settings
from tools.check import fast_path, hole, token_by_token
from tools.check.comparison import Tolerance
from tools.check.kernels import kernels
from tools.check.report import FINE, error_row, hole_row, markdown, token_row

PARTS = ("fast", "tokens", "hole")

_PARTS = flags.DEFINE_list("parts", list(PARTS), "What to check.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32", "64", "128", "256"], "Decode batches.")
_STEPS = flags.DEFINE_integer("steps", 6, "Decode steps of each batch.")
_SHORTEST = flags.DEFINE_integer("shortest", 16, "Tokens of the shortest prompt.")
_LONGEST = flags.DEFINE_integer("longest", 1536, "Tokens of the longest prompt.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens of a prompt in one prefill call, at most.")
_MEAN = flags.DEFINE_float("mean_tolerance", 0.03, "Of the mean error.")
_P99 = flags.DEFINE_float("p99_tolerance", 0.1, "Of the error's 99th percentile.")
_MOST = flags.DEFINE_float("most_tolerance", 0.3, "Of the largest error.")
_GAP = flags.DEFINE_float(
    "gap_tolerance", 0.15, "Most that the reference prefers its best token by, where they differ."
)
_TINY = flags.DEFINE_string("tiny_preset", "tiny-llama", "Model of `tokens`.")
_TINY_HEAD = flags.DEFINE_integer("tiny_head_dim", 128, "Its head_dim, so that kernels take it.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny models only, to see that all works.")
_JSON = flags.DEFINE_string("json", "", "Results file to write.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table. Default: printed.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    rows: list[Row] = []
    try:
        results.check_writable(_JSON.value, _MARKDOWN.value)
        if not _PARTS.value:
            raise ValueError("--parts must name something.")
        for part in _PARTS.value:
            if part not in PARTS:
                raise ValueError(f"--parts={part}: no such part; there are {list(PARTS)}.")
        settings, plan = _settings(), _plan()
        if max(plan.batches) > settings.num_rows:
            raise ValueError(
                f"--batches has {max(plan.batches)}, but the engine has --num_rows="
                f"{settings.num_rows}."
            )
        made: dict[str, Callable[[], list[Row]]] = {
            "fast": lambda: _fast_rows(settings, plan),
            "tokens": lambda: _token_rows(settings),
            "hole": lambda: [hole_row(settings.model, hole.check(settings, cache_dir()))],
        }
        for part in _PARTS.value:
            gc.collect()  # an executor is part of cycles: the device is free only then
            rows += made[part]()
    except (ValueError, LumenError) as error:
        sys.exit(f"check_engine: {error}")
    facts = {
        "smoke": _SMOKE.value,
        "tolerance": dataclasses.asdict(_tolerance()),
        "engine": dataclasses.asdict(settings),
        "plan": dataclasses.asdict(plan),
    }
    content = results.results(rows, facts, {})
    to = (_JSON.value, _MARKDOWN.value)
    results.publish(content, jax.devices()[0].device_kind, markdown(rows), "Errors in nats.", to)
    broken = [one for one in rows if one["verdict"] not in FINE]
    if broken:
        told = "; ".join(f"{one['name']}: {one['verdict']}" for one in broken)
        sys.exit(f"check_engine: {told}")


def _fast_rows(settings: EngineSettings, plan: fast_path.Plan) -> list[Row]:
    source = resolve_model(settings.model).source
    found = fast_path.check(source, settings, plan, cache_dir())
    return [
        error_row(name, one, None if name == fast_path.ITSELF else _tolerance())
        for name, one in found.items()
    ]


def _token_rows(settings: EngineSettings) -> list[Row]:
    config = dataclasses.replace(preset(_TINY.value), head_dim=_TINY_HEAD.value, unit_layers=1)
    devices = devices_of(settings)
    platform = "cuda" if devices[0].platform == "gpu" else devices[0].platform
    called = kernels(
        config, "float32", token_by_token.SETTINGS.block_size, Target.of(devices), platform,
        len(devices),
    )  # fmt: skip
    found = token_by_token.check(
        config, f"{_TINY.value}-{_TINY_HEAD.value}", (1, 4), cache_dir(), devices
    )
    name = f"{_TINY.value} with heads of {_TINY_HEAD.value}, float32"
    if len(devices) > 1:
        name += f", over {len(devices)} devices"
    return [
        token_row(f"{name}, {steps} decode steps per plan", one, called)
        for steps, one in found.items()
    ]


def _plan() -> fast_path.Plan:
    if _SMOKE.value:
        return fast_path.Plan((1, 2), steps=2, shortest=5, longest=70, chunk=16)
    if not all(batch.strip().isdecimal() for batch in _BATCHES.value):
        raise ValueError(f"--batches={','.join(_BATCHES.value)} must be whole numbers.")
    return fast_path.Plan(
        tuple(int(batch) for batch in _BATCHES.value),
        _STEPS.value, _SHORTEST.value, _LONGEST.value, _CHUNK.value,
    )  # fmt: skip


def _tolerance() -> Tolerance:
    return Tolerance(_MEAN.value, _P99.value, _MOST.value, _GAP.value)


def _settings() -> EngineSettings:
    if _SMOKE.value:
        return dataclasses.replace(
            token_by_token.SETTINGS, model="random:tiny-smollm", num_rows=2, num_blocks=16,
            mixed_calls=((32, 2),), tensor_parallel=flags.FLAGS.tensor_parallel,
        )  # fmt: skip
    return engine_settings()


if __name__ == "__main__":
    app.run(main)
