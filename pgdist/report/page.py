"""What every report is made with: the templates' environment, and the file that is replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pgdist.report import formats


def make_environment() -> Environment:
    """Templates of this folder, which escape all that they are given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        formats.number,
        formats.count,
        formats.size,
        formats.duration,
        formats.percent,
        formats.breakable,
    ):
        environment.filters[function.__name__] = function
    return environment


def write_page(path: str | os.PathLike[str], page: str) -> Path:
    """Writes the file as a whole, so that nobody ever finds half a page, and returns its path.

    Raises OSError where it cannot be written; what was there before then stays.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # JSON may hold halves of surrogate pairs, which no encoding takes.
        unfinished.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
