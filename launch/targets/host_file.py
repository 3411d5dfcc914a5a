"""The file that says on which machines a job runs.

One machine a line, in the order of the processes' numbers; `#` begins a comment:

    gpu1 slots=4                     four processes
    alice@gpu2:2222 slots=2          another user and port
    [fe80::2]:22 address=10.0.0.2    the other machines know it by another name than ssh does
    gpu3 dir=/data/pgdist            the code lies elsewhere there
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from pgdist.errors import ConfigError

_KEYS = ("slots", "address", "dir")

# ssh would take a name that begins with a dash for an option.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_MACHINE = re.compile(
    rf"(?:(?P<user>{_NAME})@)?(?:\[(?P<ip6>[0-9A-Fa-f:]+(?:%\w+)?)\]|(?P<name>{_NAME}))(?::(?P<port>\d+))?"
)
_ADDRESS = re.compile(rf"{_NAME}|[0-9A-Fa-f:]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """One machine of a job.

    name: what ssh connects to, an address or an alias of ~/.ssh/config.  user: "" for ssh's choice.  port: 0
    for ssh's choice.  slots: processes on it.  address: "", or what the other machines reach it by.
    directory: "", or where the code lies there, if not where it lies on all.
    """

    name: str
    user: str = ""
    port: int = 0
    slots: int = 1
    address: str = ""
    directory: str = ""

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{self.user}@" * bool(self.user) + name + f":{self.port}" * bool(self.port)

    def is_loopback(self) -> bool:
        """Whether the name means "this machine" wherever it is looked up."""
        try:
            return ipaddress.ip_address(self.name).is_loopback
        except ValueError:
            return self.name == "localhost"


def read_host_file(path: str) -> list[Host]:
    """The machines in their order, at least one.

    Raises ConfigError, with the line, for whatever it does not understand and for a machine named twice.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the host file {path}: {reason}") from error
    hosts: list[Host] = []
    lines: dict[tuple[str, int], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path} line {number}"
        words = _split(line, where)
        if not words:
            continue
        host = _read_host(words, where)
        machine = (host.name, host.port)
        if machine in lines:
            raise ConfigError(
                f"{where}: {host.name} stands in line {lines[machine]} already; for several processes on one "
                f"machine write slots=N"
            )
        lines[machine] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"{path} names no host; write one a line, such as: gpu1 slots=4")
    return hosts


def _split(line: str, where: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)  # quotes, for a directory with spaces
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).lower()}") from error  # a quote that is not closed


def _read_host(words: Sequence[str], where: str) -> Host:
    machine = _MACHINE.fullmatch(words[0])
    if not machine:
        raise ConfigError(
            f"{where}: expected a machine, such as gpu1, alice@gpu1:2222 or [fe80::1]:22, found {words[0]!r}"
        )
    port = int(machine["port"] or 0)
    if machine["port"] and not 0 < port < 2**16:
        raise ConfigError(f"{where}: expected a port from 1 to 65535, found {machine['port']}")
    values = _read_keys(words[1:], where)
    if "address" in values and not _ADDRESS.fullmatch(values["address"]):
        raise ConfigError(f"{where}: expected address=NAME or address=IP, found {values['address']!r}")
    return Host(
        name=machine["ip6"] or machine["name"],
        user=machine["user"] or "",
        port=port,
        slots=_read_slots(values.get("slots", "1"), where),
        address=values.get("address", ""),
        directory=values.get("dir", ""),
    )


def _read_keys(words: Sequence[str], where: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in _KEYS:
            expected = ", ".join(f"{known}=..." for known in _KEYS)
            raise ConfigError(f"{where}: after the machine expected {expected}; found {word!r}")
        if key in values:
            raise ConfigError(f"{where}: {key}= is given twice")
        if not value:
            raise ConfigError(f"{where}: {key}= has no value")
        values[key] = value
    return values


def _read_slots(text: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise ConfigError(f"{where}: expected slots=N, processes on this machine, at least 1; found {text!r}")
    return int(text)
