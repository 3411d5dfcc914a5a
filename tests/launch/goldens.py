"""What commands printed when a person last looked at it; PGDIST_WRITE_GOLDENS=1 writes it anew."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"


def check_golden(name: str, text: str) -> None:
    """Fails unless goldens/`name` holds `text`."""
    path = FOLDER / name
    if os.environ.get("PGDIST_WRITE_GOLDENS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no {path}; write it with PGDIST_WRITE_GOLDENS=1 and look at it"
    assert text == path.read_text(encoding="utf-8")
