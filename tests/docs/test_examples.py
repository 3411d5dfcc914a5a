"""The examples of the pages run as they are written, at a size for tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.conftest import draw_scene

ROOT = Path(__file__).parents[2]


def read_example(page: str) -> str:
    """The only one of a page."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return example


def run_example(example: str, *, folder: Path) -> list[str]:
    """The lines that it prints, run beside the repository's assets."""
    (folder / "assets").symlink_to(ROOT / "assets")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_the_api_page_fine_tunes_and_answers(tmp_path: Path):
    example = read_example("api.md")
    assert len(example.splitlines()) <= 40
    make = [sys.executable, str(ROOT / "tools/make_demo_data.py"), "--task=relations", "--out=runs/api_data"]
    subprocess.run([*make, "--train=64", "--validation=8", "--workers=1"], cwd=tmp_path, check=True)
    metrics, answer = run_example(example, folder=tmp_path)
    assert "validation/exact_match" in metrics
    assert answer
    assert (tmp_path / "runs/api/report.html").exists()


def test_every_file_that_a_page_links_to_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
def test_the_example_of_the_decoding_page_follows_searches_draws_and_chooses(tmp_path: Path):
    draw_scene(0).save(tmp_path / "scene.png")
    *lines, drawn, chosen = run_example(read_example("decoding.md"), folder=tmp_path)
    assert lines[-4] == "0 a red circle and a blue circle"  # heard last, before the three beams
    assert float(lines[-3].split()[0]) > float(lines[-2].split()[0]) > float(lines[-1].split()[0])
    assert re.fullmatch(r"(<loc\d{4}>)*", drawn)
    assert chosen == "a red circle and a blue circle"
