"""Section: the verification of a growth."""

from __future__ import annotations

import itertools

from jaxpt.report.figures import plot_curves, render_figure, render_figure_pairs
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
    html_table,
    per_run,
    row_header,
    small_text,
)
from jaxpt.report.read import RunData, distinct_values, list_sources, order_keys

MAX_COPIES_SHOWN = 12  # pairs of copied layers


def growth_section(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct_values(runs, "growth"):
        when = (
            ""
            if found["at_step"] is None
            else f", at step {format_whole(found['at_step'])} of the run"
        )
        parts.append(
            f"<h3>{escape(', '.join(found['operators']) + when)}{per_run(names, runs)}</h3>"
        )
        health, _, why = found["verdict"].replace("->", "\u2192").rstrip(".").partition(":")
        parts.append(
            f"<p><strong>{escape(health[:1].upper() + health[1:])}</strong>{escape(f':{why}' if why else '')}.</p>"
        )
        columns = [render_layer_map(found), render_growth_facts(found, list_sources(runs))]
        columns[len(found["layer_map"]) > 14] += render_copy_similarity(
            found
        )  # below the shorter of the two
        parts.append(
            f'<div class="split"><div>{columns[0]}</div><div>{columns[1]}</div></div>'
            if columns[0]
            else columns[1]
        )
        parts.append(render_layer_plots(found))
    return "".join(parts)


def render_layer_map(found: dict) -> str:
    """A line from each parent layer to the child layers made from it; "" where every layer stayed where it was."""
    sources, new = found["layer_map"], found["new_layers"]
    n_parent, n_child = found["spec"]["parent"]["n_layers"], len(sources)
    if sources == list(range(n_parent)):
        return ""
    n_rows = max(n_parent, n_child)
    row, right, wide = 24 if n_rows <= 24 else 14, 190, 84

    def top(i, n):
        return 24 + row * i + row * (n_rows - n) / 2

    def cell(x, y, label, kind):
        return (
            f'<rect class="{kind}" x="{x + 1}" y="{y:.0f}" width="{wide}" height="{row - 4}" rx="3"/>'
            f'<text x="{x + wide / 2}" y="{y + row / 2 + 2:.0f}" text-anchor="middle">{escape(label)}</text>'
        )

    cells = [
        cell(0, top(i, n_parent), f"layer {i}", "" if i in sources else "unused")
        for i in range(n_parent)
    ]
    lines = []
    for i, source in enumerate(sources):
        kind = "new" if i in new else ""
        cells.append(
            cell(
                right, top(i, n_child), f"{i} new" if source is None else f"{i} from {source}", kind
            )
        )
        if source is not None:
            y0, y1, middle = (
                top(source, n_parent) + row / 2 - 2,
                top(i, n_child) + row / 2 - 2,
                (wide + right) / 2,
            )
            lines.append(
                f'<path class="{kind}" d="M{wide + 2} {y0:.0f} C{middle} {y0:.0f} {middle} {y1:.0f} {right} {y1:.0f}"/>'
            )
    alt = f"{n_parent} layers became {n_child}; child layers come from parent layers {format_value(['none' if source is None else source for source in sources])}"
    alt += f"; new are child layers {format_value(new)}" if new else ""
    heads = f'<text x="0" y="12">parent</text><text x="{right}" y="12">child</text>'
    caption = "Layer 0 reads the embedding." + (" Coloured: new layers." if new else "")
    caption += " Dashed: left out." if set(range(n_parent)) - set(sources) else ""
    size = f'width="{right + wide + 2}" height="{row * n_rows + 24}"'
    picture = f'<svg class="map" role="img" aria-label="{escape(alt)}" {size}>{heads}{"".join(lines + cells)}</svg>'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def render_growth_facts(found: dict, domains: list[str]) -> str:
    """Sizes and held-out losses of parent and newborn, and what else is known in a sentence."""
    labels = {
        "n_layers": "layers",
        "d_model": "width",
        "d_ff": "feed-forward width",
        "n_heads": "heads",
        "n_kv_heads": "key-value heads",
    }
    labels |= {"d_head": "head width", "vocab_size": "vocabulary"}
    sizes = [
        ("parameters", format_count, found["n_params"]),
        ("FLOPs a token", format_count, found["flops_per_token"] or {}),
    ]
    sizes += [
        (label, format_whole, {who: found["spec"][who].get(key) for who in ("parent", "child")})
        for key, label in labels.items()
    ]
    rows = []
    for label, as_text, of in sizes:
        before, after = of.get("parent"), of.get("child")
        if before != after or label in ("parameters", "layers"):
            rows.append([label, as_text(before), as_text(after), f"\u00d7 {after / before:.2f}"])
    loss, probe = found["heldout_loss"], found["probe"]
    steps = f"{format_whole(probe['steps'])} steps" if probe else ""
    for label, both in (("loss at birth", loss), (f"loss after {steps}", probe)):
        rows += [[label, "", "", ""]] if both else []
        for name in order_keys(domains, both["parent"]) if both else ():
            before, after = both["parent"][name], both["newborn"][name]
            rows.append(
                [
                    row_header("  " + name),
                    f"{before:.3f}",
                    f"{after:.3f}",
                    format_signed(after - before),
                ]
            )
    caption = (
        f"Held-out loss, nats per token, on {format_whole(found['heldout_rows'])} rows, at birth"
        if loss
        else "Held-out loss at birth: not measured"
    )
    caption += f"; then after a probe, the same {steps} of training for both." if probe else "."
    facts = [
        f"The operators {'' if found['preserves_function'] else 'do not '}preserve the function."
    ]
    difference = found["max_logit_difference"]
    facts += (
        [f"Largest difference of a logit from the parent's: {difference:.3g}."]
        if difference is not None
        else []
    )
    facts += [f"The optimizer's moments: {found['moments']}."] if found["moments"] else []
    seen = [
        small_text(clip_text(f"Measured {key.replace('_', ' ')}: {format_value(value)}", MAX_TEXT))
        for key, value in found["measured"].items()
    ]
    table = html_table(
        ["", "parent", "newborn", "change"],
        rows,
        caption + " The loss at birth does not rank operators.",
    )
    return table + small_text(" ".join(facts)) + "".join(seen)


def render_layer_plots(found: dict) -> str:
    """What each layer does to the residual stream, the parent's beside the newborn's."""
    layers, who = found["layers"], ["parent", "newborn"]
    if not layers:
        return ""
    figures = []
    for key, title, says, scale in (
        ("rms", "Residual stream", "RMS after each layer. Log scale.", "log"),
        (
            "influence",
            "Block influence",
            "1 \u2212 mean cosine between what enters a layer and what leaves it (ShortGPT).",
            "linear",
        ),
    ):
        series = [(name, [(i, layer[key]) for i, layer in enumerate(layers[name])]) for name in who]
        dots = [("newborn", [(i, layers["newborn"][i][key]) for i in found["new_layers"]])]
        plot = plot_curves(who, series, title.lower(), 200, x="layer", dots=dots, scale=scale)
        figures.append(
            render_figure(plot, says + (" Dots: new layers." if found["new_layers"] else ""), title)
        )
    both = enumerate(itertools.zip_longest(*(layers[name] for name in who), fillvalue={}))
    body = [
        [
            str(i),
            *(format_decimal(layer.get(key)) for key in ("rms", "influence") for layer in pair),
        ]
        for i, pair in both
    ]
    heads = ["layer", "RMS, parent", "newborn", "influence, parent", "newborn"]
    return (
        color_legend(who)
        + render_figure_pairs(figures)
        + collapsible("The numbers", html_table(heads, body))
    )


def render_copy_similarity(found: dict) -> str:
    """Copies of one parent layer, those that differ most first."""
    twins = sorted(found["twins"] or [], key=lambda twin: twin["cosine"])
    body = [
        [
            format_whole(twin["source"]),
            escape(format_value(twin["layers"])),
            f"{twin['cosine']:.3f}",
        ]
        for twin in twins[:MAX_COPIES_SHOWN]
    ]
    caption = f"Cosine between what both copies write, mean over tokens; 1: they still do the same. Lowest first, {len(body)} of {len(twins)}."
    return html_table(["parent layer", "copies", "cosine"], body, caption) if body else ""
