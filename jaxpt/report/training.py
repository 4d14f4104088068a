"""Render the sections of a training run: losses, forgetting, and how the training went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from jaxpt.report.figures import plot_over_steps, render_figure, render_figure_grid
from jaxpt.report.format import (
    finite_or_none,
    format_decimal,
    format_gigabytes,
    format_signed,
    format_whole,
)
from jaxpt.report.html import collapsible, color_legend, escape, html_table, small_text
from jaxpt.report.read import (
    Point,
    RunData,
    get_heldout_points,
    get_parent_points,
    get_points,
    get_scalar_points,
    last_value,
    list_sources,
    order_keys,
)
from jaxpt.report.records import SkippedPoint

MAX_SKIPS = 12  # shown per run
MAX_DOCUMENTS = 3  # of a skipped update named at once, the others folded
UNIT = "nats/token"
HINT = (
    '<p class="small hint">Drag moves a plot, shift and wheel zoom it, '
    "a double click resets it.</p>"
)
SKIP_CAPTION = (
    "The loss or the gradient was not finite, or its norm a spike: parameters and moments stayed "
    "as they were. To find the document:"
)
TRAIN_METRICS = (
    # field of TrainPoint, title, unit, caption, scale
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
        "Model FLOP/s utilization",
        "of the peak",
        "The model's own arithmetic as a share of the devices' peak.",
        "linear",
    ),
)


def render_losses(runs: list[RunData]) -> str:
    """Render training and held-out losses as figures, and their first and last in a table."""
    metrics = [run.metrics for run in runs]
    if not any(metric.train or metric.heldout for metric in metrics):
        return ""
    html = color_legend([run.name for run in runs])
    if any(metric.train for metric in metrics):
        html += render_training_loss(runs)
    sources = []
    for name in list_sources(runs):
        if any(get_heldout_points(run, name) for run in runs):
            sources.append(name)
    figures = [render_heldout_loss(runs, name) for name in sources]
    html += render_figure_grid(figures) + HINT
    return html + collapsible("The numbers", render_loss_table(runs, sources))


def render_training_loss(runs: list[RunData]) -> str:
    """Draw the training loss of all runs."""
    entropies = []
    for run in runs:
        entropies += list_training_entropy(run)
    caption = "Training loss, nats per token, at each logged step."
    if entropies:
        caption += " Dashed: unigram baseline, guessing each token by its frequency alone."
    is_resumed = False
    growths = ""
    for run in runs:
        for event in run.metrics.events:
            is_resumed |= not event.grown
            if event.grown:
                step = format_whole(event.step)
                growths += f" Upright: {run.name} was {event.label} at step {step}."
    if is_resumed:
        caption += " Dotted upright: the run was resumed there."
    series = [(run.name, get_points(run.metrics.train, "loss")) for run in runs]
    plot = plot_over_steps(runs, series, "loss", 330, unit=UNIT, levels=entropies)
    return render_figure(plot, caption + growths)


def render_heldout_loss(runs: list[RunData], source: str) -> str:
    """Draw the held-out loss of one source, and the parents' on the same sequences."""
    series = []
    parents = []
    entropies = []
    for run in runs:
        series.append((run.name, get_heldout_points(run, source)))
        parents.append((run.name, get_parent_points(run, source)))
        entropy = get_heldout_entropy(run, source)
        if entropy is not None:
            entropies.append(entropy)
    caption = "Nats per token."
    if any(points for _, points in parents):
        caption += " Thin: its parent on the same sequences."
    options = {"unit": UNIT, "levels": entropies, "thin_series": parents}
    plot = plot_over_steps(runs, series, source, 220, **options)
    return render_figure(plot, caption, f"Held out: {source}")


def render_loss_table(runs: list[RunData], sources: list[str]) -> str:
    """Render each run's first and last loss, in training and of each held-out source."""
    body = []

    def add(run: RunData, text: str, points: Sequence[Point], *others: float | None) -> None:
        if points:
            (_, first), (_, last) = points[0], points[-1]
            values = map(format_decimal, [first, last, *others])
            body.append([escape(run.name), escape(text), *values])

    for run in runs:
        entropy = [*list_training_entropy(run), None][0]
        add(run, "training", get_points(run.metrics.train, "loss"), entropy, None)
        for name in sources:
            parent = None
            for point in get_parent_points(run, name)[-1:]:
                _, parent = point
            entropy = get_heldout_entropy(run, name)
            add(run, name, get_heldout_points(run, name), entropy, parent)
    heads = ["run", "text", "first", "last", "unigram", "parent"]
    return html_table(heads, body, "Nats per token.", n_text_columns=2)


def list_training_entropy(run: RunData) -> list[float]:
    """Return the unigram entropy of the packed training set in a list; none if unknown.

    In nats per token, the mean over its sources weighted by tokens.
    """
    nats = 0.0
    n_tokens = 0
    for counts in run.packed:
        for source in counts.train.values():
            if finite_or_none(source.unigram_nats) is not None:
                nats += (source.unigram_nats or 0) * source.n_tokens
                n_tokens += source.n_tokens
    if not n_tokens:
        return []
    return [nats / n_tokens]


def get_heldout_entropy(run: RunData, source: str) -> float | None:
    """Return the unigram entropy of a held-out source, in nats per token."""
    for counts in run.packed:
        if source in counts.heldout:
            return finite_or_none(counts.heldout[source].unigram_nats)
    return None


def render_forgetting(runs: list[RunData]) -> str:
    """Render how far each source's held-out loss is above the parent's."""
    figures = ""
    body = []
    compared = set()
    for run in runs:
        for point in run.metrics.heldout:
            compared |= set(point.parent_loss or ())
    sources = [name for name in list_sources(runs) if name in compared]
    for run in runs:
        series = [(name, subtract_parent(run, name)) for name in sources]
        if not any(points for _, points in series):
            continue
        figures += plot_forgetting(run, series, sources)
        for name, points in series:
            if points:
                body.append([escape(run.name), escape(name), *list_forgetting(points)])
    if not body:
        return ""
    heads = ["run", "text", "first", "worst", "last"]
    caption = "Nats per token above the parent; above 0, the child has forgotten."
    table = html_table(heads, body, caption, n_text_columns=2)
    return color_legend(sources) + figures + table


def subtract_parent(run: RunData, source: str) -> list[Point]:
    """Return (step, child's - parent's held-out loss) wherever both are finite."""
    parent = dict(get_parent_points(run, source))
    points = []
    for step, loss in get_heldout_points(run, source):
        if step in parent:
            points.append((step, loss - parent[step]))
    return points


def plot_forgetting(run: RunData, series: list[tuple[str, list[Point]]], sources: list[str]) -> str:
    """Draw one run's rise of the held-out losses, and what the run allows."""
    caption = (
        "Held-out loss above the parent's on the same sequences, nats per token; "
        "below the dashed line it is better than its parent."
    )
    levels = [0.0]
    limit = finite_or_none(run.settings.get("train.max_forgetting"))
    if limit:
        levels.append(limit)
        caption += f" Upper dashed line: {limit:g}, what train.max_forgetting allows."
    options = {"unit": UNIT, "levels": levels, "level_name": "", "names": sources}
    plot = plot_over_steps([run], series, "above the parent", 220, **options)
    return render_figure(plot, caption, run.name)


def list_forgetting(points: list[Point]) -> list[str]:
    """Return the first, worst and last rise."""
    step, worst = max(points, key=lambda point: point[1])
    worst_cell = f"{format_signed(worst)} <small>step {format_whole(step)}</small>"
    (_, first), (_, last) = points[0], points[-1]
    return [format_signed(first), worst_cell, format_signed(last)]


def render_training(runs: list[RunData]) -> str:
    """Render every metric of the steps, memory, epochs and skipped updates."""
    if not any(run.metrics.train for run in runs):
        return ""
    figures = []
    for field, title, unit, caption, scale in TRAIN_METRICS:
        series = [(run.name, get_points(run.metrics.train, field)) for run in runs]
        if any(value for _, points in series for _, value in points):
            plot = plot_over_steps(runs, series, title.lower(), 200, unit=unit, scale=scale)
            figures.append(render_figure(plot, caption, title))
    figures += [render_scalar(runs, name) for name in list_scalars(runs)]
    body = [list_training(run, list_sources(runs)) for run in runs]
    heads = ["run", "tokens/s, median", "peak memory, GB", "steps skipped", "epochs"]
    html = color_legend([run.name for run in runs]) + render_figure_grid(figures)
    return html + html_table(heads, body) + render_skips(runs)


def list_scalars(runs: list[RunData]) -> list[str]:
    """Return the names of the further scalars that the steps returned."""
    names: set[str] = set()
    for run in runs:
        for point in run.metrics.train:
            names |= point.scalars.keys()
    return sorted(names)


def render_scalar(runs: list[RunData], name: str) -> str:
    """Draw a scalar that the steps returned beside those of TRAIN_METRICS."""
    series = [(run.name, get_scalar_points(run.metrics.train, name)) for run in runs]
    plot = plot_over_steps(runs, series, name, 200)
    return render_figure(plot, "Of the last step at each logged step.", name)


def list_training(run: RunData, order: list[str]) -> list[str]:
    """Return a run's row of the table."""
    train = run.metrics.train
    speeds = [speed for _, speed in get_points(train, "tokens_per_second")]
    memory = [n_bytes for _, n_bytes in get_points(train, "memory_bytes") if n_bytes]
    epochs: dict[str, float] = {}
    for point in train:
        if point.epochs is not None:
            epochs = point.epochs
    texts = []
    for name in order_keys(order, epochs):
        if epochs.get(name):
            texts.append(f"{name} {format_decimal(epochs[name], 2)}")
    speed = statistics.median_high(speeds) if speeds else None
    peak = max(memory, default=None)
    row = [escape(run.name), format_whole(speed), format_gigabytes(peak, 2)]
    row.append(format_whole(last_value(train, "n_skipped")))
    row.append(escape(", ".join(texts)))
    return row


def render_skips(runs: list[RunData]) -> str:
    """Render the skipped updates: what they measured, and the documents of their batch."""
    body = []
    notes = ""
    commands = ""
    for run in runs:
        skipped = run.metrics.skipped
        for point in skipped[:MAX_SKIPS]:
            loss = format_decimal(point.loss, 2) or "not finite"
            grad_norm = format_decimal(point.grad_norm, 2) or "not finite"
            documents = render_skipped_documents(point)
            step = format_whole(point.step)
            body.append([escape(run.name), step, loss, grad_norm, documents])
        if len(skipped) > MAX_SKIPS:
            n_more = len(skipped) - MAX_SKIPS
            notes += f"{run.name}: {n_more} more are in its metrics.jsonl. "
        if skipped:
            arguments = f"--workdir {run.directory} --step {skipped[0].step} --losses"
            commands += f" <code>{escape(f'jaxpt trace {arguments}')}</code>"
    if not body:
        return ""
    heads = ["run", "step", "loss", "gradient norm", "documents"]
    table = html_table(heads, body, css_class="skips")
    caption = f'<p class="small">{escape(notes + SKIP_CAPTION)}{commands}</p>'
    return f"<h3>Skipped updates</h3>{table}{caption}"


def render_skipped_documents(point: SkippedPoint) -> str:
    """Render the first few documents, the others folded behind them."""
    html = escape(", ".join(point.documents[:MAX_DOCUMENTS]))
    folded = ", ".join(point.documents[MAX_DOCUMENTS:])
    n_unnamed = point.n_documents - len(point.documents)
    if folded and n_unnamed > 0:
        folded += f" and {format_whole(n_unnamed)} that jaxpt trace names"
    title = f"{format_whole(point.n_documents - MAX_DOCUMENTS)} more"
    return html + collapsible(title, small_text(folded))
