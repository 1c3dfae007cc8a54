"""From records to rows and to a table."""

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from serving.results_file import PERCENTILES, Row, percentiles, row
from tools.bench.record import RequestRecord

TIMES = frozenset({"us", "ms", "s"})
"""Units of which less is more."""


def rows_of(name: str, records: Sequence[RequestRecord]) -> list[Row]:
    """Latency and throughput rows of one load; `name` says which, and starts each row's name.

    Latencies are those of requests without an error; tokens and requests of failed ones are in
    no throughput.
    """
    good = [record for record in records if not record.error]
    latencies = {
        "TTFT": [record.ttft_s for record in good if record.arrivals],
        "ITL": [gap for record in good if record.arrivals for gap in record.itl_s()],
        "TPOT": [t for record in good if record.arrivals and (t := record.tpot_s) is not None],
        "end to end": [record.e2e_s for record in good],
    }
    rows = [
        {**row(f"{name}, {what}", "s", samples), "percentiles": percentiles(samples)}
        for what, samples in latencies.items()
    ]
    elapsed = elapsed_s(records)
    rows.append(row(f"{name}, requests", "1/s", [len(good) / elapsed]))
    tokens = sum(record.output_tokens for record in good)
    rows.append(row(f"{name}, output tokens", "1/s", [tokens / elapsed]))
    errors = Counter(record.error for record in records if record.error)
    rows.append(
        {**row(f"{name}, errors", "requests", [errors.total()]), "errors_by_kind": dict(errors)}
    )
    return rows


def verdict(one: Row) -> str:
    """ "aim", "floor" or "below floor" for a row with a median, floor and aim; "" without a floor.

    Of times less is more, of everything else more.
    """

    def reaches(bound: float) -> bool:
        found: float = one["median"]
        return found <= bound if one["unit"] in TIMES else found >= bound

    if one["floor"] is None:
        return ""
    if not reaches(one["floor"]):
        return "below floor"
    return "aim" if one["aim"] is not None and reaches(one["aim"]) else "floor"


def streams_name(count: int) -> str:
    """How a load of so many streams is called in rows."""
    return "1 stream" if count == 1 else f"{count} streams"


def elapsed_s(records: Sequence[RequestRecord]) -> float:
    """From the first start to the last end."""
    return max(record.ended_at for record in records) - min(r.started_at for r in records)


def table_of(title: str, rows: Sequence[Row]) -> Table:
    """All rows for a person: percentiles where there are many samples, else median and peer."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for column in ("median", *(f"p{p}" for p in PERCENTILES[1:]), "peer", "floor", "unit"):
        table.add_column(column, justify="right" if column != "unit" else "left")
    for one in rows:
        shares = one.get("percentiles", {})
        cells = [one["median"], *(shares.get(f"p{p}") for p in PERCENTILES[1:])]
        cells += [one["peer"], one["floor"]]
        kinds = ", ".join(f"{n} {kind}" for kind, n in one.get("errors_by_kind", {}).items())
        table.add_row(one["name"], *map(_cell, cells), kinds or one["unit"])
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
