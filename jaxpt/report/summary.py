"""Describe runs as a whole: their numbers, what they were made from, their settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxpt import config, io, stage
from jaxpt.lineage import STAGES, LineageNode
from jaxpt.report import head, read
from jaxpt.report.figures import Cell, Table, series_color
from jaxpt.report.format import (
    clip_text,
    format_brief,
    format_change,
    format_count,
    format_decimal,
    format_seconds,
    format_whole,
)
from jaxpt.report.read import RunData
from jaxpt.report.records import Funnel, PackedCounts
from jaxpt.spec import encode_json
from jaxpt.text import format_table

MAX_RUNS_PER_TABLE = 3  # on the terminal, as the next three
MAX_LABEL = 24
MAX_RUN_NAME = 16
MIN_COLUMN = 15
NODE_HEIGHT = 68  # pixels of a stage in the picture of the lineage


class SummaryRow(NamedTuple):
    """A row of the summary. Two leading spaces put a label into the group above it."""

    label: str
    unit: str
    texts: list[str]  # one per run


class Summary(NamedTuple):
    """What the section Numbers shows."""

    outcomes: Table | None  # a row per run, of several
    table: Table


def make_summary(runs: list[RunData]) -> Summary:
    """Return what became of each run, and the table of their numbers."""
    rows = []
    for label, unit, texts in summarize_runs(runs):
        name = Cell(label.strip(), unit, is_indented=label.startswith("  "))
        rows.append([name, *texts])
    heads = ["", *(run.name for run in runs)]
    return Summary(head.make_outcomes(runs), Table(heads, rows))


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
        keys = read.order_keys([*read.list_sources(runs), *STAGES], keys)
        if keys:
            rows.append(SummaryRow(label, unit, ["" for _ in runs]))
        for key in keys:
            texts = [format_number(value.get(key)) for value in values]
            if any(texts):
                rows.append(SummaryRow(f"  {key}", "", texts))

    add("parameters", "", lambda run: format_count(run.n_params))
    add("layers × width", "", read.format_shape)
    add("steps", "", lambda run: format_whole(read.last_value(run.metrics.train, "step")))
    add("tokens", "", lambda run: format_count(read.last_value(run.metrics.train, "n_tokens")))
    add("FLOPs", "", lambda run: format_count(read.last_value(run.metrics.train, "flops")))
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
    add("cost", "USD", lambda run: format_decimal(read.last_value(run.metrics.train, "usd"), 2))
    return rows


def format_loss_change(run: RunData) -> str:
    """Return first → last training loss."""
    train = run.metrics.train
    return format_change(read.first_value(train, "loss"), read.last_value(train, "loss"))


def format_summary_table(runs: list[RunData], page_path: io.Path) -> str:
    """Return the summary as text of at most 80 columns that ends in the page's path."""
    parts = []
    for start in range(0, len(runs), MAX_RUNS_PER_TABLE):
        part = runs[start : start + MAX_RUNS_PER_TABLE]
        rows = [["", *(clip_text(run.name, MAX_RUN_NAME) for run in part)]]
        for label, unit, texts in summarize_runs(part):
            label = f"{label}, {unit}" if unit else label
            rows.append([clip_text(label, MAX_LABEL), *texts])
        heads, *lines = format_table(rows, gap=" ", min_width=MIN_COLUMN).splitlines()
        rule = "\u2500" * len(heads)
        parts.append("\n".join([heads, rule, *lines, ""]))
    megabytes = (io.size(page_path) or 0) / 1e6
    parts.append(f"{page_path}  ({megabytes:.2f} MB, opens in any browser)")
    return "\n".join(parts)


def get_bits_per_byte(run: RunData) -> dict[str, float]:
    """Return bits per byte by source, of jax rather than of hf."""
    found: dict[str, float] = {}
    evaluations = list(run.evaluations.values())
    evaluations.sort(key=lambda result: result.backend != "jax")
    for result in evaluations:
        for score in result.scores:
            is_of_text = score.task.startswith("bits_per_byte/")
            if is_of_text and score.metric == "bits_per_byte" and score.score is not None:
                found.setdefault(score.task.removeprefix("bits_per_byte/"), score.score)
    return found


def sum_seconds_by_stage(run: RunData) -> dict[str, float]:
    """Return the wall time of each stage of the run's own, its training and evaluations."""
    seconds: dict[str, float | None] = {}
    for kind, manifests in run.stages.items():
        seconds[kind] = sum(manifest.seconds or 0 for manifest in manifests)
    seconds["train"] = read.last_value(run.metrics.train, "seconds")
    if run.metrics.train and run.manifest:
        seconds["train"] = run.manifest.seconds
    seconds["eval"] = sum(result.seconds or 0 for result in run.evaluations.values())
    return {kind: value for kind, value in seconds.items() if value}


# ---- lineage


class StageItem(NamedTuple):
    """A stage in the picture of the lineage."""

    name: str
    size: str
    path: str
    facts: list[tuple[str, str]]  # each with what a narrow screen leaves out
    y: int  # pixels
    color: str


class Lineage(NamedTuple):
    """What the section Lineage shows: stages, oldest first, joined by lines."""

    stages: list[StageItem]
    lines: list[str]  # SVG paths
    x: int  # of the stages' dots, in pixels as the next two
    width: int
    height: int


def make_lineage(runs: list[RunData]) -> Lineage | None:
    """Return the stages behind all runs and exports; None if no stage has finished."""
    by_key: dict[str, LineageNode] = {}
    for run in runs:
        for node in (*run.lineage_nodes, *run.export_nodes):
            by_key[node.key] = node
    nodes = list(by_key.values())
    if not any(node.manifest for node in nodes):
        return None
    owners = {run.lineage_nodes[-1].key: i for i, run in enumerate(runs)}
    index = {node.key: i for i, node in enumerate(nodes)}
    longest = 0  # most nodes that a line passes
    for node in nodes:
        for parent in node.parents:
            longest = max(longest, index[node.key] - index[parent] - 1)
    margin = min(64, 16 * longest)
    x = 8 + margin
    lines = []
    stages = []
    for i, node in enumerate(nodes):
        y = i * NODE_HEIGHT + 22
        for parent in node.parents:
            top = index[parent] * NODE_HEIGHT + 22
            # a cubic reaches 3/4 of the way to its control points
            bend = margin * (i - index[parent] - 1) / max(1, longest) * 4 / 3
            lines.append(f"M{x} {top} C{x - bend} {top + 18} {x - bend} {y - 18} {x} {y}")
        owner = owners.get(node.key)
        run = None if owner is None else runs[owner]
        color = "var(--dim)" if owner is None else series_color(owner)
        stages.append(describe_node(node, run, y, color))
    return Lineage(stages, lines, x, x + 10, len(nodes) * NODE_HEIGHT)


def describe_node(node: LineageNode, run: RunData | None, y: int, color: str) -> StageItem:
    """Return a stage's name, size, fingerprint, date and time."""
    manifest = read.summarize_stage(node)
    facts = [("no manifest there", "")]
    name = run.name if run else node.path.name
    if manifest:
        date, _, clock = manifest.created[:16].partition("T")
        facts = [(node.key[:8], node.key[8:])]
        if date:
            facts.append((date, f" {clock}"))
        facts.append((format_seconds(manifest.seconds), ""))
        if manifest.stage == "export" and not run:
            name = "/".join(node.path.parts[-2:])
    if node.has_changed:
        facts.append(("replaced since it was read", ""))
    facts = [fact for fact in facts if any(fact)]
    size = describe_run_size(run) if run else describe_stage_size(node)
    return StageItem(name, size, str(node.path), facts, y, color)


def describe_run_size(run: RunData) -> str:
    """Describe the size of a run's model."""
    n_params = f"{format_count(run.n_params)} parameters" if run.n_params else ""
    return ", ".join(filter(None, [n_params, read.format_shape(run)]))


def describe_stage_size(node: LineageNode) -> str:
    """Describe what a stage made in a few words."""
    manifest = read.summarize_stage(node)
    counts = manifest.counts if manifest else {}
    if node.funnel:
        kept = Funnel.from_json(encode_json(node.funnel)).train.values()
        n_documents = sum(amount.n_documents for amount in kept)
        n_bytes = sum(amount.n_bytes for amount in kept)
        return f"{format_whole(n_documents)} documents, {format_brief(n_bytes / 1e6)} MB"
    if node.kind == "tokenizer":
        return f"{format_whole(counts.get('vocab_size'))} tokens"
    if node.kind == "samples" and counts:
        return f"{format_whole(counts.get('n_samples'))} samples per token"
    if node.kind == "packed" and counts:
        packed = PackedCounts.from_json(counts)
        n_tokens = sum(source.n_tokens for source in packed.train.values())
        seq_len = format_whole(packed.seq_len)
        return f"{format_count(n_tokens)} tokens, sequences of {seq_len}"
    text = f"{format_count(counts['n_params'])} parameters" if "n_params" in counts else ""
    if "bytes" in counts:
        text += f", {format_brief(counts['bytes'] / 1e6)} MB in Hugging Face format"
    return text


# ---- settings


class Code(NamedTuple):
    """A cell of code, which may be broken into lines after a mark."""

    text: str
    mark: str = "/"


def make_settings(runs: list[RunData]) -> Table | None:
    """Return the settings that differ between runs, or of one run from the defaults."""
    settings = {run.name: run.settings for run in runs if run.settings}
    if not settings:
        return None
    caption = "Settings that differ between the runs; all others are equal."
    if len(settings) == 1:
        defaults = read.flatten_settings(stage.to_jsonable(config.Config()))
        settings = {"default": defaults, **settings}
        caption = "Settings that differ from the defaults; configs/base.py explains each."
    keys = []
    for values in settings.values():
        keys += values
    rows = []
    for key in dict.fromkeys(keys):
        cells = [format_code(values.get(key)) for values in settings.values()]
        if len(set(cells)) > 1:
            rows.append([Code(key, "."), *cells])
    heads = ["", *settings]
    return Table(heads, rows, caption, n_text_columns=len(heads))


def format_code(value: Any) -> Code | None:
    """Return a JSON value as code; None for None."""
    if value is None:
        return None
    return Code(clip_text(json.dumps(value), 200))
