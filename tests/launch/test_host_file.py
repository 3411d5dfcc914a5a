"""The file of machines that `submit --to=ssh` reads, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.targets.host_file import Host, read_host_file
from pgdist.errors import ConfigError


def hosts_of(text: str, folder: Path) -> list[Host]:
    (folder / "hosts.txt").write_text(text)
    return read_host_file(str(folder / "hosts.txt"))


def test_a_host_file_gives_machines_in_their_order(tmp_path):
    text = """
    # the rack on the left
    gpu1 slots=4            # first
    alice@gpu2:2222 slots=2 dir='/data/my code'

    [fe80::2]:22 address=10.0.0.2
    """
    assert hosts_of(text, tmp_path) == [
        Host(name="gpu1", slots=4),
        Host(name="gpu2", user="alice", port=2222, slots=2, directory="/data/my code"),
        Host(name="fe80::2", port=22, address="10.0.0.2"),
    ]
    assert [str(host) for host in read_host_file(str(tmp_path / "hosts.txt"))] == [
        "gpu1",
        "alice@gpu2:2222",
        "[fe80::2]:22",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu1\ngpu2 slots=0", r"hosts.txt line 2: expected slots=N, .* at least 1; found '0'"),
        ("gpu1 slots=four", r"line 1: expected slots=N, .* found 'four'"),
        ("gpu1 slots=-1", r"line 1: expected slots=N"),
        ("gpu1 slots=", r"line 1: slots= has no value"),
        ("gpu1 slots=1 slots=2", r"line 1: slots= is given twice"),
        ("gpu1 gpus=4", r"line 1: after the machine expected slots=\.\.\., .*; found 'gpus=4'"),
        ("gpu1 4", r"line 1: .* found '4'"),
        ("gpu1\n\n# again\nbob@gpu1 slots=2", r"line 4: gpu1 stands in line 1 already; .* write slots=N"),
        ("gpu1:99999", r"line 1: expected a port from 1 to 65535, found 99999"),
        ("gpu1:port", r"line 1: expected a machine"),
        ("-oProxyCommand=x", r"line 1: expected a machine, .* found '-oProxyCommand=x'"),
        ("gpu1;reboot", r"line 1: expected a machine"),
        ("gpu1 address=$(reboot)", r"line 1: expected address="),
        ("gpu1 dir='/data", r"line 1: no closing quotation"),
        ("# nothing\n\n", r"hosts.txt names no host; write one a line"),
    ],
)
def test_a_mistake_in_a_host_file_is_told_with_its_line(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        hosts_of(text, tmp_path)


def test_a_host_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the host file .*none.txt: No such file"):
        read_host_file(str(tmp_path / "none.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary: it is not UTF-8"):
        read_host_file(str(tmp_path / "binary"))


def test_one_machine_on_two_ports_is_two(tmp_path):
    assert len(hosts_of("localhost:2201\nlocalhost:2202", tmp_path)) == 2
