"""Numbers as text."""

from __future__ import annotations

import functools
import math
from typing import Any

MAX_TEXT = 2_000  # characters shown of a prompt, a sample or what was measured


def clip(text: Any, n: int) -> str:
    text = str(text)
    return text if len(text) <= n else text[: n - 1] + "\u2026"


def finite(value: Any) -> float | None:
    """The number, or None where it is none, infinite or missing."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def total(parts: dict[str, dict], key: str) -> float:
    return sum(finite(part.get(key)) or 0 for part in parts.values())


def brief(value: Any) -> str:
    """Three digits where more would promise too much: 1.52, 34.1, 786, 40,400; nothing below a hundredth."""
    if finite(value) is None:
        return ""
    if 0 < value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def arrow(before: Any, after: Any, digits: int = 3) -> str:
    return f"{decimal(before, digits)} \u2192 {decimal(after, digits)}" if finite(before) is not None else ""


def decimal(value: Any, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if finite(value) is not None else ""


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


whole = functools.partial(decimal, digits=0)  # 12,345


def percent(value: Any) -> str:
    return "" if finite(value) is None else f"{value:.0%}"


def count(value: Any) -> str:
    """1.31 M"""
    if finite(value) is None:
        return ""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e5, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):.3g}{letter}"
    return whole(value)


def duration(seconds: Any) -> str:
    """3.2 s; 4 min 05 s; 2 h 03 min"""
    if finite(seconds) is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def told(value: Any) -> str:
    """JSON in words: real numbers in three digits, lists and objects with commas."""
    if isinstance(value, dict):
        value = [f"{key} {told(each)}" for key, each in value.items()]
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
