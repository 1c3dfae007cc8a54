import json
from pathlib import Path

import pytest

from serving import results_file
from serving.results_file import percentiles, row
from tools.bench import results
from tools.bench.record import RequestRecord
from tools.bench.summary import rows_of, table_of
from tools.bench.workload import Task


def record(started, arrivals, ended, output_tokens, error=""):
    return RequestRecord(
        task=Task((1, 2), output_tokens),
        started_at=started,
        arrivals=arrivals,
        output_tokens=output_tokens,
        ended_at=ended,
        error=error,
    )


def test_latencies_of_one_request():
    one = record(10.0, [(10.5, 1), (10.6, 3), (11.0, 1)], 11.1, 5)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.1)
    assert one.tpot_s == pytest.approx(0.5 / 4)
    assert one.itl_s() == pytest.approx([0.1, 0.0, 0.0, 0.4])


def test_a_single_token_has_no_time_per_output_token():
    assert record(0.0, [(0.5, 1)], 0.6, 1).tpot_s is None


def test_a_missed_length_is_an_error():
    one = RequestRecord(Task((1,), 4), 0.0, output_tokens=3)
    one.finish()
    assert one.error == "wrong output length"


def test_rows_leave_out_failures_but_name_them():
    records = [
        record(0.0, [(0.5, 1), (1.0, 1)], 1.0, 2),
        record(0.0, [(1.5, 1), (2.0, 1)], 2.0, 2),
        record(1.0, [], 4.0, 2, error="HTTP 429"),
    ]
    rows = {one["name"]: one for one in rows_of("load", records)}
    assert rows["load, TTFT"]["samples"] == [0.5, 1.5]
    assert rows["load, TTFT"]["median"] == 1.0
    assert rows["load, requests"]["samples"] == [2 / 4.0]
    assert rows["load, output tokens"]["samples"] == [4 / 4.0]
    assert rows["load, errors"]["errors_by_kind"] == {"HTTP 429": 1}


def test_percentiles_interpolate():
    assert percentiles(list(range(101))) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
    assert percentiles([]) == {}


def test_results_file_has_the_agreed_form_and_reads_back(tmp_path):
    rows = [row("a", "s", [1.0, 2.0], peer=3.0), row("b", "1/s", [])]
    content = results.results(rows, {"seed": 0}, {"torch": "2"})
    path = tmp_path / "deep" / "r.json"
    results_file.write(path, content)
    again = json.loads(path.read_text())
    assert again == content
    assert {"commit", "command", "hardware", "date", "versions", "rows"} <= set(again)
    assert again["rows"][0]["median"] == 1.5
    assert again["versions"]["torch"] == "2"
    assert table_of("title", rows).row_count == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_what_a_full_disk_does_not_take_is_printed(tmp_path, capsys):
    content = results.results([row("a", "ms", [1.5])], {}, {})
    table = tmp_path / "table.md"
    with pytest.raises(SystemExit, match=r"/dev/full cannot be written .* stands above instead"):
        results.publish(content, None, "| a | 1.5 |", "No bars.", ("/dev/full", str(table)))
    out = capsys.readouterr().out
    assert json.loads(out[: out.rindex("}") + 1])["rows"][0]["samples"] == [1.5]
    assert "| a | 1.5 |" in table.read_text()
