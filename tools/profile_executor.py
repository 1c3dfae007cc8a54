"""Measures how long steps take on this machine's device, and writes a profile for the simulator.

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
python tools/profile_executor.py --memory_fraction=0.945 --name=h200_llama_8b \
    --profile=configs/profiles/h200_llama_8b.json
JAX_PLATFORMS=cpu python tools/profile_executor.py --smoke

A grid of decode steps (rows by context), prefill calls (tokens by prefix, one prompt and several),
mixed calls, and both in one step: two plans in flight, from one step's end to the next one's, every
repetition kept. A part of the grid is held out of the fit; the errors there are what the profile
promises. Weights are random: time does not depend on them. About 45 s on an H200, and the start.
"""

import datetime
import sys
import time
from dataclasses import replace
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from lumen.errors import LumenError
from lumen.model import LoadedModel
from serving.engine.device import DeviceExecutor
from serving.sim.cost_fit import Fit, FitError, fit
from serving.sim.profile import Moves, Profile, ProfileExecutor, write_profile
from tools.bench import results
from tools.bench.engine.engine import TINY, Built, EngineSettings, build, executor_config
from tools.bench.engine.settings_flags import cache_dir, engine_settings
from tools.bench.executor_grid import GridClock, GridTimes, grid, grid_table

_NAME = flags.DEFINE_string("name", "measured", "The profile's name.")
_PROFILE = flags.DEFINE_string("profile", "", "JSON file to write. Empty: none.")
_SECONDS = flags.DEFINE_float("point_seconds", 0.15, "Of measuring each point of the grid.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A tiny model and a tiny grid, to see that all works.")
_COPY = flags.DEFINE_float(
    "copy_gb_s", 560.0, "KV from one device of a host to another, in GB/s; assumed, not measured."
)
_WEIGHTS = flags.DEFINE_float(
    "weights_gb_s", 390.0, "Weights from another device of the host, in GB/s; assumed."
)
_COLD = flags.DEFINE_float("cold_start_s", 37.4, "A start without compiled programs; assumed.")
_PROBE_BYTES = 1 << 28


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"Unexpected argument {arguments[1]!r}; see --help.")
    try:
        for flag in (_SECONDS, _COPY, _WEIGHTS, _COLD):
            if not 0 < flag.value < float("inf"):
                raise ValueError(
                    f"--{flag.name}={flag.value:g}: it must be more than 0 and finite."
                )
        results.check_writable(_PROFILE.value)
        settings = _smoke_settings() if _SMOKE.value else engine_settings()
        built = build(settings, cache_dir())
        times = _measure(settings, built)
        found = fit([one.measured for one in times])
        profile = _profile(settings, built, times, found)
    except (ValueError, LumenError) as error:
        sys.exit(f"profile_executor: {error}")
    print(grid_table(times, [found.model.seconds(one.measured.work) for one in times]))
    print(f"Fitted to: {_spelled(found.fitted)}")
    if found.held_out is not None:
        print(f"Held out:  {_spelled(found.held_out)}")
    if _PROFILE.value:
        write_profile(Path(_PROFILE.value), profile)
        print(f"Wrote {_PROFILE.value}")


def _measure(settings: EngineSettings, built: Built) -> list[GridTimes]:
    config = executor_config(settings, None)
    clock = GridClock(built.executor, config, _SECONDS.value)
    points = grid(config, built.executor.limits)
    if _SMOKE.value:
        clock.fewest, clock.seconds = 2, 0.0
    began = time.perf_counter()
    # Loads kernels and wakes the device up: a point that is measured again anyway.
    clock.measure(points[-1])
    times = [clock.measure(point) for point in points]
    print(f"{len(points)} points in {time.perf_counter() - began:.1f} s", flush=True)
    return times


def _profile(settings: EngineSettings, built: Built, times: list[GridTimes], found: Fit) -> Profile:
    executor = built.executor
    assert isinstance(executor, DeviceExecutor)
    limits = executor.limits
    device = jax.devices()[0]
    model = executor.model
    # Tied embeddings are one array in two places.
    arrays = {id(leaf): leaf for leaf in (*model.embedding, *sum(model.units, ()), *model.head)}
    weight_bytes = sum(leaf.nbytes for leaf in arrays.values())
    return Profile(
        name=_NAME.value,
        hardware=device.device_kind,
        model=settings.model,
        dtype=settings.dtype,
        tensor_parallel=settings.tensor_parallel,
        source=f"tools/profile_executor.py on {results.hardware()}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        assumed=(
            f"KV between devices: {_COPY.value:g} GB/s, weights: {_WEIGHTS.value:g} GB/s",
            f"a cold start takes {_COLD.value:g} s",
        ),
        executor=ProfileExecutor(
            num_rows=limits.num_rows,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_model_len=limits.max_model_len,
            max_prefills=limits.max_prefills,
            prefill_buckets=settings.prefill_buckets,
            mixed_calls=settings.mixed_calls,
            batch_sizes=executor_config(settings, None).decode_buckets,
        ),
        cost=found.model,
        moves=Moves(
            kv_bytes_per_token=_kv_bytes(model),
            copy_bytes_per_s=_COPY.value * 1e9,
            host_bytes_per_s=_host_bytes_per_s(device),
            weight_bytes=weight_bytes // settings.tensor_parallel,
            weight_bytes_per_s=_WEIGHTS.value * 1e9,
            cold_start_s=_COLD.value,
            warm_start_s=built.seconds,
        ),
        held_out=found.held_out,
        measured=tuple(one.measured for one in times),
    )


def _kv_bytes(model: LoadedModel) -> int:
    """Of one token, on each device."""
    config, heads = model.config, model.heads
    slots = config.num_layers * heads.kv_per_device
    return 2 * slots * config.head_dim * int(np.dtype(model.dtype).itemsize)


def _host_bytes_per_s(device: jax.Device) -> float:
    """From the host to the device and back, the slower of the two."""
    host = np.zeros(_PROBE_BYTES if not _SMOKE.value else 1 << 20, np.uint8)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        there = jax.block_until_ready(jax.device_put(host, device))
        middle = time.perf_counter()
        np.asarray(there)
        seconds.append(max(middle - began, time.perf_counter() - middle))
    return host.nbytes / min(seconds)


def _spelled(error: FitError) -> str:
    return f"{error.points} steps, error {error.mean:.1%} in the mean, {error.largest:.1%} at most"


def _smoke_settings() -> EngineSettings:
    return replace(TINY, max_model_len=512, mixed_calls=((24, 4),), num_blocks=128)


if __name__ == "__main__":
    app.run(main)
