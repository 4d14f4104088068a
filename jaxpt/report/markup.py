"""Pieces of HTML. Whatever comes from a file passes through `esc`."""

from __future__ import annotations

import html
import json
from typing import Any

from jaxpt.report.read import RunData
from jaxpt.report.words import clip


def esc(value: Any) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())  # half a surrogate pair cannot be written


def small(text: str) -> str:
    return f'<p class="small">{esc(text)}</p>' if text else ""


def details(title: str, body: str, is_open: bool = False, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f"<details{named}{' open' if is_open else ''}><summary>{esc(title)}</summary>{body}</details>"


def grid(heads: list[str], body: list[list[str]], caption: str = "", texts: int = 1, kind: str = "") -> str:
    """A table of HTML cells; the first `texts` columns are words, the others numbers. It scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col"{" class=t" if i < texts else ""}>{cell}</th>' if cell else "<td></td>" for i, cell in enumerate(heads))
    rows = "".join("<tr>" + "".join(f"<td{' class=t' if i < texts else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in body)
    region = f'<div class="wide {kind}" role="group" aria-label="{esc(caption or "table")}" tabindex="0">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{small(caption)}"


def row_head(label: str, unit: str = "") -> str:
    """A row's first cell; a label that starts with two spaces stands under the one above it."""
    unit = f" <small>{esc(unit)}</small>" if unit else ""
    return (f'<span class="in">{esc(label.strip())}</span>' if label.startswith("  ") else esc(label)) + unit


def bar(share: float) -> str:
    percent = 100 * min(1, max(0, share))
    return f'<span class="bar"><i style="width:{percent:.1f}%"></i></span><span class="pc">{percent:.0f} %</span>'


def key_of(names: list[str]) -> str:
    """Which colour is whose, where there are several."""
    return f'<p class="legend">{"".join(f"<span>{swatch(i)}{esc(name)}</span>" for i, name in enumerate(names))}</p>' if len(names) > 1 else ""


def swatch(i: int) -> str:
    return f'<i class="dot" style="background:{color(i)}"></i>'


def color(i: int) -> str:
    return f"var(--c{i % 8})"


def code(value: Any) -> str:
    return "" if value is None else f"<code>{esc(clip(json.dumps(value), 200)).replace('/', '/<wbr>')}</code>"


def of_runs(names: list[str], runs: list[RunData]) -> str:
    return f" ({esc(', '.join(names))})" if len(names) < len(runs) else ""
