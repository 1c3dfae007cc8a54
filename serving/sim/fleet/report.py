"""What a fleet run came to, as rows of a results file and as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from serving.results_file import PERCENTILES, Row, percentiles, row
from serving.sim.fleet.records import GapHistogram
from serving.sim.fleet.run import FleetResult
from serving.sim.workload.requests import ServiceClass, Workload

_SHOWN = (50, 95, 99)  # percentiles


def rows_of(result: FleetResult, workload: Workload) -> list[Row]:
    """All figures of a run, times in virtual seconds.

    Requests that got nothing are in none of the latencies; they are counted at the end.
    """
    rows = []
    services = list(dict.fromkeys(request.service for request in workload.requests))
    rows += _latencies("all", result, np.ones(len(workload.requests), np.bool_))
    if len(services) > 1 or services[0].ttft_s is not None or services[0].tpot_s is not None:
        for service in services:
            mine = np.array([request.service is service for request in workload.requests])
            rows += _latencies(service.name, result, mine)
            rows += _kept_promises(service, result, mine)
    rows.append(_gap_row(result.gaps))
    times = result.times
    done = ~np.isnan(times.finished)
    rows.append(row("requests finished", "1/s", [done.sum() / result.seconds]))
    rows.append(row("output tokens", "1/s", [times.tokens.sum() / result.seconds]))
    means = [sample.kv_mean for sample in result.samples]
    rows.append(row("KV use", "share", means, percentiles=percentiles(means)))
    most = [sample.kv_most for sample in result.samples]
    rows.append(row("KV use, fullest replica", "share", most, largest=max(most)))
    rows.append(row("running", "requests", [sample.running for sample in result.samples]))
    rows.append(row("waiting", "requests", [sample.waiting for sample in result.samples]))
    rows.append(row("preemptions", "", [int(times.preempted.sum())]))
    rows.append(row("prompt tokens found in the prefix cache", "tokens", [int(times.cached.sum())]))
    ends = {finish.value: count for finish, count in sorted(times.ends.items(), key=str)}
    rows.append(row("requests not finished", "", [(~done).sum()], ends=ends))
    rows.append(row("clients sent away, each time", "", [times.refused]))
    rows.append(row("virtual time", "s", [result.seconds]))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows for a terminal: percentiles where there are any, else the one figure or the mean."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in (*(f"P{percent}" for percent in _SHOWN), "mean", "unit"):
        table.add_column(name, justify="right" if name != "unit" else "left")
    for one in rows:
        scale, unit = (
            (1e3, "ms") if one["unit"] == "s" and "percentiles" in one else (1.0, one["unit"])
        )
        found = one.get("percentiles", {})
        cells = [_short(found.get(f"p{percent}"), scale) for percent in _SHOWN]
        mean = float(np.mean(one["samples"])) if one["samples"] else None
        table.add_row(one["name"], *cells, _short(mean, scale), unit)
    return table


def _latencies(name: str, result: FleetResult, mine: Any) -> list[Row]:
    spans = {"TTFT": result.times.ttft(mine), "TPOT": result.times.tpot(mine)}
    return [
        row(f"{name}, {what}", "s", samples, percentiles=percentiles(samples))
        for what, samples in spans.items()
    ]


def _kept_promises(service: ServiceClass, result: FleetResult, mine: Any) -> list[Row]:
    """The share of a class's requests that took no longer than promised, in each respect."""
    times = result.times
    rows = []
    if service.ttft_s is not None:
        kept = mine & (times.first - times.arrived <= service.ttft_s)
        rows.append(row(f"{service.name}, TTFT as promised", "share", [kept.sum() / mine.sum()]))
    if service.tpot_s is not None:
        further = np.maximum(times.tokens - 1, 1)
        kept = mine & ((times.finished - times.first) / further <= service.tpot_s)
        rows.append(row(f"{service.name}, TPOT as promised", "share", [kept.sum() / mine.sum()]))
    return rows


def _gap_row(gaps: GapHistogram) -> Row:
    """Too many gaps to keep each: how many there are of which length, to half a percent."""
    found = {f"p{percent}": gaps.percentile(percent) for percent in PERCENTILES}
    counts = gaps.listed()
    return row("all, ITL", "s", [], percentiles=found, median=found["p50"], counts=counts)


def _short(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:,.4g}"
