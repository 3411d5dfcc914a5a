"""What the health check says of processes that are not alike."""

from __future__ import annotations

from pgdist import health
from pgdist.config import default_config
from pgdist.health import Report, differences


def report(host: str, *, time: float = 1000.0, **facts: str) -> Report:
    return Report(host=host, time=time, facts=facts)


def test_processes_that_are_alike_have_no_differences():
    assert differences([report("n1", python="3.11"), report("n2", python="3.11", time=1000.5)]) == []


def test_a_difference_names_process_host_and_both_values():
    reports = [report("n1", **{"library jax": "0.12"}), report("n1", **{"library jax": "0.12"}), report("n2")]
    assert differences(reports) == [
        "  process 2 (host n2): library jax is absent, but 0.12 in process 0 (host n1)"
    ]


def test_processes_with_the_same_difference_share_a_line():
    reports = [report("n0", a="1")] + [report(f"n{number}", a="2") for number in range(1, 8)]
    assert differences(reports) == [
        "  processes 1, 2, 3, 4, 5, 6 and 7 (hosts n1, n2, n3, ...): a is 2, but 1 in process 0 (host n0)"
    ]


def test_a_clock_that_is_off_is_named_in_both_directions():
    reports = [report("a"), report("b", time=1009.9), report("c", time=1061.0), report("d", time=900.0)]
    assert differences(reports) == [
        "  process 2 (host c): clock is 61 s ahead of process 0 (host a), more than 10 s",
        "  process 3 (host d): clock is 100 s behind process 0 (host a), more than 10 s",
    ]


def test_a_hundred_differences_are_cut():
    facts = {f"code {number:03d}.py": "a" for number in range(100)}
    other = dict.fromkeys(facts, "b")
    lines = differences([report("n1", **facts), report("n2", **other)])
    assert len(lines) == 13 and lines[-1] == "  and 88 more differences"


def test_one_process_is_checked_on_its_own():
    lines = health.check(default_config())
    assert any(line.startswith("sum over all devices: 36, as expected") for line in lines)
