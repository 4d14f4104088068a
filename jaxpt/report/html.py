"""Build HTML. Whatever comes from a file passes through `escape`."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from jaxpt.report.format import clip_text
from jaxpt.report.read import RunData


def escape(value: Any) -> str:
    """Return text that no browser takes for HTML."""
    # half of a surrogate pair cannot be encoded
    return html.escape(str(value).encode("utf-8", "replace").decode())


def small_text(text: str) -> str:
    """Return a small paragraph of plain text."""
    return f'<p class="small">{escape(text)}</p>' if text else ""


def heading(text: str) -> str:
    """Return a heading of plain text below the section's own."""
    return f"<h3>{escape(text)}</h3>"


def collapsible(title: str, body: str, is_open: bool = False, css_class: str = "") -> str:
    """Return HTML that unfolds under its title; "" if it is empty."""
    if not body:
        return ""
    attributes = f' class="{css_class}"' if css_class else ""
    attributes += " open" if is_open else ""
    return f"<details{attributes}><summary>{escape(title)}</summary>{body}</details>"


def html_table(
    heads: Sequence[str],
    body: Sequence[Sequence[str]],
    caption: str = "",
    n_text_columns: int = 1,
    css_class: str = "",
) -> str:
    """Return a table that scrolls by itself where it is too wide.

    Args:
        heads: HTML of the head of each column.
        body: rows of HTML cells.
        caption: plain text below the table.
        n_text_columns: the first columns hold words, the others numbers.
        css_class: class of the frame in page.css.
    """
    classes = [" class=t" if i < n_text_columns else "" for i in range(len(heads))]
    head = ""
    for name, cell in zip(classes, heads, strict=True):
        head += f'<th scope="col"{name}>{cell}</th>' if cell else "<td></td>"
    lines = ""
    for row in body:
        cells = [f"<td{name}>{cell}</td>" for name, cell in zip(classes, row, strict=True)]
        lines += f"<tr>{''.join(cells)}</tr>"
    label = escape(caption or "table")
    frame = f'<div class="wide {css_class}" role="group" aria-label="{label}" tabindex="0">'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f"{frame}{table}</div>{small_text(caption)}"


def row_header(label: str, unit: str = "") -> str:
    """Return a row's first cell; two leading spaces indent it under the row above."""
    text = escape(label)
    if label.startswith("  "):
        text = f'<span class="in">{escape(label.strip())}</span>'
    return f"{text} <small>{escape(unit)}</small>" if unit else text


def share_bar(frac: float) -> str:
    """Return a bar as long as a share, with the percentage."""
    percent = 100 * min(1, max(0, frac))
    bar = f'<span class="bar"><i style="width:{percent:.1f}%"></i></span>'
    return f'{bar}<span class="pc">{percent:.0f} %</span>'


def color_legend(names: list[str]) -> str:
    """Return which color is whose; "" for a single name."""
    if len(names) < 2:
        return ""
    items = [f"<span>{color_swatch(i)}{escape(name)}</span>" for i, name in enumerate(names)]
    return f'<p class="legend">{"".join(items)}</p>'


def color_swatch(i: int) -> str:
    """Return a dot in the color of the i-th series."""
    return f'<i class="dot" style="background:{series_color(i)}"></i>'


def series_color(i: int) -> str:
    """Return the CSS color of the i-th series."""
    return f"var(--c{i % 8})"


def code_text(value: Any) -> str:
    """Return a JSON value as code; "" for None."""
    if value is None:
        return ""
    text = escape(clip_text(json.dumps(value), 200))
    return f"<code>{text.replace('/', '/<wbr>')}</code>"


def name_owners(names: list[str], runs: list[RunData]) -> str:
    """Return " (run, ...)" where a value is not that of all runs."""
    return f" ({', '.join(names)})" if len(names) < len(runs) else ""
