"""Render the sections Data (what the rules kept and dropped) and Mixture (what the steps read)."""

from __future__ import annotations

import itertools

from jaxpt.report.figures import plot_curves, render_figure, render_figure_grid
from jaxpt.report.format import format_count, format_decimal, format_whole
from jaxpt.report.html import (
    collapsible,
    color_legend,
    escape,
    heading,
    html_table,
    name_owners,
    share_bar,
    small_text,
)
from jaxpt.report.read import RunData, group_distinct_values, list_sources, order_keys
from jaxpt.report.records import Funnel, TextAmount

DATA_CAPTION = (
    "Documents and text left after each rule, in the order applied. "
    "Tokens: estimated from the bytes. Share: of the text read, by bytes."
)
MIXTURE_CAPTION = (
    "Share of the sequences of each step, from the given step on. "
    "The table under Training has the epochs of each source."
)


def render_data(runs: list[RunData]) -> str:
    """Render each source's funnel, what could not be read, and samples of what was dropped."""
    html = ""
    for funnels, names in group_distinct_values(runs, lambda run: run.funnels):
        for funnel in funnels:
            for source in funnel.sources:
                html += heading(source + name_owners(names, runs))
                html += render_funnel_table(funnel, source)
                html += render_unreadable(funnel, source)
                html += render_dropped_samples(funnel, source)
    if html:
        html += small_text(DATA_CAPTION)
    return html


def render_funnel_table(funnel: Funnel, source: str) -> str:
    """Render what was read, left after each rule, and split into training and held-out text."""
    labels = []
    amounts = []
    edits = []
    for step in funnel.steps:
        labels.append(escape(step.rule.replace("_", " ")))
        amounts.append(step.kept.get(source, TextAmount()))
        n_edits = step.n_edits or {}
        edits.append(format_whole(n_edits.get(source) or None))
    documents = [amount.n_documents for amount in amounts]
    n_read_bytes = next((amount.n_bytes for amount in amounts), 0)
    dropped = [""]
    for before, after in itertools.pairwise(documents):
        dropped.append(format_whole(before - after))
    splits = {"kept for training": funnel.train, "held out": funnel.heldout}
    for label, split in splits.items():
        if source in split:
            labels.append(label)
            amounts.append(split[source])
    shares = []
    for amount in amounts:
        frac = amount.n_bytes / n_read_bytes if n_read_bytes else 0
        shares.append(share_bar(frac))
    columns = {"rule": labels}
    columns["documents"] = [format_whole(amount.n_documents) for amount in amounts]
    columns |= {"dropped": dropped, "edits": edits}
    columns["MB"] = [format_decimal(amount.n_bytes / 1e6, 2) for amount in amounts]
    columns["tokens"] = [format_count(amount.n_tokens) for amount in amounts]
    columns["share"] = shares
    # what no rule did, or nobody counted, has no column
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    body = list(itertools.zip_longest(*columns.values(), fillvalue=""))
    return html_table(list(columns), body, css_class="funnel")


def render_unreadable(funnel: Funnel, source: str) -> str:
    """Render how many inputs were skipped, and the first messages, folded."""
    skipped = funnel.skipped.get(source)
    if not skipped:
        return ""
    reasons = [f"{format_whole(n)} times {reason}" for reason, n in skipped.counts.items()]
    text = ""
    if reasons:
        text = f"Skipped while reading: {', '.join(reasons)}."
    messages = "".join(map(small_text, skipped.messages))
    return small_text(text) + collapsible("What could not be read", messages)


def render_dropped_samples(funnel: Funnel, source: str) -> str:
    """Render samples of what each rule dropped, folded, in the order of the rules."""
    html = ""
    order = [step.rule for step in funnel.steps]
    for rule in order_keys(order, funnel.dropped):
        documents = funnel.dropped.get(rule, ())
        documents = [document for document in documents if document.source == source]
        if documents:
            html += heading(rule.replace("_", " "))
        for document in documents:
            reason = small_text(f"{document.id}: {document.reason or 'no reason recorded'}")
            text = escape(document.text)
            html += f'<div class="dropped">{reason}<pre>{text}</pre></div>'
    return collapsible("Samples of what each rule dropped", html)


def render_mixture(runs: list[RunData]) -> str:
    """Render the share of each source by step: a table, and a figure where it changes."""
    runs = [run for run in runs if run.phases and run.metrics.train]
    if not runs:
        return ""
    names = list_sources(runs)
    for run in runs:
        for phase in run.phases:
            names = order_keys(names, [*names, *phase.shares])
    figures = []
    body = []
    for run in runs:
        if len(run.phases) > 1:
            title = run.name if len(runs) > 1 else "Shares"
            figures.append(plot_mixture(run, names, title))
        for phase in run.phases:
            row = [escape(run.name), format_whole(phase.step)]
            for name in names:
                share = phase.shares.get(name)
                row.append("" if share is None else f"{100 * share:.3g} %")
            body.append(row)
    html = ""
    if figures:
        html += color_legend(names) + render_figure_grid(figures)
    heads = ["run", "from step", *map(escape, names)]
    return html + html_table(heads, body, MIXTURE_CAPTION)


def plot_mixture(run: RunData, names: list[str], title: str) -> str:
    """Draw each source's share as steps of a stair."""
    starts = [phase.step for phase in run.phases]
    last_step = max(starts[-1], run.metrics.train[-1].step)
    ends = [*starts[1:], last_step]
    series = []
    for name in names:
        points = []
        for phase, start, end in zip(run.phases, starts, ends, strict=True):
            share = phase.shares.get(name, 0.0)
            points += [(start, share), (end, share)]
        series.append((name, points))
    plot = plot_curves(names, series, "share", 180, unit="of the sequences", scale="share")
    return render_figure(plot, "Share of the sequences of each step.", title)
