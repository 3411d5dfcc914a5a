"""The page in a real browser: nothing to complain of, nothing run but its own script, which works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pgdist.report import write_predictions_report, write_report
from tests.report.conftest import draw_scene

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed, so no page can be loaded"
)


def load(page: Path, *, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what they and the browser wrote to the console."""
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, re.findall(r".*\bCONSOLE\b.*", result.stderr)


def test_the_page_loads_without_a_complaint_and_runs_nothing_of_its_data(workdir, tmp_path):
    # An attack that got past the escaping would show: it changes the document or complains in the console.
    attack = (
        "<script>document.title = 'broken in'</script><img src=x onerror=\"document.title = 'broken in'\">"
    )
    path = workdir / "predictions" / "step_000000.jsonl"
    rows = [
        json.loads(line) | {"prediction": attack, "prefix": attack} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document, console = load(write_report(workdir), profile=tmp_path / "profile")
    assert console == []
    assert "<title>run – pgdist report</title>" in document
    assert "&lt;script&gt;document.title" in document


def test_the_content_security_policy_blocks_a_script_that_got_in(workdir, tmp_path):
    page = write_report(workdir)
    page.write_text(
        page.read_text().replace("</main>", "<script>document.title = 'broken in'</script></main>")
    )
    document, console = load(page, profile=tmp_path / "profile")
    assert "broken in</title>" not in document
    assert any("Content Security Policy" in line for line in console)


def test_the_pointer_over_a_chart_shows_the_values_of_its_step(workdir, tmp_path):
    page = write_report(workdir)
    probe = """<script>
      const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
      const clientX = box.left + box.width * (46 + (460 - 46) * 32.4 / 64) / 480;
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY: box.top + 50}));
    </script></body>"""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(source.replace("</body>", probe))
    document, console = load(page, profile=tmp_path / "profile")
    assert console == []
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training, validation = (
        next(f"{row[name]:.4g}" for row in metrics if row["step"] == 32 and name in row)
        for name in ("train/loss", "validation/loss")
    )
    caption = re.search(r"<figcaption>.*?</figcaption>", document, re.DOTALL)[0]
    assert "step 32" in caption
    assert re.findall(r"<output>(.*?)</output>", caption) == [training, validation]


def test_the_page_of_a_prediction_loads_without_a_complaint_and_runs_nothing_of_its_texts(tmp_path):
    attack = "<script>document.title = 'broken in'</script></title></svg><img src=x onerror='alert(1)'>"
    draw_scene(0).save(tmp_path / "scene.png")
    box = "<loc0102><loc0051><loc0614><loc0818>"
    texts = {"prefix": attack, "suffix": f"{box} {attack}", "prediction": f"{box} it's ; {attack}"}
    rows = [{"index": 0, "image": "scene.png", **texts, "predictions": [attack, attack]}]
    page = write_predictions_report(tmp_path / "page.html", rows, image_root=tmp_path, title=attack)
    document, console = load(page, profile=tmp_path / "profile")
    assert console == []
    assert "<title>&lt;script&gt;" in document
    assert document.count("<rect") == 2 and document.count("<script") == 0
