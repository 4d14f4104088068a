"""Section: what was made from what, as a picture."""

from __future__ import annotations

from jaxpt.lineage import LineageNode
from jaxpt.report.format import format_brief, format_count, format_seconds, format_whole, sum_key
from jaxpt.report.html import escape, series_color, small_text
from jaxpt.report.read import RunData, format_shape, n_params


def lineage_section(runs: list[RunData]) -> str:
    nodes = list({node.key: node for run in runs for node in (*run.nodes, *run.exports)}.values())
    if not any(node.manifest for node in nodes):
        return ""
    at = {node.key: i for i, node in enumerate(nodes)}
    named = {run.nodes[-1].key: (i, run) for i, run in enumerate(runs)}
    far = max(
        (at[node.key] - at[parent] - 1 for node in nodes for parent in node.parents), default=0
    )
    row, x = 68, 8 + min(64, 16 * far)
    arcs, dots, items = [], [], []
    for node in nodes:
        y = at[node.key] * row + 22
        for parent in node.parents:
            above, skipped = at[parent] * row + 22, at[node.key] - at[parent] - 1
            bend = (
                (x - 8) * skipped / max(1, far) * 4 / 3
            )  # a cubic reaches 3/4 of the way to its control points
            arcs.append(
                f'<path d="M{x} {above} C{x - bend} {above + 18} {x - bend} {y - 18} {x} {y}"/>'
            )
        i, run = named.get(node.key, (None, None))
        dots.append(
            f'<circle cx="{x}" cy="{y}" r="6" style="fill:{series_color(i) if run else "var(--muted)"}"/>'
        )
        items.append(f"<li>{render_lineage_entry(node, run)}</li>")
    picture = f'<svg aria-hidden="true" width="{x + 10}" height="{len(nodes) * row}">{"".join(arcs + dots)}</svg>'
    caption = "The oldest at the top; a line leads from what was read to what was made of it. In grey: fingerprint, date (UTC), time it took."
    return f'<div class="lineage">{picture}<ol>{"".join(items)}</ol></div>{small_text(caption)}'


def render_lineage_entry(node: LineageNode, run: RunData | None) -> str:
    manifest = node.manifest or {}
    date, _, clock = manifest.get("created", "")[:16].partition("T")
    facts = [
        f'{escape(node.key[:8])}<span class="clock">{escape(node.key[8:])}</span>'
        if manifest
        else "no manifest there",
        f'{escape(date)}<span class="clock"> {escape(clock)}</span>' if date else "",
        format_seconds(manifest.get("seconds")),
        "made anew since it was read" if node.has_changed else "",
    ]
    exported = manifest.get("stage") == "export"
    name = run.name if run else "/".join(node.path.parts[-2:]) if exported else node.path.name
    return f'<b>{escape(name)}</b> <span>{escape(format_node_size(node, run))}</span><br><small title="{escape(node.path)}">{" · ".join(filter(None, facts))}</small>'


def format_node_size(node: LineageNode, run: RunData | None) -> str:
    """What a stage made, in a few words."""
    if run:
        return ", ".join(
            filter(
                None,
                [
                    f"{format_count(n_params(run))} parameters" if n_params(run) else "",
                    format_shape(run),
                ],
            )
        )
    counts = (node.manifest or {}).get("counts") or {}
    if node.funnel:
        kept = node.funnel["train"]
        return f"{format_whole(sum_key(kept, 'rows'))} documents, {format_brief(sum_key(kept, 'bytes') / 1e6)} MB"
    if node.kind == "tokenizer":
        return f"{format_whole(counts.get('vocab_size'))} pieces"
    if node.kind == "packed":
        return f"{format_count(sum_key(counts.get('train') or {}, 'tokens'))} tokens, rows of {format_whole(counts.get('seq_len'))}"
    size = f"{format_count(counts['n_params'])} parameters" if "n_params" in counts else ""
    return size + (
        f", {format_brief(counts['bytes'] / 1e6)} MB in Hugging Face form"
        if "bytes" in counts
        else ""
    )
