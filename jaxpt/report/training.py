"""Sections of a training run: losses, forgetting, and how the training went."""

from __future__ import annotations

from jaxpt.report.figures import plot_over_steps, render_figure, render_figure_pairs
from jaxpt.report.format import format_decimal, format_signed, format_whole, is_finite
from jaxpt.report.html import collapsible, color_legend, escape, html_table, small_text
from jaxpt.report.read import RunData, last_value, list_sources, metric_points, order_keys

MAX_SKIPS = 12  # shown of a run
MAX_DOCUMENTS = 3  # named of each at once, the others folded


def losses_section(runs: list[RunData]) -> str:
    if not any(run.train or run.heldout for run in runs):
        return ""
    figures = []
    if any(run.train for run in runs):
        entropy = [value for run in runs if (value := unigram_entropy(run)) is not None]
        caption = "Training loss, nats per token, at each logged step."
        caption += (
            " Dashed: guessing each token by its frequency alone (unigram entropy of the packed set)."
            if entropy
            else ""
        )
        caption += (
            " Dotted upright: the run was taken up again there."
            if any(what == "resumed" for run in runs for _, what in run.marks)
            else ""
        )
        grown = [
            f" Upright: {run.name} was {what} at step {format_whole(step)}."
            for run in runs
            for step, what in run.marks
            if what != "resumed"
        ]
        series = [(run.name, metric_points(run.train, "loss")) for run in runs]
        figures.append(
            render_figure(
                plot_over_steps(runs, series, "loss", 330, unit="nats/token", levels=entropy),
                caption + "".join(grown),
            )
        )
    domains = [
        name
        for name in list_sources(runs)
        if any(name in record["heldout"] for run in runs for record in run.heldout)
    ]
    small_ones = []
    for domain in domains:
        series, parent = (
            [(run.name, metric_points(run.heldout, kind, domain)) for run in runs]
            for kind in ("heldout", "parent")
        )
        entropy = [value for run in runs if (value := unigram_entropy(run, domain)) is not None]
        caption = "Nats per token." + (
            " Thin: its parent on the same rows." if any(found for _, found in parent) else ""
        )
        small_ones.append(
            render_figure(
                plot_over_steps(
                    runs, series, domain, 220, unit="nats/token", levels=entropy, thin_series=parent
                ),
                caption,
                f"Held out: {domain}",
            )
        )
    hint = '<p class="small hint">Drag moves a plot, shift and wheel zoom it, a double click brings the whole back.</p>'
    return (
        color_legend([run.name for run in runs])
        + "".join(figures)
        + render_figure_pairs(small_ones)
        + hint
        + collapsible("The numbers", render_loss_table(runs, domains))
    )


def render_loss_table(runs: list[RunData], domains: list[str]) -> str:
    body = []
    for run in runs:
        for text in (None, *domains):
            found = (
                metric_points(run.heldout, "heldout", text)
                if text
                else metric_points(run.train, "loss")
            )
            parent = metric_points(run.heldout, "parent", text)[-1:] or [(0, None)]
            if found:
                values = [found[0][1], found[-1][1], unigram_entropy(run, text), parent[0][1]]
                body.append(
                    [escape(run.name), escape(text or "training"), *map(format_decimal, values)]
                )
    return html_table(
        ["run", "text", "first", "last", "unigram", "parent"], body, "Nats per token.", texts=2
    )


def unigram_entropy(run: RunData, heldout: str | None = None) -> float | None:
    """Nats per token of the packed training set (mean over its sources, weighted by tokens), or of one held-out source."""
    sets = [
        manifest["counts"]["heldout" if heldout else "train"] for manifest in run.stages["packed"]
    ]
    if heldout:
        return next(
            (is_finite(each[heldout]["unigram_nats"]) for each in sets if heldout in each), None
        )
    parts = [
        part
        for each in sets
        for part in each.values()
        if is_finite(part.get("unigram_nats")) is not None
    ]
    tokens = sum(part["tokens"] for part in parts)
    return sum(part["unigram_nats"] * part["tokens"] for part in parts) / tokens if tokens else None


def forgetting_section(runs: list[RunData]) -> str:
    """How far each domain's held-out loss is from the parent's on the same rows."""
    figures, body = [], []
    domains = [
        name
        for name in list_sources(runs)
        if any(name in (record.get("parent") or {}) for run in runs for record in run.heldout)
    ]
    for run in runs:
        rise = {
            name: [(record["step"], child - parent) for record in run.heldout
                   if (child := is_finite(record["heldout"].get(name))) is not None and (parent := is_finite((record.get("parent") or {}).get(name))) is not None]
            for name in domains
        }  # fmt: skip
        if not any(rise.values()):
            continue
        limit = is_finite(((run.config or {}).get("train") or {}).get("max_forgetting")) or None
        levels = [0.0] if limit is None else [0.0, limit]
        plot = plot_over_steps(
            [run],
            list(rise.items()),
            "above the parent",
            220,
            unit="nats/token",
            levels=levels,
            level_name="",
            names=domains,
        )
        caption = "Held-out loss above the parent's on the same rows, nats per token; below the dashed line it is better than its parent."
        figures.append(
            render_figure(
                plot,
                caption
                + (
                    f" Upper dashed line: {limit:g}, what train.max_forgetting allows."
                    if limit
                    else ""
                ),
                run.name,
            )
        )
        for name, found in rise.items():
            if found:
                worst = max(found, key=lambda point: point[1])
                ends = [
                    format_signed(found[0][1]),
                    f"{format_signed(worst[1])} <small>step {format_whole(worst[0])}</small>",
                    format_signed(found[-1][1]),
                ]
                body.append([escape(run.name), escape(name), *ends])
    if not body:
        return ""
    heads = ["run", "text", "first", "worst", "last"]
    return (
        color_legend(domains)
        + "".join(figures)
        + html_table(
            heads,
            body,
            "Nats per token above the parent; above 0, the child has forgotten.",
            texts=2,
        )
    )


def training_section(runs: list[RunData]) -> str:
    if not any(run.train for run in runs):
        return ""
    figures = []
    for key, title, unit, says, scale in (
        ("lr", "Learning rate", "", "Of the update at each logged step.", "linear"),
        (
            "grad_norm",
            "Gradient norm",
            "",
            "Of the whole gradient, before clipping. Log scale.",
            "log",
        ),
        ("tokens_per_second", "Speed", "tokens/s", "All devices together.", "linear"),
        (
            "mfu",
            "Model FLOP/s utilisation",
            "of the peak",
            "The model's own arithmetic as a share of what the devices can do.",
            "linear",
        ),
    ):
        series = [(run.name, metric_points(run.train, key)) for run in runs]
        if any(value for _, found in series for _, value in found):
            figures.append(
                render_figure(
                    plot_over_steps(runs, series, title.lower(), 200, unit=unit, scale=scale),
                    says,
                    title,
                )
            )
    body = []
    for run in runs:
        epochs = next(
            (
                record["epochs"]
                for record in run.train[::-1]
                if isinstance(record.get("epochs"), dict)
            ),
            {},
        )
        speeds = sorted(
            value
            for record in run.train
            if (value := is_finite(record.get("tokens_per_second"))) is not None
        )
        memory = max(
            (is_finite(record.get("memory_bytes")) or 0 for record in run.train), default=0
        )
        body.append([
            escape(run.name), format_whole(speeds[len(speeds) // 2]) if speeds else "", f"{memory / 1e9:.2f}" if memory else "",
            format_whole(last_value(run.train, "n_skipped")), escape(", ".join(f"{name} {format_decimal(epochs[name], 2)}" for name in order_keys(list_sources(runs), epochs) if epochs[name])),
        ])  # fmt: skip
    heads = [
        "run",
        "tokens/s, median",
        "peak memory, GB",
        "steps skipped",
        "times each source was read",
    ]
    return (
        color_legend([run.name for run in runs])
        + render_figure_pairs(figures)
        + html_table(heads, body)
        + render_skips(runs)
    )


def render_skips(runs: list[RunData]) -> str:
    """The steps whose updates were skipped, with what they measured and the documents that they read."""
    body = []
    for run in runs:
        for record in run.skipped[:MAX_SKIPS]:
            found = record["skipped"]
            measured = [
                format_decimal(found.get(key), 2) or "not finite" for key in ("loss", "grad_norm")
            ]
            body.append(
                [
                    escape(run.name),
                    format_whole(record["step"]),
                    *measured,
                    list_skipped_documents(found),
                ]
            )
    if not body:
        return ""
    more = [
        f"{run.name}: {len(run.skipped) - MAX_SKIPS} more are in its metrics.jsonl."
        for run in runs
        if len(run.skipped) > MAX_SKIPS
    ]
    asks = [
        f"python scripts/trace.py --workdir {run.directory} --step {run.skipped[0]['step']} --losses"
        for run in runs
        if run.skipped
    ]
    why = "The loss or the gradient was not finite, or its norm a spike: weights and moments stayed as they were. Which document it was:"
    heads = ["run", "step", "loss", "gradient norm", "documents read"]
    commands = " ".join(f"<code>{escape(ask)}</code>" for ask in asks)
    return f'<h3>Skipped updates</h3>{html_table(heads, body, kind="skips")}<p class="small">{escape(" ".join([*more, why]))} {commands}</p>'


def list_skipped_documents(found: dict) -> str:
    """The first few by name, the others that the run named folded behind them."""
    names, n = [str(name) for name in found["documents"]], found["n_documents"]
    shown, folded = ", ".join(names[:MAX_DOCUMENTS]), ", ".join(names[MAX_DOCUMENTS:])
    return escape(shown) + (
        collapsible(
            f"{format_whole(n - MAX_DOCUMENTS)} more",
            small_text(
                folded
                + (
                    f" and {format_whole(n - len(names))} that trace.py names"
                    if n > len(names)
                    else ""
                )
            ),
        )
        if folded
        else ""
    )
