"""Summarize runs in the numbers that matter, for the head of the page and for the terminal."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpt.lineage import STAGES
from jaxpt.report.format import (
    clip_text,
    format_change,
    format_count,
    format_decimal,
    format_seconds,
    format_whole,
)
from jaxpt.report.html import color_swatch, escape, html_table, row_header
from jaxpt.report.read import (
    RunData,
    first_value,
    format_shape,
    last_value,
    list_sources,
    order_keys,
    short_model_name,
)

LABEL_WIDTH = 24  # columns of the terminal, as all widths
TABLE_WIDTH = 76  # of all columns but the labels
MAX_RUNS_PER_TABLE = 4
SUMMARY_CAPTION = (
    "Held-out: text kept out of training, mean over its tokens. "
    "Bits per byte: independent of the tokenizer, lower is better."
)


class SummaryRow(NamedTuple):
    """A row of the summary. Two leading spaces put a label into the group above it."""

    label: str
    unit: str
    texts: list[str]  # one per run


def summarize_runs(runs: list[RunData]) -> list[SummaryRow]:
    """Return the rows of which some run has a value."""
    rows = []

    def add(label: str, unit: str, get: Callable[[RunData], str]) -> None:
        texts = [get(run) for run in runs]
        if any(texts):
            rows.append(SummaryRow(label, unit, texts))

    def add_group(
        label: str, unit: str, values: list[dict[str, Any]], format_number: Callable[[Any], str]
    ) -> None:
        keys = []
        for value in values:
            keys += value
        keys = order_keys([*list_sources(runs), *STAGES], keys)
        if keys:
            rows.append(SummaryRow(label, unit, ["" for _ in runs]))
        for key in keys:
            texts = [format_number(value.get(key)) for value in values]
            if any(texts):
                rows.append(SummaryRow(f"  {key}", "", texts))

    add("parameters", "", lambda run: format_count(run.n_params))
    add("layers × width", "", format_shape)
    add("steps", "", lambda run: format_whole(last_value(run.metrics.train, "step")))
    add("tokens", "", lambda run: format_count(last_value(run.metrics.train, "n_tokens")))
    add("loss", "nats/token", format_loss_change)
    heldout = []
    for run in runs:
        losses = {}
        for point in run.metrics.heldout[-1:]:
            losses = point.heldout_loss
        heldout.append(losses)
    add_group("held-out", "nats/token", heldout, format_decimal)
    add_group("bits per byte", "", [get_bits_per_byte(run) for run in runs], format_decimal)
    add_group("time", "", [sum_seconds_by_stage(run) for run in runs], format_seconds)
    add("cost", "USD", lambda run: format_decimal(last_value(run.metrics.train, "usd"), 2))
    return rows


def format_loss_change(run: RunData) -> str:
    """Return first → last training loss."""
    train = run.metrics.train
    return format_change(first_value(train, "loss"), last_value(train, "loss"))


def format_summary_table(runs: list[RunData], page_path: pathlib.Path) -> str:
    """Return the summary as text at most 100 columns wide that ends in the page's path."""
    lines = []
    for start in range(0, len(runs), MAX_RUNS_PER_TABLE):
        part = runs[start : start + MAX_RUNS_PER_TABLE]
        width = 18
        if len(part) < MAX_RUNS_PER_TABLE:
            width = max(16, *(len(run.name) + 3 for run in part))
        width = min(width, TABLE_WIDTH // len(part))
        names = [f"{clip_text(run.name, width - 2):>{width}}" for run in part]
        lines.append(" " * LABEL_WIDTH + "".join(names))
        lines.append("\u2500" * (LABEL_WIDTH + width * len(part)))
        for label, unit, texts in summarize_runs(part):
            if unit:
                label += f", {unit}"
            values = "".join(f"{text:>{width}}" for text in texts)
            lines.append(f"{label:{LABEL_WIDTH}.{LABEL_WIDTH}}{values}")
        lines.append("")
    megabytes = page_path.stat().st_size / 1e6
    lines.append(f"{page_path}  ({megabytes:.2f} MB, opens in any browser)")
    return "\n".join(line.rstrip() for line in lines)


def get_bits_per_byte(run: RunData) -> dict[str, float]:
    """Return bits per byte by source, of jax rather than of hf."""
    found: dict[str, float] = {}
    evaluations = list(run.evaluations.values())
    evaluations.sort(key=lambda result: result.backend != "jax")
    for result in evaluations:
        for score in result.scores:
            if score.task.startswith("bits_per_byte/") and score.metric == "bits_per_byte":
                found.setdefault(score.task.removeprefix("bits_per_byte/"), score.score)
    return found


def sum_seconds_by_stage(run: RunData) -> dict[str, float]:
    """Return the wall time of each stage of the run's own, its training and evaluations."""
    seconds: dict[str, float | None] = {}
    for kind, manifests in run.stages.items():
        seconds[kind] = sum(manifest.seconds or 0 for manifest in manifests)
    seconds["train"] = last_value(run.metrics.train, "seconds")
    if run.metrics.train and run.manifest:
        seconds["train"] = run.manifest.seconds
    seconds["eval"] = sum(result.seconds or 0 for result in run.evaluations.values())
    return {kind: value for kind, value in seconds.items() if value}


def render_summary(runs: list[RunData]) -> str:
    """Render a sentence per run and the summary's table."""
    html = ""
    for i, run in enumerate(runs):
        html += f'<p class="made">{color_swatch(i)}<span>{describe_run(run)}</span></p>'
    body = []
    for label, unit, texts in summarize_runs(runs):
        body.append([row_header(label, unit), *map(escape, texts)])
    heads = ["", *(escape(run.name) for run in runs)]
    return html + html_table(heads, body, SUMMARY_CAPTION)


def describe_run(run: RunData) -> str:
    """Describe in a sentence of HTML what a run made and from what."""
    size = "a model of unknown size (no spec.json)"
    if run.n_params:
        size = f"{format_count(run.n_params)} parameters"
    parts = [f"<strong>{escape(run.name)}</strong>: {size}"]
    if run.growth:
        start = f"grown from {short_model_name(run.growth.parent)}"
        if run.growth.at_step is not None:
            start = f"grown at step {format_whole(run.growth.at_step)}"
        parts.append(escape(f"{start} by {', '.join(run.growth.operators)}"))
    train = run.metrics.train
    if train:
        n_tokens = last_value(train, "n_tokens")
        seconds = last_value(train, "seconds")
        trained = f"trained {format_whole(train[-1].step)} steps"
        if n_tokens:
            trained += f" on {format_count(n_tokens)} tokens"
        if seconds:
            trained += f" in {format_seconds(seconds)}"
        parts.append(trained)
        parts.append("loss " + format_loss_change(run).replace(" ", "&nbsp;"))
    return ", ".join(parts) + "."
