"""Boxes written as location tokens: `<loc0102><loc0051><loc0614><loc0818> red circle ; ...`, y0 x0 y1 x1 and a label.

A coordinate v, a share of the image's side, is the token of round(v * 1023).
"""

from __future__ import annotations

import dataclasses
import re

SCALE = 1023
_BOX = re.compile(r"<loc(\d{4})>" * 4 + r"(?:<seg\d{3}>)*([^;<]*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """Shares of the image's sides, from its top and left, y0 < y1 and x0 < x1.  label: may be empty."""

    y0: float
    x0: float
    y1: float
    x1: float
    label: str


def find_boxes(text: str) -> list[Box]:
    """The boxes in a text, in order. What is no box of positive area is passed over."""
    found = []
    for *tokens, label in _BOX.findall(text):
        y0, x0, y1, x1 = (int(token) / SCALE for token in tokens)
        if y0 < y1 <= 1 and x0 < x1 <= 1:
            found.append(Box(y0=y0, x0=x0, y1=y1, x1=x1, label=label.strip()))
    return found
