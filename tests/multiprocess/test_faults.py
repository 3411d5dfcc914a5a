"""What `tools/bench/faults.py` does to a job of four processes, with what must come of it.

All of it is a quarter of an hour on two cores, so of the four processes the first and the last are enough here.
"""

from __future__ import annotations

import re

import pytest

from tools.bench.faults import EVERY, FAULTS, measure

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(400)]

SECONDS_TO_DETECT = 10
CHOSEN = [fault for fault in FAULTS if not re.search("process [12]$|STOP of process 3", fault.name)]


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_is_seen_and_survived_and_leaves_nothing_behind(fault, tmp_path):
    row = measure(fault, tmp_path)

    assert row["orphans"] == 0
    assert row["verdict"] in {abs(code) + 128 if code < 0 else code for code in fault.expected}
    if fault.restarts:
        assert row["detection"] < SECONDS_TO_DETECT
        assert 0 <= row["steps_lost"] <= 2 * EVERY  # one checkpoint may still have been on its way
