"""The examples of the pages run as they are written, at a size for tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_of_the_api_page_fine_tunes_and_answers(tmp_path: Path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 40
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    make = [sys.executable, str(ROOT / "tools/make_demo_data.py"), "--task=relations", "--out=runs/api_data"]
    subprocess.run([*make, "--train=64", "--validation=8", "--workers=1"], cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    metrics, answer = done.stdout.strip().splitlines()
    assert "validation/exact_match" in metrics
    assert answer
    assert (tmp_path / "runs/api/report.html").exists()


def test_every_file_that_a_page_links_to_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
