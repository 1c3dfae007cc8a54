"""The form of a results file (docs/results/NAME.json) and the facts that go with the figures."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bench.summary import Row

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "grpcio", "aiohttp", "lumen-jax")


def results(
    rows: Sequence[Row], settings: Mapping[str, Any], versions: Mapping[str, str]
) -> dict[str, Any]:
    """A results file: where, when, with what, and the rows. versions: of the peer, if any."""
    return {
        "commit": _commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
            **versions,
        },
        "settings": dict(settings),
        "rows": list(rows),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Store as readable JSON, a row's samples on one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n    ".join(json.dumps(one, ensure_ascii=False) for one in content["rows"])
    head = {key: value for key, value in content.items() if key != "rows"}
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n  "rows": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")


def publish(
    content: dict[str, Any], device: object, table: str, bars: str, to: tuple[str, str]
) -> None:
    """Write a results file and its table under a line that says where and when.

    device: what computed, as it is called; None: the machine itself. bars: what peer, floor and
    aim are of. to: paths of the JSON file and of the table; where one is empty the first is not
    written, and the second printed.
    """
    json_path, table_path = to
    if device is not None:
        content["hardware"] = f"{device}; {content['hardware']}"
    if json_path:
        write(Path(json_path), content)
        print(f"Wrote {json_path}")
    text = f"{content['hardware']}, {content['date']}. {bars}\n\n{table}"
    if table_path:
        Path(table_path).write_text(text, encoding="utf-8")
        print(f"Wrote {table_path}")
    else:
        print(f"\n{text}")


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


def _commit() -> str:
    root = Path(__file__).parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("" if not _git(root, "status", "--porcelain", "-uno") else " with changes")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
