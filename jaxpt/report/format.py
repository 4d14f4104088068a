"""Format numbers as text. A number that is missing or not finite is an empty text."""

from __future__ import annotations

import math
from typing import Any

MAX_TEXT = 2_000  # characters shown of a prompt, a sample or a measurement
SIZES = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e5, 1e3, "k"))


def clip_text(text: Any, max_chars: int) -> str:
    """Return the text, with an ellipsis where it is longer."""
    text = str(text)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "\u2026"


def finite_or_none(value: Any) -> float | None:
    """Return the number; None if it is no number, infinite or missing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer of JSON that no float can hold
        return None


def format_brief(value: Any) -> str:
    """Return three digits, as 1.52, 34.1, 786, 40,400: more would promise too much."""
    if finite_or_none(value) is None:
        return ""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_change(before: Any, after: Any, digits: int = 3) -> str:
    """Return "before → after"."""
    if finite_or_none(before) is None:
        return ""
    return f"{format_decimal(before, digits)} \u2192 {format_decimal(after, digits)}"


def format_decimal(value: Any, digits: int = 3) -> str:
    """Return the number with `digits` digits after the point."""
    return "" if finite_or_none(value) is None else f"{value:,.{digits}f}"


def format_signed(value: float, digits: int = 3) -> str:
    """Return the number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def format_whole(value: Any) -> str:
    """Return 12,345."""
    return format_decimal(value, 0)


def format_percent(value: Any) -> str:
    """Return 12%."""
    return "" if finite_or_none(value) is None else f"{value:.0%}"


def format_gigabytes(value: Any, digits: int = 1) -> str:
    """Return bytes as gigabytes."""
    return "" if finite_or_none(value) is None else f"{value / 1e9:,.{digits}f}"


def format_count(value: Any) -> str:
    """Return 1.31 M."""
    if finite_or_none(value) is None:
        return ""
    for minimum, unit, letter in SIZES:
        if abs(value) >= minimum:
            return f"{value / unit:.3g} {letter}"
    return format_whole(value)


def format_seconds(seconds: Any) -> str:
    """Return 3.2 s, 4 min 05 s or 2 h 03 min."""
    if finite_or_none(seconds) is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_value(value: Any) -> str:
    """Return JSON in words: floats with three digits, lists and objects with commas."""
    if isinstance(value, dict):
        value = [f"{key} {format_value(item)}" for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
