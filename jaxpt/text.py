"""Lay text out for a terminal: without control characters, in tables and notes."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence

MAX_COLUMNS = 80
MAX_LISTED = 24  # names of a list that a sentence gives


def printable(text: object, keep: str = "") -> str:
    """Return a text with control characters and broken characters as escapes.

    A name or a text of data could otherwise clear a terminal, or not be printable at all.

    Args:
        text: or what becomes one.
        keep: characters that stay, such as line ends.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text
    )


def name_some(names: Sequence[str], most: int = MAX_LISTED) -> str:
    """Return names in words, the first of them and how many more there are."""
    listed = ", ".join(names[:most])
    n_more = len(names) - most
    return f"{listed} and {n_more:,} more" if n_more > 0 else listed


def format_table(
    rows: Sequence[Sequence[str]],
    align: str = "<>",
    *,
    gap: str = "  ",
    indent: str = "",
    min_width: int = 0,
) -> str:
    """Return rows of cells as lines with aligned columns, control characters as escapes.

    Args:
        rows: the heads among them, all of one length.
        align: per column "<" for words, ">" for numbers; the last holds for all further ones.
        gap: between two columns.
        indent: before each line.
        min_width: of a column, in terminal columns.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(min_width, *map(display_width, column)))
    sides = align + align[-1] * len(widths)
    lines = []
    for row in rows:
        cells = []
        for cell, width, side in zip(row, widths, sides, strict=False):
            blanks = " " * (width - display_width(cell))
            cells.append(cell + blanks if side == "<" else blanks + cell)
        line = indent + gap.join(cells)
        lines.append(line.rstrip())
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Return the terminal columns of a text: East Asian wide characters take two."""
    width = 0
    for char in text:
        if unicodedata.combining(char):
            continue
        is_wide = unicodedata.east_asian_width(char) in "WF"
        width += 2 if is_wide else 1
    return width


def wrap_notes(notes: Iterable[str]) -> str:
    """Return notes as list items of at most MAX_COLUMNS columns."""
    items = []
    for note in notes:
        item = textwrap.fill(note, MAX_COLUMNS, initial_indent="- ", subsequent_indent="  ")
        items.append(item)
    return "\n".join(items)


def format_duration(seconds: float) -> str:
    """Return 7 as "7s", 75 as "1m15s", 90,000 as "25h00m"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def choose_time_unit(ends: Iterable[float | None]) -> tuple[str, int]:
    """Return a unit in which the larger of some hours is at least 1, and how many an hour has."""
    longest = max((end for end in ends if end is not None), default=1.0)
    if longest >= 1:
        return "hours", 1
    return ("minutes", 60) if longest >= 1 / 60 else ("seconds", 3600)


def format_significant(n: float) -> str:
    """Return three significant digits, or whole numbers from 100 on."""
    if n >= 100:
        return f"{n:,.0f}"
    return f"{n:.3g}"
