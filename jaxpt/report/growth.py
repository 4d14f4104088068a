"""Describe how a model was grown, and how the child compares with its parent."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jaxpt.report import read
from jaxpt.report.figures import Cell, Figure, Palette, Table, color_runs, plot_curves
from jaxpt.report.format import (
    MAX_TEXT,
    clip_text,
    format_count,
    format_decimal,
    format_signed,
    format_value,
    format_whole,
)
from jaxpt.report.read import RunData
from jaxpt.report.records import Growth, LossPair

MAX_COPY_PAIRS = 12  # shown of all pairs of copied layers
# more layers than this make a map that is taller than the tables beside it
TALL_MAP_LAYERS = 14
CELL_WIDTH, CHILD_X = 84, 190  # of the layer map, in pixels
SIZE_LABELS = {
    "n_layers": "layers",
    "d_model": "width",
    "d_ff": "feed-forward width",
    "n_experts": "experts",
    "n_experts_per_token": "experts per token",
    "d_shared": "shared expert's width",
    "n_heads": "heads",
    "n_kv_heads": "key-value heads",
    "d_head": "head width",
    "vocab_size": "vocabulary",
}
LAYER_METRICS = (
    # field of LayerStats, title, caption, scale
    ("rms", "Residual stream", "RMS after each layer. Log scale.", "log"),
    (
        "influence",
        "Block influence",
        "1 \u2212 mean cosine between a layer's input and its output (ShortGPT).",
        "linear",
    ),
)


class MapBox(NamedTuple):
    """A layer in the map, in pixels."""

    css_class: str
    x: int
    y: float
    height: int
    label: str
    width: int = CELL_WIDTH


class MapLine(NamedTuple):
    """A line from a parent's layer to its copy."""

    css_class: str
    path: str  # of SVG


class LayerMap(NamedTuple):
    """Which layer comes from which, as a picture."""

    boxes: list[MapBox]
    lines: list[MapLine]
    height: int
    caption: str
    label: str  # for whoever cannot see it
    width: int = CHILD_X + CELL_WIDTH + 2
    child_x: int = CHILD_X


class GrowthView(NamedTuple):
    """What the page shows of a growth."""

    title: str
    health: str
    reason: str
    map: LayerMap | None  # None: every layer stayed in place
    is_tall: bool  # the map is taller than the tables beside it
    table: Table  # of parent and child
    facts: list[str]
    copies: Table | None
    models: Palette  # parent and child
    plots: list[Figure]  # of the layers
    layers: Table  # their numbers


def make_growth(runs: list[RunData]) -> list[GrowthView]:
    """Return each growth: verdict, layer map, sizes, losses and layers."""
    views = []
    for growth, names in read.group_distinct_values(runs, lambda run: run.growth):
        title = ", ".join(growth.operators)
        if growth.at_step is not None:
            title += f", at step {format_whole(growth.at_step)} of the run"
        verdict = growth.verdict.replace("->", "\u2192").rstrip(".")
        health, colon, reason = verdict.partition(":")
        models = color_models(growth, names[0], runs)
        view = GrowthView(
            title=title + read.name_owners(names, runs),
            health=health[:1].upper() + health[1:],
            reason=colon + reason,
            map=draw_layer_map(growth),
            is_tall=len(growth.layer_map) > TALL_MAP_LAYERS,
            table=compare_models(growth, read.list_sources(runs)),
            facts=list_facts(growth),
            copies=make_copy_table(growth),
            models=models,
            plots=plot_layers(growth, models),
            layers=make_layer_table(growth),
        )
        views.append(view)
    return views


def draw_layer_map(growth: Growth) -> LayerMap | None:
    """Draw a line from each parent layer to its copies; None if every layer stayed in place."""
    sources = growth.layer_map
    new_layers = growth.new_layers
    n_parent = growth.spec.parent.n_layers
    n_child = len(sources)
    if sources == tuple(range(n_parent)):
        return None
    n_lines = max(n_parent, n_child)
    height = 24 if n_lines <= 24 else 14  # of a layer, in pixels

    def top(i: int, n_layers: int) -> float:
        return 24 + height * i + height * (n_lines - n_layers) / 2

    boxes = []
    lines = []
    for i in range(n_parent):
        css_class = "" if i in sources else "unused"
        boxes.append(MapBox(css_class, 0, top(i, n_parent), height, f"layer {i}"))
    middle = (CELL_WIDTH + CHILD_X) / 2
    for i, source in enumerate(sources):
        css_class = "new" if i in new_layers else ""
        label = f"{i} new" if source is None else f"{i} from {source}"
        y = top(i, n_child)
        boxes.append(MapBox(css_class, CHILD_X, y, height, label))
        if source is not None:
            start = f"{top(source, n_parent) + height / 2 - 2:.0f}"
            end = f"{y + height / 2 - 2:.0f}"
            curve = f"C{middle} {start} {middle} {end} {CHILD_X} {end}"
            lines.append(MapLine(css_class, f"M{CELL_WIDTH + 2} {start} {curve}"))
    caption = "Layer 0 reads the embedding."
    caption += " Colored: new layers." if new_layers else ""
    caption += " Dashed: left out." if set(range(n_parent)) - set(sources) else ""
    return LayerMap(boxes, lines, height * n_lines + 24, caption, describe_layer_map(growth))


def describe_layer_map(growth: Growth) -> str:
    """Describe the layer map for whoever cannot see it."""
    sources = ["none" if source is None else source for source in growth.layer_map]
    text = f"{growth.spec.parent.n_layers} layers became {len(sources)}; "
    text += f"child layers come from parent layers {format_value(sources)}"
    if growth.new_layers:
        text += f"; new are child layers {format_value(growth.new_layers)}"
    return text


def compare_models(growth: Growth, order: list[str]) -> Table:
    """Return a table of sizes and held-out losses of parent and child."""
    rows = list_sizes(growth)
    probe = growth.probe
    n_steps = f"{format_whole(probe.n_steps)} steps" if probe else ""
    rows += list_losses("loss right after growth", growth.heldout_loss, order)
    rows += list_losses(f"loss after {n_steps}", probe, order)
    caption = "Held-out loss right after growth: not measured"
    if growth.heldout_loss:
        n_sequences = format_whole(growth.heldout_sequences)
        caption = f"Held-out loss, nats per token, on {n_sequences} sequences, right after growth"
    if probe:
        caption += f"; then after a probe, the same {n_steps} of training for both"
        if probe.n_sequences and probe.n_sequences != growth.heldout_sequences:
            caption += f", on {format_whole(probe.n_sequences)} sequences"
    caption += "."
    caption += " The loss right after growth does not rank operators."
    return Table(["", "parent", "child", "change"], rows, caption)


def list_facts(growth: Growth) -> list[str]:
    """Return what the operators promise, and what they measured."""
    facts = "The operators preserve the function."
    if not growth.preserves_function:
        facts = "The operators do not preserve the function."
    if growth.max_logit_difference is not None:
        facts += f" Largest difference from the parent's logits: {growth.max_logit_difference:.3g}."
    if growth.moments:
        facts += f" The optimizer's moments: {growth.moments}."
    measured = []
    for key, value in growth.measured.items():
        text = f"Measured {key.replace('_', ' ')}: {format_value(value)}"
        measured.append(clip_text(text, MAX_TEXT))
    return [facts, *measured]


def list_sizes(growth: Growth) -> list[list[str | Cell]]:
    """Return table rows of the sizes that changed, and of parameters and layers."""
    parent = growth.spec.parent
    child = growth.spec.child
    counts = growth.n_params
    row: list[str | Cell] = ["parameters"]
    row += [format_count(counts.parent), format_count(counts.child)]
    rows = [[*row, format_ratio(counts.parent, counts.child)]]
    flops = growth.flops_per_token
    if flops and flops.parent != flops.child:
        row = ["FLOPs per token", format_count(flops.parent), format_count(flops.child)]
        rows.append([*row, format_ratio(flops.parent, flops.child)])
    for field, label in SIZE_LABELS.items():
        before = getattr(parent, field)
        after = getattr(child, field)
        if before != after or field == "n_layers":
            row = [label, format_whole(before), format_whole(after)]
            rows.append([*row, format_ratio(before, after)])
    return rows


def format_ratio(before: float, after: float) -> str:
    """Return × after / before, nothing where there was none before."""
    if not before:
        return ""
    return f"\u00d7 {after / before:.2f}"


def list_losses(label: str, losses: LossPair | None, order: list[str]) -> list[list[str | Cell]]:
    """Return table rows of the losses of each source, below a row with the label."""
    if not losses:
        return []
    rows: list[list[str | Cell]] = [[label, "", "", ""]]
    for name in read.order_keys(order, losses.parent):
        before = losses.parent[name]
        after = losses.child[name]
        values = [f"{before:.3f}", f"{after:.3f}", format_signed(after - before)]
        rows.append([Cell(name, is_indented=True), *values])
    return rows


def color_models(growth: Growth, child: str, runs: list[RunData]) -> Palette:
    """Return the colors of parent and child: those of the runs that they are."""
    colors = color_runs(runs)
    i = read.get_run_index(growth.parent, runs)
    parent_color = "var(--dim)"
    if i < len(runs) and colors.names[i] != child:
        parent_color = colors.colors[i]
    return Palette(["parent", "child"], [parent_color, colors.colors[colors.names.index(child)]])


def plot_layers(growth: Growth, models: Palette) -> list[Figure]:
    """Plot what each layer does to the residual stream, the parent's beside the child's."""
    layers = growth.layers
    if not layers:
        return []
    figures = []
    for field, title, caption, scale in LAYER_METRICS:
        parent = [(i, getattr(stats, field)) for i, stats in enumerate(layers.parent)]
        child = [(i, getattr(stats, field)) for i, stats in enumerate(layers.child)]
        dots = [("child", [child[i] for i in growth.new_layers])]
        caption += " Dots: new layers." if growth.new_layers else ""
        series = [("parent", parent), ("child", child)]
        options = {"x_name": "layer", "dots": dots, "scale": scale}
        plot = plot_curves(models, series, title.lower(), 200, **options)
        figures.append(Figure(plot, caption, title))
    return figures


def make_layer_table(growth: Growth) -> Table:
    """Return the numbers of `plot_layers`."""
    rows = []
    layers = growth.layers
    pairs = itertools.zip_longest(layers.parent, layers.child) if layers else ()
    for i, pair in enumerate(pairs):
        row = [str(i)]
        for field in ("rms", "influence"):
            row += [format_decimal(getattr(stats, field, None)) for stats in pair]
        rows.append(row)
    return Table(["layer", "RMS, parent", "child", "influence, parent", "child"], rows)


def make_copy_table(growth: Growth) -> Table | None:
    """Return the pairs of copies of one parent layer, those that differ most first."""
    pairs = sorted(growth.copy_similarity or (), key=lambda pair: pair.cosine)
    if not pairs:
        return None
    rows = []
    for pair in pairs[:MAX_COPY_PAIRS]:
        layers = format_value(pair.layers)
        rows.append([format_whole(pair.source), layers, f"{pair.cosine:.3f}"])
    caption = (
        "Cosine between the outputs of both copies, mean over tokens; 1: they still do the same. "
        f"Lowest first, {len(rows)} of {len(pairs)}."
    )
    return Table(["parent layer", "copies", "cosine"], rows, caption)
