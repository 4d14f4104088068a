"""Sections: what the rules kept and dropped of the raw text, and what the steps read of it."""

from __future__ import annotations

import itertools
import math

from jaxpt.report.figures import plot_curves, render_figure, render_figure_pairs
from jaxpt.report.format import format_count, format_decimal, format_whole
from jaxpt.report.html import (
    collapsible,
    color_legend,
    escape,
    html_table,
    per_run,
    share_bar,
    small_text,
)
from jaxpt.report.read import RunData, distinct_values, list_sources, order_keys


def data_section(runs: list[RunData]) -> str:
    parts = []
    for funnels, names in distinct_values(runs, "funnels"):
        for found in funnels:
            for source in found["sources"]:
                parts.append(
                    f"<h3>{escape(source)}{per_run(names, runs)}</h3>{render_funnel(found, source)}{render_unreadable(found, source)}{render_dropped(found, source)}"
                )
    if not parts:
        return ""
    return "".join(parts) + small_text(
        "Documents and text left after each rule, in the order applied. Tokens: estimated from the bytes. Share: of the text read, by bytes."
    )


def render_funnel(found: dict, source: str) -> str:
    """Read, left after each rule, and parted into training and held-out text. What no rule did, and what was not counted, has no column."""
    steps = [
        (step["rule"].replace("_", " "), step["kept"].get(source, {})) for step in found["steps"]
    ]
    labels = {"train": "kept for training", "heldout": "held out"}
    parts = [
        (label, found[part][source])
        for part, label in labels.items()
        if source in found.get(part, {})
    ]
    rows = [kept.get("rows", 0) for _, kept in steps]
    read = steps[0][1].get("bytes") if steps else None
    each = [kept for _, kept in (*steps, *parts)]
    columns = {
        "rule": [escape(label) for label, _ in (*steps, *parts)],
        "documents": [format_whole(kept.get("rows")) for kept in each],
        "dropped": [
            "",
            *(format_whole(before - after) for before, after in itertools.pairwise(rows)),
        ]
        if len(steps) > 1
        else [],
        "edits": [
            format_whole(step.get("edits", {}).get(source) or None) for step in found["steps"]
        ],
        "MB": [format_decimal(kept.get("bytes", math.nan) / 1e6, 2) for kept in each],
        "tokens": [format_count(kept.get("tokens")) for kept in each],
        "share": [share_bar(kept.get("bytes", 0) / read if read else 0) for kept in each],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    body = [list(row) for row in itertools.zip_longest(*columns.values(), fillvalue="")]
    return html_table(list(columns), body, kind="funnel")


def render_unreadable(found: dict, source: str) -> str:
    """What was passed over while the source was read, and the sentences about what cannot be read, folded."""
    unread = found.get("unread", {}).get(source, {"counts": {}, "first": []})
    passed = ", ".join(f"{format_whole(n)} times {why}" for why, n in unread["counts"].items())
    sentences = "".join(small_text(sentence) for sentence in unread["first"])
    return small_text(f"Passed over while reading: {passed}." if passed else "") + (
        collapsible("What could not be read", sentences) if sentences else ""
    )


def render_dropped(found: dict, source: str) -> str:
    """Samples of what each rule dropped, folded, in the order of the rules."""
    parts = []
    for rule in order_keys([step["rule"] for step in found["steps"]], found["dropped"]):
        rows = [row for row in found["dropped"][rule] if row["source"] == source]
        parts += [f"<h3>{escape(rule.replace('_', ' '))}</h3>"] if rows else []
        for row in rows:
            why = small_text(f"{row['id']}: {row['reason'] or 'no reason kept'}")
            parts.append(f'<div class="dropped">{why}<pre>{escape(row["text"])}</pre></div>')
    return collapsible("Samples of what each rule dropped", "".join(parts)) if parts else ""


def mixture_section(runs: list[RunData]) -> str:
    names = order_keys(
        list_sources(runs), (name for run in runs for _, shares in run.phases for name in shares)
    )
    known = [run for run in runs if run.phases and run.train]
    figures, body = [], []
    for run in known:
        ends = [
            *(step for step, _ in run.phases[1:]),
            max(run.phases[-1][0], run.train[-1]["step"]),
        ]
        stretches = [
            (start, end, shares) for (start, shares), end in zip(run.phases, ends, strict=True)
        ]
        series = [
            (
                name,
                [
                    (step, shares.get(name, 0.0))
                    for start, end, shares in stretches
                    for step in (start, end)
                ],
            )
            for name in names
        ]
        if len(stretches) > 1:
            figures.append(
                render_figure(
                    plot_curves(names, series, "share", 180, unit="of the rows", shares=True),
                    "Share of the rows of each step.",
                    run.name if len(runs) > 1 else "Shares",
                )
            )
        for start, _, shares in stretches:
            body.append(
                [
                    escape(run.name),
                    format_whole(start),
                    *(f"{100 * shares[name]:.3g} %" if name in shares else "" for name in names),
                ]
            )
    if not body:
        return ""
    caption = "Share of the rows of each step, from the step named on; how often each source was read stands under Training."
    return (color_legend(names) + render_figure_pairs(figures) if figures else "") + html_table(
        ["run", "from step", *map(escape, names)], body, caption
    )
