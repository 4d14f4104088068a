"""Pieces of HTML. Whatever comes from a file passes through `esc`."""

from __future__ import annotations

import html
import json
from typing import Any

from jaxpt.report.format import clip_text
from jaxpt.report.read import RunData


def escape(value: Any) -> str:
    return html.escape(
        str(value).encode("utf-8", "replace").decode()
    )  # half a surrogate pair cannot be written


def small_text(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>' if text else ""


def collapsible(title: str, body: str, is_open: bool = False, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f"<details{named}{' open' if is_open else ''}><summary>{escape(title)}</summary>{body}</details>"


def html_table(
    heads: list[str], body: list[list[str]], caption: str = "", texts: int = 1, kind: str = ""
) -> str:
    """A table of HTML cells; the first `texts` columns are words, the others numbers. It scrolls by itself where it is too wide."""
    head = "".join(
        f'<th scope="col"{" class=t" if i < texts else ""}>{cell}</th>' if cell else "<td></td>"
        for i, cell in enumerate(heads)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{' class=t' if i < texts else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in body
    )
    region = f'<div class="wide {kind}" role="group" aria-label="{escape(caption or "table")}" tabindex="0">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{small_text(caption)}"


def row_header(label: str, unit: str = "") -> str:
    """A row's first cell; a label that starts with two spaces stands under the one above it."""
    unit = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<span class="in">{escape(label.strip())}</span>'
        if label.startswith("  ")
        else escape(label)
    ) + unit


def share_bar(share: float) -> str:
    percent = 100 * min(1, max(0, share))
    return f'<span class="bar"><i style="width:{percent:.1f}%"></i></span><span class="pc">{percent:.0f} %</span>'


def color_legend(names: list[str]) -> str:
    """Which colour is whose, where there are several."""
    return (
        f'<p class="legend">{"".join(f"<span>{color_swatch(i)}{escape(name)}</span>" for i, name in enumerate(names))}</p>'
        if len(names) > 1
        else ""
    )


def color_swatch(i: int) -> str:
    return f'<i class="dot" style="background:{series_color(i)}"></i>'


def series_color(i: int) -> str:
    return f"var(--c{i % 8})"


def code_text(value: Any) -> str:
    return (
        ""
        if value is None
        else f"<code>{escape(clip_text(json.dumps(value), 200)).replace('/', '/<wbr>')}</code>"
    )


def per_run(names: list[str], runs: list[RunData]) -> str:
    return f" ({escape(', '.join(names))})" if len(names) < len(runs) else ""
