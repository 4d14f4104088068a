"""Section: what was made from what, as a picture."""

from __future__ import annotations

from jaxpt.lineage import Node
from jaxpt.report.markup import color, esc, small
from jaxpt.report.read import RunData, n_params, shape
from jaxpt.report.words import brief, count, duration, total, whole


def section(runs: list[RunData]) -> str:
    nodes = list({node.key: node for run in runs for node in (*run.nodes, *run.exports)}.values())
    if not any(node.manifest for node in nodes):
        return ""
    at = {node.key: i for i, node in enumerate(nodes)}
    named = {run.nodes[-1].key: (i, run) for i, run in enumerate(runs)}
    far = max((at[node.key] - at[parent] - 1 for node in nodes for parent in node.parents), default=0)
    row, x = 68, 8 + min(64, 16 * far)
    arcs, dots, items = [], [], []
    for node in nodes:
        y = at[node.key] * row + 22
        for parent in node.parents:
            above, skipped = at[parent] * row + 22, at[node.key] - at[parent] - 1
            bend = (x - 8) * skipped / max(1, far) * 4 / 3  # a cubic reaches 3/4 of the way to its control points
            arcs.append(f'<path d="M{x} {above} C{x - bend} {above + 18} {x - bend} {y - 18} {x} {y}"/>')
        i, run = named.get(node.key, (None, None))
        dots.append(f'<circle cx="{x}" cy="{y}" r="6" style="fill:{color(i) if run else "var(--muted)"}"/>')
        items.append(f"<li>{lineage_entry(node, run)}</li>")
    picture = f'<svg aria-hidden="true" width="{x + 10}" height="{len(nodes) * row}">{"".join(arcs + dots)}</svg>'
    caption = "The oldest at the top; a line leads from what was read to what was made of it. In grey: fingerprint, date (UTC), time it took."
    return f'<div class="lineage">{picture}<ol>{"".join(items)}</ol></div>{small(caption)}'


def lineage_entry(node: Node, run: RunData | None) -> str:
    manifest = node.manifest or {}
    date, _, clock = manifest.get("created", "")[:16].partition("T")
    facts = [
        f'{esc(node.key[:8])}<span class="clock">{esc(node.key[8:])}</span>' if manifest else "no manifest there",
        f'{esc(date)}<span class="clock"> {esc(clock)}</span>' if date else "",
        duration(manifest.get("seconds")),
        "made anew since it was read" if node.changed else "",
    ]
    exported = manifest.get("stage") == "export"
    name = run.name if run else "/".join(node.path.parts[-2:]) if exported else node.path.name
    return f'<b>{esc(name)}</b> <span>{esc(size_of(node, run))}</span><br><small title="{esc(node.path)}">{" · ".join(filter(None, facts))}</small>'


def size_of(node: Node, run: RunData | None) -> str:
    """What a stage made, in a few words."""
    if run:
        return ", ".join(filter(None, [f"{count(n_params(run))} parameters" if n_params(run) else "", shape(run)]))
    counts = (node.manifest or {}).get("counts") or {}
    if node.funnel:
        kept = node.funnel["train"]
        return f"{whole(total(kept, 'rows'))} documents, {brief(total(kept, 'bytes') / 1e6)} MB"
    if node.kind == "tokenizer":
        return f"{whole(counts.get('n_pieces'))} pieces"
    if node.kind == "packed":
        return f"{count(total(counts.get('train') or {}, 'tokens'))} tokens, rows of {whole(counts.get('row_len'))}"
    size = f"{count(counts['n_params'])} parameters" if "n_params" in counts else ""
    return size + (f", {brief(counts['bytes'] / 1e6)} MB in Hugging Face form" if "bytes" in counts else "")
