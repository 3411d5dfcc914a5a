"""Paths of weights files: local ones, with `~` for the home folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pgdist.errors import WeightsError


def local_path(path: str | os.PathLike[str]) -> Path:
    """`path` with `~` resolved; WeightsError for a URL, which would quietly become a local folder `gs:`."""
    if re.match(r"\w+://", os.fspath(path)):
        raise WeightsError(
            f"{path}: weights are read from local files, gs://, hf:// and kaggle://, and written to local files. Use a "
            "local copy."
        )
    return Path(path).expanduser()
