from itertools import repeat

import numpy as np
import pytest

from serving.sim.workload.requests import BATCH, INTERACTIVE, Workload, WorkloadRequest
from serving.sim.workload.table import RequestTable

ROWS = (
    WorkloadRequest(0.0, 5, 6, BATCH, "a", (1, 2)),
    WorkloadRequest(0.5, 7, 8, INTERACTIVE, "b"),
    WorkloadRequest(2.5, 9, 1, BATCH, "a", (1,)),
)


def test_a_table_is_the_sequence_it_was_made_of():
    table = RequestTable.of(ROWS)
    assert len(table) == 3
    assert (table[0], table[-1]) == (ROWS[0], ROWS[2])
    assert tuple(table) == ROWS == tuple(table[place] for place in range(3))
    assert tuple(table[1:]) == ROWS[1:]
    assert table == ROWS
    assert table != ROWS[:2]
    assert table != (*ROWS[:2], ROWS[0])
    assert RequestTable.of(table) is table
    assert type(table[0].prompt) is int
    with pytest.raises(IndexError):
        table[3]


def test_more_requests_than_are_made_at_a_time():
    count = 10_000
    table = RequestTable.plain(np.arange(count) / 8, np.arange(1, count + 1), np.full(count, 3))
    rows = list(table)
    assert rows[4096] == table[4096] == WorkloadRequest(512.0, 4097, 3)
    assert [row.prompt for row in rows] == list(range(1, count + 1))


def test_rows_are_picked_by_place_truth_or_slice():
    table = RequestTable.of(ROWS)
    for which in (np.array([2, 0]), np.array([True, False, True]), slice(0, None, 2)):
        picked = {row.at_s: row for row in table.rows(which)}
        assert picked == {0.0: ROWS[0], 2.5: ROWS[2]}
    assert tuple(table.rows(np.array([2, 0]))) == (ROWS[2], ROWS[0])


def test_joined_tables_keep_their_classes_tenants_and_prefixes():
    plain = RequestTable.plain([1.0], [2], [3])
    joined = RequestTable.joined([plain, RequestTable.of(ROWS), plain])
    one = WorkloadRequest(1.0, 2, 3)
    assert joined == (one, *ROWS, one)
    assert RequestTable.joined([plain, plain]).prefix == ()
    assert RequestTable.joined([]) == ()


def test_columns_cannot_be_written():
    table = RequestTable.of(ROWS)
    with pytest.raises(ValueError, match="read-only"):
        table.prompt[0] = 1


def test_the_rate_of_a_workload():
    assert Workload("w", 2.0, ROWS).rate == 1.5
    assert Workload("w", 0.0, ROWS).rate == float("inf")
    assert Workload("w", 0.0, ()).rate == 0.0
    assert Workload("w", 1.0, ROWS) == Workload("w", 1.0, RequestTable.of(list(ROWS)))
    assert Workload("w", 1.0, ROWS) != Workload("w", 1.0, tuple(repeat(ROWS[0], 3)))
