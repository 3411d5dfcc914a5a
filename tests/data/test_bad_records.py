"""The list of bad records, and when they are too many to go on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgdist.data.bad_records import BadRecordLog, BadShare, refuse_bad_share
from pgdist.data.jsonl import BadRecord
from pgdist.data.order import ExampleOrder
from pgdist.errors import DataError


def bad(line: int, reason: str = "broken") -> BadRecord:
    return BadRecord(file="/data/a.jsonl", line=line, reason=reason)


def test_the_log_has_each_distinct_bad_record_once_also_after_a_restart(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    log = BadRecordLog(path)
    assert not path.exists()
    assert log.add([bad(1), bad(2), bad(1)]) == [bad(1), bad(2)]
    assert log.add([bad(2), bad(3, "café \ud800 \n")]) == [bad(3, "café \ud800 \n")]
    again = BadRecordLog(path)
    assert again.add([bad(1), bad(3, "café \ud800 \n"), bad(4)]) == [bad(4)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"file": "/data/a.jsonl", "line": 1, "reason": "broken"}
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    assert "café" in path.read_text()


def test_a_line_of_the_log_that_a_crash_has_torn_is_left_alone(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    BadRecordLog(path).add([bad(1)])
    with path.open("a") as file:
        file.write('{"file": "/data/a.js')
    log = BadRecordLog(path)
    log.add([bad(1), bad(2)])
    assert BadRecordLog(path).add([bad(1), bad(2)]) == []


def test_too_many_bad_records_are_an_error_that_names_the_first():
    records = [bad(line) for line in range(20, 0, -1)]
    refuse_bad_share(records, num_examples=2000, max_share=0.01)
    with pytest.raises(DataError) as error:
        refuse_bad_share(records, num_examples=1999, max_share=0.01)
    assert "20 of 1999 examples are bad, more than the share of 0.01" in str(error.value)
    assert "/data/a.jsonl, line 1: broken" in str(error.value) and "and 15 more" in str(error.value)
    assert error.value.exit_code == 3


def test_no_bad_record_is_allowed_at_a_share_of_0():
    refuse_bad_share([], num_examples=10, max_share=0.0)
    with pytest.raises(DataError):
        refuse_bad_share([bad(1)], num_examples=10, max_share=0.0)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    bad_ids=st.sets(st.integers(0, 149), max_size=5),
    seed=st.integers(0, 100),
    batch_size=st.integers(1, 16),
    start=st.integers(0, 30),
)
def test_a_share_that_is_allowed_never_stops_a_small_data_set(n, bad_ids, seed, batch_size, start):
    order = ExampleOrder(n, seed)
    bad_ids = {i for i in bad_ids if i < n}
    share = BadShare(num_examples=n, max_share=len(bad_ids) / n, first_row=start * batch_size)
    for step in range(start, start + 20):
        masked = sum(int(i) in bad_ids for i in order.ids(step, batch_size))
        share.add(masked_rows=masked, rows=batch_size)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_share_is_compared_without_rounding(percent):
    records = [bad(line) for line in range(percent)]
    refuse_bad_share(records, num_examples=100, max_share=percent / 100)
    share = BadShare(num_examples=100, max_share=percent / 100)
    share.add(masked_rows=3 * percent, rows=300)
    with pytest.raises(DataError):
        share.add(masked_rows=1, rows=0)


def test_one_bad_record_too_many_stops_a_small_data_set_within_an_epoch():
    order = ExampleOrder(200, 3)
    share = BadShare(num_examples=200, max_share=0.01)
    with pytest.raises(DataError, match="3 of .* rows so far are masked") as error:
        for step in range(25):
            share.add(masked_rows=int((order.ids(step, 8) < 3).sum()), rows=8)
    assert error.value.exit_code == 3


def test_a_large_data_set_with_a_wrong_root_is_given_up_early():
    share = BadShare(num_examples=10**7, max_share=0.01)
    for _ in range(12):
        share.add(masked_rows=8, rows=8)
    with pytest.raises(DataError, match="104 of 104 rows"):
        share.add(masked_rows=8, rows=8)


def test_a_large_data_set_is_judged_by_what_it_has_shown():
    share = BadShare(num_examples=10**7, max_share=0.01)
    share.add(masked_rows=900, rows=100_000)
    share.add(masked_rows=100, rows=0)
    with pytest.raises(DataError):
        share.add(masked_rows=1, rows=0)
