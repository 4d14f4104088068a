"""Render the section Lineage: what was made from what, as a picture."""

from __future__ import annotations

from jaxpt.lineage import LineageNode
from jaxpt.report.format import format_brief, format_count, format_seconds, format_whole
from jaxpt.report.html import escape, series_color, small_text
from jaxpt.report.read import RunData, format_shape, summarize_stage
from jaxpt.report.records import Funnel, PackedCounts
from jaxpt.spec import encode_json

NODE_HEIGHT = 68  # pixels
CAPTION = (
    "The oldest at the top; a line leads from what was read to what was made of it. "
    "In grey: fingerprint, date (UTC), time it took."
)


def render_lineage(runs: list[RunData]) -> str:
    """Render the stages behind all runs and exports, oldest first, joined by lines."""
    by_key: dict[str, LineageNode] = {}
    for run in runs:
        for node in (*run.lineage_nodes, *run.export_nodes):
            by_key[node.key] = node
    nodes = list(by_key.values())
    if not any(node.manifest for node in nodes):
        return ""
    owners = {run.lineage_nodes[-1].key: i for i, run in enumerate(runs)}
    index = {node.key: i for i, node in enumerate(nodes)}
    longest = 0  # most nodes that a line passes
    for node in nodes:
        for parent in node.parents:
            longest = max(longest, index[node.key] - index[parent] - 1)
    margin = min(64, 16 * longest)
    x = 8 + margin
    lines = ""
    dots = ""
    items = ""
    for i, node in enumerate(nodes):
        y = i * NODE_HEIGHT + 22
        for parent in node.parents:
            top = index[parent] * NODE_HEIGHT + 22
            # a cubic reaches 3/4 of the way to its control points
            bend = margin * (i - index[parent] - 1) / max(1, longest) * 4 / 3
            lines += f'<path d="M{x} {top} C{x - bend} {top + 18} {x - bend} {y - 18} {x} {y}"/>'
        owner = owners.get(node.key)
        color = "var(--muted)" if owner is None else series_color(owner)
        dots += f'<circle cx="{x}" cy="{y}" r="6" style="fill:{color}"/>'
        items += f"<li>{render_node(node, None if owner is None else runs[owner])}</li>"
    size = f'width="{x + 10}" height="{len(nodes) * NODE_HEIGHT}"'
    picture = f'<svg aria-hidden="true" {size}>{lines}{dots}</svg>'
    return f'<div class="lineage">{picture}<ol>{items}</ol></div>{small_text(CAPTION)}'


def render_node(node: LineageNode, run: RunData | None) -> str:
    """Render a stage's name, size, fingerprint, date and time."""
    manifest = summarize_stage(node)
    facts = ["no manifest there"]
    name = run.name if run else node.path.name
    if manifest:
        date, _, clock = manifest.created[:16].partition("T")
        facts = [f'{escape(node.key[:8])}<span class="clock">{escape(node.key[8:])}</span>']
        if date:
            facts.append(f'{escape(date)}<span class="clock"> {escape(clock)}</span>')
        facts.append(format_seconds(manifest.seconds))
        if manifest.stage == "export" and not run:
            name = "/".join(node.path.parts[-2:])
    if node.has_changed:
        facts.append("replaced since it was read")
    text = " · ".join(filter(None, facts))
    size = describe_run_size(run) if run else describe_stage_size(node)
    details = f'<small title="{escape(node.path)}">{text}</small>'
    return f"<b>{escape(name)}</b> <span>{escape(size)}</span><br>{details}"


def describe_run_size(run: RunData) -> str:
    """Describe the size of a run's model."""
    n_params = f"{format_count(run.n_params)} parameters" if run.n_params else ""
    return ", ".join(filter(None, [n_params, format_shape(run)]))


def describe_stage_size(node: LineageNode) -> str:
    """Describe what a stage made in a few words."""
    manifest = summarize_stage(node)
    counts = manifest.counts if manifest else {}
    if node.funnel:
        kept = Funnel.from_json(encode_json(node.funnel)).train.values()
        n_documents = sum(amount.n_documents for amount in kept)
        n_bytes = sum(amount.n_bytes for amount in kept)
        return f"{format_whole(n_documents)} documents, {format_brief(n_bytes / 1e6)} MB"
    if node.kind == "tokenizer":
        return f"{format_whole(counts.get('vocab_size'))} tokens"
    if node.kind == "packed" and counts:
        packed = PackedCounts.from_json(counts)
        n_tokens = sum(source.n_tokens for source in packed.train.values())
        seq_len = format_whole(packed.seq_len)
        return f"{format_count(n_tokens)} tokens, sequences of {seq_len}"
    text = f"{format_count(counts['n_params'])} parameters" if "n_params" in counts else ""
    if "bytes" in counts:
        text += f", {format_brief(counts['bytes'] / 1e6)} MB in Hugging Face format"
    return text
