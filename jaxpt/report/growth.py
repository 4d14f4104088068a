"""Section: the verification of a growth."""

from __future__ import annotations

import itertools

from jaxpt.report.figures import curves, figure, pairs
from jaxpt.report.markup import details, esc, grid, key_of, of_runs, row_head, small
from jaxpt.report.read import RunData, distinct, domains_of, in_order
from jaxpt.report.words import MAX_TEXT, clip, count, decimal, signed, told, whole

MAX_TWINS = 12  # pairs of copied layers


def section(runs: list[RunData]) -> str:
    parts = []
    for found, names in distinct(runs, "growth"):
        when = "" if found["at_step"] is None else f", at step {whole(found['at_step'])} of the run"
        parts.append(f"<h3>{esc(', '.join(found['operators']) + when)}{of_runs(names, runs)}</h3>")
        health, _, why = found["verdict"].replace("->", "\u2192").rstrip(".").partition(":")
        parts.append(f"<p><strong>{esc(health[:1].upper() + health[1:])}</strong>{esc(f':{why}' if why else '')}.</p>")
        columns = [growth_map(found), growth_facts(found, domains_of(runs))]
        columns[len(found["layer_map"]) > 14] += growth_twins(found)  # below the shorter of the two
        parts.append(f'<div class="split"><div>{columns[0]}</div><div>{columns[1]}</div></div>' if columns[0] else columns[1])
        parts.append(growth_layers(found))
    return "".join(parts)


def growth_map(found: dict) -> str:
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
            f'<text x="{x + wide / 2}" y="{y + row / 2 + 2:.0f}" text-anchor="middle">{esc(label)}</text>'
        )

    cells = [cell(0, top(i, n_parent), f"layer {i}", "" if i in sources else "unused") for i in range(n_parent)]
    lines = []
    for i, source in enumerate(sources):
        kind = "new" if i in new else ""
        cells.append(cell(right, top(i, n_child), f"{i} new" if source is None else f"{i} from {source}", kind))
        if source is not None:
            y0, y1, middle = top(source, n_parent) + row / 2 - 2, top(i, n_child) + row / 2 - 2, (wide + right) / 2
            lines.append(f'<path class="{kind}" d="M{wide + 2} {y0:.0f} C{middle} {y0:.0f} {middle} {y1:.0f} {right} {y1:.0f}"/>')
    alt = f"{n_parent} layers became {n_child}; child layers come from parent layers {told(['none' if source is None else source for source in sources])}"
    alt += f"; new are child layers {told(new)}" if new else ""
    heads = f'<text x="0" y="12">parent</text><text x="{right}" y="12">child</text>'
    caption = "Layer 0 reads the embedding." + (" Coloured: new layers." if new else "")
    caption += " Dashed: left out." if set(range(n_parent)) - set(sources) else ""
    size = f'width="{right + wide + 2}" height="{row * n_rows + 24}"'
    picture = f'<svg class="map" role="img" aria-label="{esc(alt)}" {size}>{heads}{"".join(lines + cells)}</svg>'
    return f"<figure>{picture}<figcaption>{esc(caption)}</figcaption></figure>"


def growth_facts(found: dict, domains: list[str]) -> str:
    """Sizes and held-out losses of parent and newborn, and what else is known in a sentence."""
    labels = {"n_layers": "layers", "d_model": "width", "d_ff": "feed-forward width", "n_heads": "heads", "n_kv_heads": "key-value heads"}
    labels |= {"d_head": "head width", "vocab_size": "vocabulary"}
    sizes = [("parameters", count, found["n_params"]), ("FLOPs a token", count, found["flops_per_token"] or {})]
    sizes += [(label, whole, {who: found["spec"][who].get(key) for who in ("parent", "child")}) for key, label in labels.items()]
    rows = []
    for label, as_text, of in sizes:
        before, after = of.get("parent"), of.get("child")
        if before != after or label in ("parameters", "layers"):
            rows.append([label, as_text(before), as_text(after), f"\u00d7 {after / before:.2f}"])
    loss, probe = found["heldout_loss"], found["probe"]
    steps = f"{whole(probe['steps'])} steps" if probe else ""
    for label, both in (("loss at birth", loss), (f"loss after {steps}", probe)):
        rows += [[label, "", "", ""]] if both else []
        for name in in_order(domains, both["parent"]) if both else ():
            before, after = both["parent"][name], both["newborn"][name]
            rows.append([row_head("  " + name), f"{before:.3f}", f"{after:.3f}", signed(after - before)])
    caption = f"Held-out loss, nats per token, on {whole(found['heldout_rows'])} rows, at birth" if loss else "Held-out loss at birth: not measured"
    caption += f"; then after a probe, the same {steps} of training for both." if probe else "."
    facts = [f"The operators {'' if found['preserves_function'] else 'do not '}preserve the function."]
    difference = found["max_logit_difference"]
    facts += [f"Largest difference of a logit from the parent's: {difference:.3g}."] if difference is not None else []
    facts += [f"The optimizer's moments: {found['moments']}."] if found["moments"] else []
    seen = [small(clip(f"Measured {key.replace('_', ' ')}: {told(value)}", MAX_TEXT)) for key, value in found["measured"].items()]
    table = grid(["", "parent", "newborn", "change"], rows, caption + " The loss at birth does not rank operators.")
    return table + small(" ".join(facts)) + "".join(seen)


def growth_layers(found: dict) -> str:
    """What each layer does to the residual stream, the parent's beside the newborn's."""
    layers, who = found["layers"], ["parent", "newborn"]
    if not layers:
        return ""
    figures = []
    for key, title, says, scale in (
        ("rms", "Residual stream", "RMS after each layer. Log scale.", "log"),
        ("influence", "Block influence", "1 \u2212 mean cosine between what enters a layer and what leaves it (ShortGPT).", "linear"),
    ):
        series = [(name, [(i, layer[key]) for i, layer in enumerate(layers[name])]) for name in who]
        dots = [("newborn", [(i, layers["newborn"][i][key]) for i in found["new_layers"]])]
        plot = curves(who, series, title.lower(), 200, x="layer", dots=dots, scale=scale)
        figures.append(figure(plot, says + (" Dots: new layers." if found["new_layers"] else ""), title))
    both = enumerate(itertools.zip_longest(*(layers[name] for name in who), fillvalue={}))
    body = [[str(i), *(decimal(layer.get(key)) for key in ("rms", "influence") for layer in pair)] for i, pair in both]
    heads = ["layer", "RMS, parent", "newborn", "influence, parent", "newborn"]
    return key_of(who) + pairs(figures) + details("The numbers", grid(heads, body))


def growth_twins(found: dict) -> str:
    """Copies of one parent layer, those that differ most first."""
    twins = sorted(found["twins"] or [], key=lambda twin: twin["cosine"])
    body = [[whole(twin["source"]), esc(told(twin["layers"])), f"{twin['cosine']:.3f}"] for twin in twins[:MAX_TWINS]]
    caption = f"Cosine between what both copies write, mean over tokens; 1: they still do the same. Lowest first, {len(body)} of {len(twins)}."
    return grid(["parent layer", "copies", "cosine"], body, caption) if body else ""
