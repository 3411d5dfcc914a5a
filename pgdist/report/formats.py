"""Numbers as people read them; each function is a filter of the template."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from markupsafe import Markup, escape


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits: 0.01234, 12.35, 3e-05, but 1,234,568; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(value: int) -> str:
    """1,234 below ten thousand, then three or four digits and a unit: 45.6 k, 170.0 M, 2.923 B."""
    for limit, unit, digits in ((1e9, "B", 3), (1e6, "M", 1), (1e4, "k", 1)):
        if value >= limit:
            scale = {"B": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{value / scale:.{digits}f} {unit}"
    return f"{value:,}"


def size(byte_count: int) -> str:
    """Bytes with a binary unit: 512 B, 3.2 MiB."""
    value = float(byte_count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float | None) -> str:
    """0.45 s, 12.3 s, 3 min 12 s, 5 h 02 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def moment(seconds: float) -> str:
    """Unix seconds as a date and a minute in UTC."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):  # beyond the years that there are
        return "–"


def percent(share: float) -> str:
    """A share of 1 in percent: 5.8 %."""
    return f"{100 * share:.1f} %"


def breakable(name: str) -> Markup:
    """`name` with places where a long path may break its line."""
    return Markup(escape(name)).replace("/", Markup("/<wbr>")).replace(".", Markup(".<wbr>"))
