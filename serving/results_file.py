"""The form of a results file (docs/results/NAME.json): where, when, with what, and the rows."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

type Row = dict[str, Any]
type Samples = Sequence[float] | npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)


def content(
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    *,
    command: str,
    hardware: str,
    packages: Sequence[str],
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A results file of this moment.

    packages: distributions whose versions matter; versions: of whatever is not installed here.
    """
    return {
        "commit": _commit(),
        "command": command,
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
            **(versions or {}),
        },
        "settings": dict(settings),
        "rows": list(rows),
    }


def row(name: str, unit: str, samples: Samples, **more: Any) -> Row:
    """One row of a results file; `samples` are raw."""
    return {
        "name": name,
        "unit": unit,
        "samples": [float(f"{sample:.6g}") for sample in samples],
        "median": float(f"{np.median(samples):.6g}") if len(samples) else None,
        "peer": None,
        "peer_source": None,
        "floor": None,
        **more,
    }


def percentiles(samples: Samples) -> dict[str, float]:
    """p50 to p99 by linear interpolation; empty for no samples."""
    if not len(samples):
        return {}
    values = np.percentile(np.asarray(samples), PERCENTILES)
    return {f"p{p}": float(f"{v:.6g}") for p, v in zip(PERCENTILES, values, strict=True)}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Store as `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(content), encoding="utf-8")


def text(content: Mapping[str, Any]) -> str:
    """Readable JSON, a row's samples on one line each."""
    rows = ",\n    ".join(json.dumps(one, ensure_ascii=False) for one in content["rows"])
    head = {key: value for key, value in content.items() if key != "rows"}
    start = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{start},\n  "rows": [\n    {rows}\n  ]\n}}\n'


def _commit() -> str:
    root = Path(__file__).parents[1]
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
