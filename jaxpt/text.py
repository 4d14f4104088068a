"""Lay text out for a terminal: tables and notes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

MAX_COLUMNS = 80


def format_table(
    rows: Sequence[Sequence[str]], *, n_text_columns: int = 1, indent: str = "", gap: int = 2
) -> str:
    """Return rows of cells as lines with aligned columns.

    Args:
        rows: the heads among them; of one length.
        n_text_columns: the first columns hold words and are aligned to the left, the others hold
            numbers and are aligned to the right.
        indent: before each line.
        gap: spaces between two columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            is_text = i < n_text_columns
            cells.append(cell.ljust(width) if is_text else cell.rjust(width))
        line = indent + (" " * gap).join(cells)
        lines.append(line.rstrip())
    return "\n".join(lines)


def wrap_notes(notes: Iterable[str]) -> str:
    """Return notes as list items of at most MAX_COLUMNS columns."""
    items = []
    for note in notes:
        item = textwrap.fill(note, MAX_COLUMNS, initial_indent="- ", subsequent_indent="  ")
        items.append(item)
    return "\n".join(items)
