"""From samples to rows of a results file and to a table."""

from collections.abc import Sequence
from typing import Any

from serving.results_file import Row, row
from tools.bench.engine.bars import NONE, SOURCE, Bar
from tools.bench.engine.profile import KernelTime
from tools.bench.summary import TIMES, verdict

MEASURED = "measured"
_HEAD = ("what", "median", "unit", "vLLM", "speed", "floor", "aim", "verdict", "note")


def measured(
    name: str, unit: str, samples: Sequence[float], bar: Bar = NONE, note: str = "", **more: Any
) -> Row:
    """A row with figures. speed: over the peer, more than 1 is faster; verdict: against aim and
    floor, empty without a floor."""
    return with_bar(row(name, unit, samples, status=MEASURED, note=note, **more), bar)


def with_bar(one: Row, bar: Bar) -> Row:
    """A row with figures, beside another bar."""
    one = {
        **one,
        "peer": _rounded(bar.peer),
        "peer_source": SOURCE if bar.peer is not None else None,
        "floor": _rounded(bar.floor),
        "aim": _rounded(bar.aim),
    }
    speed = None
    if bar.peer is not None:
        speed = one["median"] / bar.peer
        speed = 1 / speed if one["unit"] in TIMES else speed
    return {**one, "speed": _rounded(speed), "verdict": verdict(one)}


def not_measured(name: str, unit: str, status: str) -> Row:
    """A row without figures; `status` says why."""
    return row(name, unit, [], aim=None, status=status, note="", speed=None, verdict="")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def line(one: Row) -> str:
    """A row for the log."""
    if one["status"] != MEASURED:
        return f"{one['name']}: {one['status']}"
    samples = ", ".join(f"{sample:.4g}" for sample in one["samples"])
    parts = [f"{one['name']}: {one['median']:.4g} {one['unit']} ({samples})"]
    if one["speed"] is not None:
        parts.append(f"{one['speed']:.2f}x vLLM's speed")
    return "  ".join(part for part in (*parts, one["verdict"], one["note"]) if part)


def markdown(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, and the kernels of the profiled steps under it."""
    lines = [" | ".join(_HEAD), " | ".join("---" for _ in _HEAD)]
    lines += [" | ".join(_cells(one)) for one in rows]
    text = "".join(f"| {line} |\n" for line in lines)
    for one in rows:
        if one.get("kernels"):
            text += f"\n{one['name']}, by kernel:\n\n{_kernels(one['kernels'])}"
    return text


def kernel_rows(kernels: Sequence[KernelTime], most: int) -> list[dict[str, Any]]:
    """The first kernels as a results file has them."""
    return [
        {"name": one.name, "launches": round(one.launches, 2), "us": round(one.us, 2)}
        for one in kernels[:most]
    ]


def _kernels(kernels: Sequence[dict[str, Any]]) -> str:
    lines = ["us per step | launches | kernel", "--- | --- | ---"]
    lines += [f"{one['us']:.1f} | {one['launches']:.1f} | `{one['name']}`" for one in kernels]
    return "".join(f"| {line} |\n" for line in lines)


def _cells(one: Row) -> list[str]:
    if one["status"] != MEASURED:
        return [one["name"], "", one["unit"], *[""] * (len(_HEAD) - 4), one["status"]]
    return [
        one["name"],
        _number(one["median"]),
        one["unit"],
        _number(one["peer"]),
        "" if one["speed"] is None else f"{one['speed']:.2f}x",
        _number(one["floor"]),
        _number(one["aim"]),
        one["verdict"],
        one["note"],
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
