"""The facts that go with the figures of a tool, and where both are written."""

import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving import results_file
from serving.results_file import Row

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grpcio", "aiohttp", "lumen-jax")


def results(
    rows: Sequence[Row], settings: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    """A results file: where, when, with what, and the rows. versions: of the peer, if any."""
    return results_file.content(
        rows,
        settings,
        command=shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        hardware=hardware(),
        packages=_PACKAGES,
        versions=versions,
    )


def publish(
    content: dict[str, Any], device: object, table: str, bars: str, to: tuple[str, str]
) -> None:
    """Write a results file and its table under a line that says where and when.

    device: what computed, as it is called; None: the machine itself. bars: what peer, floor and
    aim are of. to: paths of the JSON file and of the table; where one is empty the first is not
    written, and the second printed. What cannot be written is printed, and ends the program.
    """
    json_path, table_path = to
    if device is not None:
        content["hardware"] = f"{device}; {content['hardware']}"
    text = f"{content['hardware']}, {content['date']}. {bars}\n\n{table}"
    if not table_path:
        print(f"\n{text}")
    lost = []
    for path, written in ((json_path, results_file.text(content)), (table_path, text)):
        if not path:
            continue
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(written, encoding="utf-8")
        except OSError as error:  # a full disk: what took minutes to measure goes where it can
            print(written)
            lost.append(f"{path} cannot be written ({error.strerror}); it stands above instead.")
        else:
            print(f"Wrote {path}")
    if lost:
        sys.exit("\n".join(lost))


def check_writable(*paths: str) -> None:
    """Raise ValueError if one of these files cannot be written; empty names are none."""
    for path in filter(None, paths):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with Path(path).open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def hardware() -> str:
    """The machine in words: processor, cores this process may use, memory."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
