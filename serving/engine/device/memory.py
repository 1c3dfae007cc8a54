"""How much memory the devices of a replica have."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of the scarcest device of a replica, in bytes.

    shared_with_host: the device computes in the host's memory, of which every device of the
    replica takes its part.
    """

    name: str
    total_bytes: int
    free_bytes: int
    shared_with_host: bool


def device_memory(devices: Sequence[jax.Device]) -> DeviceMemory | None:
    """What the devices of a replica have now; None if an accelerator does not say."""
    if devices[0].platform == "cpu":
        total, free = _host_memory()
        return DeviceMemory("the host", total, free // len(devices), shared_with_host=True)
    found = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        limit = stats["bytes_limit"]
        found.append(DeviceMemory(str(device), limit, limit - stats["bytes_in_use"], False))
    return min(found, key=lambda memory: memory.free_bytes)


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes that this process may use, as far as the system says."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = os.sysconf("SC_PHYS_PAGES") * page
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        free = min(free, int(text) - int(used.read_text()))
    return total, free
