"""What a fleet run came to, as rows of a results file (design, section 7) and as a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from serving.sim.fleet_records import GapHistogram
from serving.sim.fleet_run import FleetResult
from serving.sim.workload.requests import ServiceClass, Workload

type Row = dict[str, Any]

PERCENTILES = (50, 95, 99)


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
    rows.append(_row("requests finished", "1/s", [done.sum() / result.seconds]))
    rows.append(_row("output tokens", "1/s", [times.tokens.sum() / result.seconds]))
    means = [sample.kv_mean for sample in result.samples]
    rows.append({**_row("KV use", "share", means), "percentiles": _percentiles(means)})
    most = [sample.kv_most for sample in result.samples]
    rows.append({**_row("KV use, fullest replica", "share", most), "largest": max(most)})
    rows.append(_row("running", "requests", [sample.running for sample in result.samples]))
    rows.append(_row("waiting", "requests", [sample.waiting for sample in result.samples]))
    rows.append(_row("preemptions", "", [times.preempted.sum()]))
    rows.append(_row("prompt tokens found in the prefix cache", "tokens", [times.cached.sum()]))
    ends = {finish.value: count for finish, count in sorted(times.ends.items(), key=str)}
    rows.append({**_row("requests not finished", "", [(~done).sum()]), "ends": ends})
    rows.append(_row("clients sent away, each time", "", [times.refused]))
    rows.append(_row("virtual time", "s", [result.seconds]))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows for a terminal: percentiles where there are any, else the one figure or the mean."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("P50", "P95", "P99", "mean", "unit"):
        table.add_column(name, justify="right" if name != "unit" else "left")
    for row in rows:
        scale, unit = (
            (1e3, "ms") if row["unit"] == "s" and "percentiles" in row else (1.0, row["unit"])
        )
        percentiles = row.get("percentiles", {})
        cells = [_short(percentiles.get(str(percent)), scale) for percent in PERCENTILES]
        mean = float(np.mean(row["samples"])) if row["samples"] else row.get("mean")
        table.add_row(row["name"], *cells, _short(mean, scale), unit)
    return table


def _latencies(name: str, result: FleetResult, mine: Any) -> list[Row]:
    spans = {"TTFT": result.times.ttft(mine), "TPOT": result.times.tpot(mine)}
    return [
        {**_row(f"{name}, {what}", "s", samples), "percentiles": _percentiles(samples)}
        for what, samples in spans.items()
    ]


def _kept_promises(service: ServiceClass, result: FleetResult, mine: Any) -> list[Row]:
    """The share of a class's requests that took no longer than promised, in each respect."""
    times = result.times
    rows = []
    if service.ttft_s is not None:
        kept = mine & (times.first - times.arrived <= service.ttft_s)
        rows.append(_row(f"{service.name}, TTFT as promised", "share", [kept.sum() / mine.sum()]))
    if service.tpot_s is not None:
        further = np.maximum(times.tokens - 1, 1)
        kept = mine & ((times.finished - times.first) / further <= service.tpot_s)
        rows.append(_row(f"{service.name}, TPOT as promised", "share", [kept.sum() / mine.sum()]))
    return rows


def _gap_row(gaps: GapHistogram) -> Row:
    """Too many gaps to keep each: how many there are of which length, to half a percent."""
    percentiles = {str(percent): gaps.percentile(percent) for percent in PERCENTILES}
    row = {**_row("all, ITL", "s", []), "percentiles": percentiles, "median": percentiles["50"]}
    return {**row, "counts": gaps.listed()}


def _row(name: str, unit: str, samples: Any) -> Row:
    listed = [float(f"{sample:.6g}") for sample in samples]
    return {
        "name": name,
        "unit": unit,
        "samples": listed,
        "median": float(f"{np.median(listed):.6g}") if listed else None,
        "peer": None,
        "peer_source": None,
        "floor": None,
    }


def _percentiles(samples: Any) -> dict[str, float | None]:
    if not len(samples):
        return {str(percent): None for percent in PERCENTILES}
    found = np.percentile(samples, PERCENTILES).tolist()
    return {str(p): float(f"{x:.6g}") for p, x in zip(PERCENTILES, found, strict=True)}


def _short(value: float | None, scale: float) -> str:
    return "" if value is None else f"{value * scale:,.4g}"
