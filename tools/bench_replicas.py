"""Measures whether replicas of one worker slow each other down, with a gateway's traffic on.

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
python tools/bench_replicas.py --replicas=4 --num_rows=256 --json=docs/results/replicas.json
JAX_PLATFORMS=cpu python tools/bench_replicas.py --smoke

lumen-serve's own supervisor, gateway and worker, one GPU for each replica of the worker; clients
in processes of their own ask over gRPC, until every replica runs --num_rows requests of --context
tokens. While all of them decode, the worker's reports, listened to beside the gateway, say how many
steps each replica takes. Before, the same is done with a worker of one replica, on each device of
--alone.

The interpreter lock of the worker is watched from outside: how much of a step its own thread holds
it, and the thread that all replicas share, which carries tokens to the gateway.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lumen.errors import LumenError
from tools.bench import results
from tools.bench.engine import bars
from tools.bench.engine.engine import TINY, check_settings
from tools.bench.engine.replicas import Options, run
from tools.bench.engine.report import markdown
from tools.bench.engine.settings_flags import cache_dir, engine_settings

_REPLICAS = flags.DEFINE_integer("replicas", 2, "Replicas of the worker, one device each.")
_ALONE = flags.DEFINE_list("alone", None, "Devices also measured alone. Default: each of them.")
_CONTEXT = flags.DEFINE_integer("context", 1024, "Tokens of each prompt.")
_OUTPUT = flags.DEFINE_integer(
    "output", 640, "Tokens of each answer: enough for some seconds after the last prompt."
)
_WAVES = flags.DEFINE_integer("waves", 1, "Requests of each row, one after the other.")
_REPS = flags.DEFINE_integer("reps", 1, "Runs of each setup: one sample each.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny model and tiny work, to see that all works.")
_JSON = flags.DEFINE_string("json", "", "Results file to write, raw samples in it.")
_MARKDOWN = flags.DEFINE_string("markdown", "", "File for the table. Default: printed.")

_SMOKE_SETTINGS = replace(TINY, max_model_len=512, num_rows=2, prefill_buckets=(16,), num_blocks=80)
_BARS = "A floor is 3 % more than the step of the same device alone."


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    try:
        results.check_writable(_JSON.value, _MARKDOWN.value)
        options = _options()
        check_settings(options.settings)
        rows, failures = run(options)
    except (ValueError, LumenError) as error:
        sys.exit(f"bench_replicas: {error}")
    settings = {
        "replicas": options.replicas,
        "alone": options.alone,
        "context": options.context,
        "output": options.output,
        "waves": options.waves,
        "reps": options.reps,
        "smoke": _SMOKE.value,
        "engine": asdict(options.settings),
    }
    content = results.results(rows, settings, {})
    results.publish(content, None, markdown(rows), _BARS, (_JSON.value, _MARKDOWN.value))
    if failures:
        sys.exit("bench_replicas: " + "; ".join(failures))


def _options() -> Options:
    smoke, replicas = _SMOKE.value, _REPLICAS.value
    settings = _SMOKE_SETTINGS if smoke else engine_settings()
    alone = range(replicas) if _ALONE.value is None else _numbers(_ALONE.value)
    return Options(
        settings=settings,
        replicas=replicas,
        alone=tuple(alone),
        context=16 if smoke else _CONTEXT.value,
        output=settings.max_model_len - 16 if smoke else _OUTPUT.value,
        waves=4 if smoke else _WAVES.value,
        reps=_REPS.value,
        cache_dir=cache_dir(),
        barred=not smoke and settings.model == bars.MODEL and settings.dtype == "bfloat16",
    )


def _numbers(words: list[str]) -> list[int]:
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"--alone={','.join(words)}: each must be the number of a device, from 0.")
    return [int(word) for word in words]


if __name__ == "__main__":
    app.run(main)
