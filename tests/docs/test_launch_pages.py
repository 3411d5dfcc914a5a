"""The pages on launching: every command with --dry_run is run, and what the page shows of its output is its output."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.goldens import check_golden
from tests.tiny_runs import ROOT

PAGES = sorted((ROOT / "docs/launch").glob("*.md"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A command of a page as it would be typed, and the lines below it, up to an empty one."""

    name: str
    command: str
    output: tuple[str, ...]


def shown_on(page: Path) -> list[Shown]:
    blocks = re.findall(r"^    \$ ((?:.*\\\n)*.*)\n((?:    (?!\$ ).+\n)*)", page.read_text(), re.MULTILINE)
    return [
        Shown(
            name=f"page_{page.stem}_{number}.txt",
            command=command.replace("\\\n", " "),
            output=tuple(line.removeprefix("    ") for line in output.splitlines()),
        )
        for number, (command, output) in enumerate(blocks)
    ]


DRY_RUNS = [shown for page in PAGES for shown in shown_on(page) if "--dry_run" in shown.command]


def test_the_page_of_every_target_shows_a_dry_run():
    for target in (ROOT / "launch/targets").glob("*.py"):
        if "def dry_run(" in target.read_text() and target.stem != "__init__":
            assert any(f"--to={target.stem} " in shown.command for shown in DRY_RUNS), target.stem


@pytest.mark.parametrize("shown", DRY_RUNS, ids=lambda shown: shown.name)
def test_a_dry_run_of_a_page_prints_what_it_did_when_the_page_was_written(shown, tmp_path):
    for page in PAGES:
        for other in shown_on(page):  # files that a page shows by `cat`
            if match := re.fullmatch(r"cat (\S+)", other.command):
                (tmp_path / match[1]).write_text("\n".join(other.output) + "\n")
    words = shlex.split(shown.command)
    assert words[:2] == ["python", "-m"]

    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    output = done.stdout.replace(str(tmp_path), "/home/me/pgdist").replace(sys.executable, "python")
    check_golden(shown.name, output)
    lines = iter(output.splitlines())
    for line in shown.output:  # in their order; ... stands for any
        assert line == "..." or line in lines, line
