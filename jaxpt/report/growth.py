"""Render the section Growth: how a model was grown, and how the child compares with its parent."""

from __future__ import annotations

import itertools

from jaxpt.report.figures import plot_curves, render_figure, render_figure_grid
from jaxpt.report.format import (
    MAX_TEXT,
    clip_text,
    format_count,
    format_decimal,
    format_signed,
    format_value,
    format_whole,
)
from jaxpt.report.html import (
    collapsible,
    color_legend,
    escape,
    heading,
    html_table,
    name_owners,
    row_header,
    small_text,
)
from jaxpt.report.read import RunData, group_distinct_values, list_sources, order_keys
from jaxpt.report.records import Growth, LossPair

MAX_COPY_PAIRS = 12  # shown of all pairs of copied layers
# more layers than this make a map that is taller than the tables beside it
TALL_MAP_LAYERS = 14
CELL_WIDTH, CHILD_X = 84, 190  # of the layer map, in pixels
SIZE_LABELS = {
    "n_layers": "layers",
    "d_model": "width",
    "d_ff": "feed-forward width",
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


def render_growth(runs: list[RunData]) -> str:
    """Render each growth: verdict, layer map, sizes, losses and layers."""
    html = ""
    for growth, names in group_distinct_values(runs, lambda run: run.growth):
        title = ", ".join(growth.operators)
        if growth.at_step is not None:
            title += f", at step {format_whole(growth.at_step)} of the run"
        html += heading(title + name_owners(names, runs))
        html += render_verdict(growth.verdict)
        layer_map = render_layer_map(growth)
        comparison = render_growth_comparison(growth, list_sources(runs))
        copies = render_copy_similarity(growth)
        if len(growth.layer_map) > TALL_MAP_LAYERS:  # below the shorter of the two
            comparison += copies
        else:
            layer_map += copies
        if layer_map:
            html += f'<div class="split"><div>{layer_map}</div><div>{comparison}</div></div>'
        else:
            html += comparison
        html += render_layer_plots(growth)
    return html


def render_verdict(verdict: str) -> str:
    """Render "health: reason", the health in bold."""
    health, colon, reason = verdict.replace("->", "\u2192").rstrip(".").partition(":")
    bold = escape(health[:1].upper() + health[1:])
    return f"<p><strong>{bold}</strong>{escape(colon + reason)}.</p>"


def render_layer_map(growth: Growth) -> str:
    """Draw a line from each parent layer to its copies; "" if every layer stayed in place."""
    sources = growth.layer_map
    new_layers = growth.new_layers
    n_parent = growth.spec.parent.n_layers
    n_child = len(sources)
    if sources == tuple(range(n_parent)):
        return ""
    n_lines = max(n_parent, n_child)
    height = 24 if n_lines <= 24 else 14  # of a layer, in pixels

    def top(i: int, n_layers: int) -> float:
        return 24 + height * i + height * (n_lines - n_layers) / 2

    def cell(x: int, y: float, label: str, css_class: str) -> str:
        size = f'y="{y:.0f}" width="{CELL_WIDTH}" height="{height - 4}" rx="3"'
        at = f'x="{x + CELL_WIDTH / 2}" y="{y + height / 2 + 2:.0f}" text-anchor="middle"'
        box = f'<rect class="{css_class}" x="{x + 1}" {size}/>'
        return f"{box}<text {at}>{escape(label)}</text>"

    cells, lines = "", ""
    for i in range(n_parent):
        css_class = "" if i in sources else "unused"
        cells += cell(0, top(i, n_parent), f"layer {i}", css_class)
    middle = (CELL_WIDTH + CHILD_X) / 2
    for i, source in enumerate(sources):
        css_class = "new" if i in new_layers else ""
        label = f"{i} new" if source is None else f"{i} from {source}"
        y = top(i, n_child)
        cells += cell(CHILD_X, y, label, css_class)
        if source is not None:
            start = f"{top(source, n_parent) + height / 2 - 2:.0f}"
            end = f"{y + height / 2 - 2:.0f}"
            curve = f"C{middle} {start} {middle} {end} {CHILD_X} {end}"
            lines += f'<path class="{css_class}" d="M{CELL_WIDTH + 2} {start} {curve}"/>'
    heads = f'<text x="0" y="12">parent</text><text x="{CHILD_X}" y="12">child</text>'
    caption = "Layer 0 reads the embedding."
    caption += " Colored: new layers." if new_layers else ""
    caption += " Dashed: left out." if set(range(n_parent)) - set(sources) else ""
    label = escape(describe_layer_map(growth))
    size = f'width="{CHILD_X + CELL_WIDTH + 2}" height="{height * n_lines + 24}"'
    picture = f'<svg class="map" role="img" aria-label="{label}" {size}>{heads}{lines}{cells}</svg>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def describe_layer_map(growth: Growth) -> str:
    """Describe the layer map for whoever cannot see it."""
    sources = ["none" if source is None else source for source in growth.layer_map]
    text = f"{growth.spec.parent.n_layers} layers became {len(sources)}; "
    text += f"child layers come from parent layers {format_value(sources)}"
    if growth.new_layers:
        text += f"; new are child layers {format_value(growth.new_layers)}"
    return text


def render_growth_comparison(growth: Growth, order: list[str]) -> str:
    """Render a table of sizes and held-out losses of parent and child, and further facts."""
    body = list_sizes(growth)
    probe = growth.probe
    n_steps = f"{format_whole(probe.n_steps)} steps" if probe else ""
    body += list_losses("loss right after growth", growth.heldout_loss, order)
    body += list_losses(f"loss after {n_steps}", probe, order)
    caption = "Held-out loss right after growth: not measured"
    if growth.heldout_loss:
        n_sequences = format_whole(growth.heldout_sequences)
        caption = f"Held-out loss, nats per token, on {n_sequences} sequences, right after growth"
    caption += f"; then after a probe, the same {n_steps} of training for both." if probe else "."
    caption += " The loss right after growth does not rank operators."
    facts = "The operators preserve the function."
    if not growth.preserves_function:
        facts = "The operators do not preserve the function."
    if growth.max_logit_difference is not None:
        facts += f" Largest difference from the parent's logits: {growth.max_logit_difference:.3g}."
    if growth.moments:
        facts += f" The optimizer's moments: {growth.moments}."
    html = html_table(["", "parent", "child", "change"], body, caption) + small_text(facts)
    for key, value in growth.measured.items():
        text = f"Measured {key.replace('_', ' ')}: {format_value(value)}"
        html += small_text(clip_text(text, MAX_TEXT))
    return html


def list_sizes(growth: Growth) -> list[list[str]]:
    """Return table rows of the sizes that changed, and of parameters and layers."""
    parent = growth.spec.parent
    child = growth.spec.child
    counts = growth.n_params
    body = [["parameters", format_count(counts.parent), format_count(counts.child)]]
    body[0].append(format_ratio(counts.parent, counts.child))
    flops = growth.flops_per_token
    if flops and flops.parent != flops.child:
        row = ["FLOPs per token", format_count(flops.parent), format_count(flops.child)]
        body.append([*row, format_ratio(flops.parent, flops.child)])
    for field, label in SIZE_LABELS.items():
        before = getattr(parent, field)
        after = getattr(child, field)
        if before != after or field == "n_layers":
            row = [label, format_whole(before), format_whole(after)]
            body.append([*row, format_ratio(before, after)])
    return body


def format_ratio(before: float, after: float) -> str:
    """Return × after / before."""
    return f"\u00d7 {after / before:.2f}"


def list_losses(label: str, losses: LossPair | None, order: list[str]) -> list[list[str]]:
    """Return table rows of the losses of each source, below a row with the label."""
    if not losses:
        return []
    body = [[label, "", "", ""]]
    for name in order_keys(order, losses.parent):
        before = losses.parent[name]
        after = losses.child[name]
        values = [f"{before:.3f}", f"{after:.3f}", format_signed(after - before)]
        body.append([row_header("  " + name), *values])
    return body


def render_layer_plots(growth: Growth) -> str:
    """Render what each layer does to the residual stream, the parent's beside the child's."""
    layers = growth.layers
    names = ["parent", "child"]
    if not layers:
        return ""
    figures = []
    for field, title, caption, scale in LAYER_METRICS:
        parent = [(i, getattr(stats, field)) for i, stats in enumerate(layers.parent)]
        child = [(i, getattr(stats, field)) for i, stats in enumerate(layers.child)]
        dots = [("child", [child[i] for i in growth.new_layers])]
        caption += " Dots: new layers." if growth.new_layers else ""
        series = [("parent", parent), ("child", child)]
        options = {"x_name": "layer", "dots": dots, "scale": scale}
        plot = plot_curves(names, series, title.lower(), 200, **options)
        figures.append(render_figure(plot, caption, title))
    body = []
    for i, pair in enumerate(itertools.zip_longest(layers.parent, layers.child)):
        row = [str(i)]
        for field in ("rms", "influence"):
            row += [format_decimal(getattr(stats, field, None)) for stats in pair]
        body.append(row)
    heads = ["layer", "RMS, parent", "child", "influence, parent", "child"]
    numbers = collapsible("The numbers", html_table(heads, body))
    return color_legend(names) + render_figure_grid(figures) + numbers


def render_copy_similarity(growth: Growth) -> str:
    """Render the pairs of copies of one parent layer, those that differ most first."""
    pairs = sorted(growth.copy_similarity or (), key=lambda pair: pair.cosine)
    if not pairs:
        return ""
    body = []
    for pair in pairs[:MAX_COPY_PAIRS]:
        layers = escape(format_value(pair.layers))
        body.append([format_whole(pair.source), layers, f"{pair.cosine:.3f}"])
    caption = (
        "Cosine between the outputs of both copies, mean over tokens; 1: they still do the same. "
        f"Lowest first, {len(body)} of {len(pairs)}."
    )
    return html_table(["parent layer", "copies", "cosine"], body, caption)
