"""Numbers as text."""

from __future__ import annotations

import functools
import math
from typing import Any

MAX_TEXT = 2_000  # characters shown of a prompt, a sample or what was measured


def clip_text(text: Any, n: int) -> str:
    text = str(text)
    return text if len(text) <= n else text[: n - 1] + "\u2026"


def is_finite(value: Any) -> float | None:
    """The number, or None where it is none, infinite or missing."""
    return (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def sum_key(parts: dict[str, dict], key: str) -> float:
    return sum(is_finite(part.get(key)) or 0 for part in parts.values())


def format_brief(value: Any) -> str:
    """Three digits where more would promise too much: 1.52, 34.1, 786, 40,400; nothing below a hundredth."""
    if is_finite(value) is None:
        return ""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_change(before: Any, after: Any, digits: int = 3) -> str:
    return (
        f"{format_decimal(before, digits)} \u2192 {format_decimal(after, digits)}"
        if is_finite(before) is not None
        else ""
    )


def format_decimal(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if is_finite(value) is not None else ""


def format_signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


format_whole = functools.partial(format_decimal, digits=0)  # 12,345


def format_percent(value: Any) -> str:
    return "" if is_finite(value) is None else f"{value:.0%}"


def format_count(value: Any) -> str:
    """1.31 M"""
    if is_finite(value) is None:
        return ""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e5, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):.3g}{letter}"
    return format_whole(value)


def format_seconds(seconds: Any) -> str:
    """3.2 s; 4 min 05 s; 2 h 03 min"""
    if is_finite(seconds) is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def format_value(value: Any) -> str:
    """JSON in words: real numbers in three digits, lists and objects with commas."""
    if isinstance(value, dict):
        value = [f"{key} {format_value(each)}" for key, each in value.items()]
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
