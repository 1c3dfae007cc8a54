"""From measurements to rows of a results file and to a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.results_file import Row, row
from tools.bench.kernels.case import Case, Measurement
from tools.bench.kernels.ceilings import Ceilings
from tools.bench.summary import verdict

_US = 1e6
_TERA = 1e-12
MEASURED = "measured"
_HOST_BOUND = 1.5  # launches closer than this to empty ones measure the host

_HEAD = ("what", "us", "TB/s", "TFLOP/s", "of ceiling", "peer", "floor", "aim", "verdict", "note")


def measured_row(case: Case, found: Measurement, ceilings: Ceilings | None) -> Row:
    """A row in the unit of the case's bar, with time and both rates whatever that unit is.

    of_ceiling: of the copy's bandwidth or of the matmul's rate, whichever this work comes closer
    to. verdict: against aim and floor, empty without a floor.
    """
    bar, work = case.bar, case.work
    second = float(np.median(found.samples_s))
    peer_samples = [_in_unit(case, s) for s in found.peer_samples_s]
    peer = float(np.median(peer_samples)) if peer_samples else bar.peer
    shares = []
    if ceilings:
        shares = [work.bytes / second / ceilings.bytes_s, work.flops / second / ceilings.flops_s]
    one = row(
        case.name,
        bar.unit,
        [_in_unit(case, sample) for sample in found.samples_s],
        peer=_rounded(peer),
        peer_source=bar.peer_source,
        floor=_rounded(bar.floor),
        aim=_rounded(bar.aim),
        us=_rounded(second * _US),
        tb_s=_rounded(work.bytes / second * _TERA) if work.bytes else None,
        tflop_s=_rounded(work.flops / second * _TERA) if work.flops else None,
        of_ceiling=_rounded(max(shares)) if shares else None,
        status=MEASURED,
        note="; ".join(_notes(case, found, second, ceilings)),
    )
    if peer_samples:
        one["peer_samples"] = [_rounded(sample) for sample in peer_samples]
    return {**one, "verdict": verdict(one)}


def _notes(case: Case, found: Measurement, second: float, ceilings: Ceilings | None) -> list[str]:
    notes = [found.note] if found.note else []
    if ceilings and case.work.bytes:
        launch_s = second * sum(program.calls for program in case.programs[:1])
        if launch_s < _HOST_BOUND * ceilings.launch_s:
            notes.append("bound by the host's launches")
    return notes


def other_row(case: Case, status: str) -> Row:
    """A row without figures; `status` says why."""
    return row(case.name, case.bar.unit, [], status=status, note="", verdict="")


def _in_unit(case: Case, seconds: float) -> float:
    match case.bar.unit:
        case "us":
            return seconds * _US
        case "TB/s":
            return case.work.bytes / seconds * _TERA
        case "TFLOP/s":
            return case.work.flops / seconds * _TERA
    raise AssertionError(f"no such unit: {case.bar.unit}")


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def markdown(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table; peer, floor and aim are in the row's own unit."""
    lines = [" | ".join(_HEAD), " | ".join("---" for _ in _HEAD)]
    lines += [" | ".join(_cells(one)) for one in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _cells(one: Row) -> list[str]:
    if one["status"] != MEASURED:
        return [one["name"], *[""] * (len(_HEAD) - 2), one["status"]]

    def bound(name: str) -> str:
        return "" if one[name] is None else f"{one[name]:.4g} {one['unit']}"

    return [
        one["name"],
        _number(one["us"], ".4g"),
        _number(one["tb_s"], ".2f"),
        _number(one["tflop_s"], ".1f"),
        _number(one["of_ceiling"], ".0%"),
        *(bound(name) for name in ("peer", "floor", "aim")),
        one["verdict"],
        one["note"],
    ]


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
