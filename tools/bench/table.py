"""Figures as lines of a table: a column is its heading, the key of a row that it shows, a factor and a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str, float, str]]
_NAME, _CELL = 34, 12  # characters


def heading(columns: Columns) -> str:
    """The first line."""
    return f"{'':{_NAME}}" + "".join(f"{column[0]:>{_CELL}}" for column in columns)


def line(columns: Columns, name: str, row: Mapping[str, Any]) -> str:
    """The row's line; a cell is empty where its value is None or missing."""
    cells = [
        "" if row.get(key) is None else format(row[key] * scale, form) for _, key, scale, form in columns
    ]
    return f"{name:<{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)
