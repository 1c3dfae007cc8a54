"""Drops weights on a device that is full, and has one allocation take their place."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from lumen.model_spec import resolve_model
from serving.engine.device import DeviceExecutorConfig, build_device_executor, weight_hole
from tools.bench.engine.engine import EngineSettings, devices_of, executor_config

CYCLES = 4
_SMALLEST = 64 << 20
"""Free pieces of memory below this are not filled up."""


@dataclass(frozen=True, slots=True)
class HoleCheck:
    """units: dropped. weight_bytes: theirs. hole_bytes: of the piece that they leave. free_bytes:
    largest free piece before; 0 where the device does not say. segment_ms: of each cycle, from the
    deletion until an array as large as the hole is there, zeroed. Bytes are of one device."""

    units: int
    weight_bytes: int
    hole_bytes: int
    free_bytes: int
    segment_ms: tuple[float, ...]


def check(settings: EngineSettings, cache_dir: Path | None) -> HoleCheck:
    """Build an engine that may drop the second half of its units, fill its device up, drop them.

    Raises ConfigurationError if they are not in one piece where it matters, what JAX raises if
    nothing can be allocated where they were.
    """
    source = resolve_model(settings.model).source
    count = source.config.num_units
    config: DeviceExecutorConfig = dataclasses.replace(
        executor_config(settings, cache_dir), droppable_units=tuple(range(count // 2, count))
    )
    executor = build_device_executor(source, devices_of(settings), config)
    model = executor.model
    units = {number: model.units[number] for number in config.droppable_units}
    device = model.mesh.devices.flat[0]
    weight_bytes = sum(a.addressable_shards[0].data.nbytes for unit in units.values() for a in unit)
    size = weight_hole.hole_bytes(units) if weight_hole.stays(device) else weight_bytes
    lies_here = jax.sharding.SingleDeviceSharding(device)
    made = jax.jit(lambda: jnp.zeros(size, jnp.uint8), out_shardings=lies_here).lower().compile()
    full = _fill(device, size)
    free = _largest_free(device)
    taken = []
    for _ in range(CYCLES):
        begun = time.perf_counter()
        for unit in units.values():
            for array in unit:
                array.delete()
        segment = jax.block_until_ready(made())
        taken.append(1e3 * (time.perf_counter() - begun))
        segment.delete()
        units = weight_hole.reserve(model.defs.unit, model.mesh, config.droppable_units)
    del full
    return HoleCheck(len(units), weight_bytes, size, free, tuple(taken))


def _fill(device: jax.Device, size: int) -> list[jax.Array]:
    """Take what is free in large pieces, so that nothing of `size` can go there."""
    taken = []
    while (free := _largest_free(device)) >= min(size, _SMALLEST):
        taken.append(jax.block_until_ready(jnp.zeros(free // 2, jnp.uint8, device=device)))
    return taken


def _largest_free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    return int(stats.get("largest_free_block_bytes", 0))
