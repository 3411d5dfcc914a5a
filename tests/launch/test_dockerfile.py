"""The Dockerfile, as far as it can be held against the repository without a Docker daemon.

What the image would be built from is copied as COPY copies it, and the RUN steps of the CPU variant are run there with
a fresh virtual environment's Python in the place of the image's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its words, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def context() -> list[str]:
    """The files that .dockerignore lets through, among those that git lists."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    kept = []
    for name in listed:
        ignored = False
        for rule in rules:  # the last rule that matches decides
            pattern = rule.removeprefix("!").removeprefix("**/")
            if fnmatch(name, pattern) or name.startswith(f"{pattern}/") or fnmatch(Path(name).name, pattern):
                ignored = not rule.startswith("!")
        if not ignored and (ROOT / name).exists():
            kept.append(name)
    return kept


def run_steps(stage_end: str = "ENTRYPOINT") -> list[tuple[str, str]]:
    """COPY and RUN of the stage that all variants share, without what needs root."""
    shared = [word for word, _ in instructions()].index(stage_end)
    return [
        step for step in instructions()[:shared] if step[0] in ("COPY", "RUN") and "useradd" not in step[1]
    ]


def copy(words: str, destination: Path) -> None:
    *sources, target = words.split()
    for name in context():
        for source in sources:
            if source == "." or name == source:
                path = destination / (name if source == "." else Path(target) / Path(name).name)
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, path)


def test_everything_that_is_copied_exists_and_is_in_the_context():
    files = context()
    sources = {
        source
        for word, rest in instructions()
        if word == "COPY"
        for source in rest.split()[:-1]
        if source != "."
    }

    assert sources <= set(files)
    needed = {
        "launch/agent.py",
        "launch/targets/jobset.py",
        "pgdist/report/report.html.jinja",
        "configs/notebook.py",
    }
    assert {name for name in needed if (ROOT / name).exists()} <= set(files)
    assert {name.split("/")[0] for name in files}.isdisjoint(
        {"tests", "docs", ".git", ".ci", "runs", ".venv"}
    )


def test_every_variant_is_an_extra_of_setup_py_and_a_stage():
    variants = re.search(r"ACCELERATOR is (.+?)\.", (ROOT / "Dockerfile").read_text())[1]
    names = re.findall(r"\w+", variants.replace("or", ""))
    stages = [rest.split(" AS ")[1] for word, rest in instructions() if word == "FROM" and " AS " in rest]
    setup = (ROOT / "setup.py").read_text()

    assert names == ["cpu", "cuda12", "cuda13", "tpu"]
    assert all(f"for-{name}" in stages for name in names)
    assert all(f'"{name}": [' in setup for name in names if name != "cpu")


def test_the_image_runs_as_nobody_in_particular_but_where_the_chips_need_root():
    users: dict[str, str] = {}
    stage = ""
    for word, rest in instructions():
        if word == "FROM" and " AS " in rest:
            parent, stage = rest.split(" AS ")
            users[stage] = users.get(parent, "0")
        elif word == "USER":
            users[stage] = rest

    assert users == {
        "base": "0", "for-cpu": "1000", "for-cuda": "1000", "for-cuda12": "1000", "for-cuda13": "1000", "for-tpu": "0"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_cpu_variant_make_an_environment_in_which_the_commands_run(tmp_path):
    image = tmp_path / "opt/pgdist"
    image.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    environment = own | {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "ACCELERATOR": "cpu"}

    for word, rest in run_steps():
        if word == "COPY":
            copy(rest, image)
            continue
        done = subprocess.run(
            ["/bin/sh", "-c", rest], cwd=image, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"

    python = f"{tmp_path}/venv/bin/python"
    entry = subprocess.run(
        [python, "-m", "launch.env", "--json"],
        cwd=image,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert entry.returncode == 0, entry.stderr
    manifest = ["-m", "launch.submit", "--to=jobset", "--dry_run", "--image=pgdist", "--", "launch.env"]
    assert subprocess.run([python, *manifest], cwd=image, env=environment, timeout=120).returncode == 0
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    installed = dict(line.lower().split("==") for line in listed.stdout.splitlines() if "==" in line)
    assert "pytest" not in installed and "jax" in installed
    for name in {name.lower() for name, _ in pins} & set(installed):
        assert installed[name] in [version for pinned, version in pins if pinned.lower() == name], name
