"""Numbers as text, for people. A value that isn't a finite number is a dash, never a zero."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
_SPACE = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def number(value: Any) -> float | None:
    """The value as a finite float, or None: JSON holds NaN, null and text where a run went wrong."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    # Beyond this the arithmetic of a chart's axes overflows.
    return result if math.isfinite(result) and abs(result) < 1e300 else None


def count(value: Any) -> str:
    """12345 as 12,345."""
    found = number(value)
    return MISSING if found is None else f"{found:,.0f}"


def compact(value: Any, digits: int = 3) -> str:
    """A few characters, for axes and tiles: 950, 1.2k, 34M, 0.00012."""
    found = number(value)
    if found is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(found) >= size:
            return f"{found / size:.{digits}g}{letter}".replace("-", _MINUS)
    return f"{found:.{digits}g}".replace("-", _MINUS)


def percent(share: Any) -> str:
    """0.503 as 50.3 %."""
    found = number(share)
    return MISSING if found is None else f"{100 * found:.1f}{_SPACE}%"


def points(share: Any) -> str:
    """A difference of two shares in percentage points, signed: +25.4."""
    found = number(share)
    if found is None:
        return MISSING
    # Adding zero turns a rounded -0.0 into +0.0.
    return f"{round(100 * found, 1) + 0.0:+.1f}".replace("-", _MINUS)


def money(value: Any) -> str:
    """US dollars, with enough places that a cheap run doesn't read as free."""
    found = number(value)
    if found is None:
        return MISSING
    return f"${found:,.2f}" if found >= 1 or found == 0 else f"${found:.2g}"


def duration(seconds: Any) -> str:
    """Wall time in its two largest units."""
    found = number(seconds)
    if found is None:
        return MISSING
    if found < 60:
        return f"{found:.1f}{_SPACE}s"
    minutes, rest = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{_SPACE}h {minutes}{_SPACE}min"
