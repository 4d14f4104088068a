"""Describe what a run read and how it learned: data, mixture, losses, forgetting, training."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxpt.report import read
from jaxpt.report.figures import (
    Cell,
    Figure,
    Palette,
    Share,
    Table,
    color_domains,
    color_runs,
    plot_over_steps,
)
from jaxpt.report.format import (
    finite_or_none,
    format_count,
    format_decimal,
    format_gigabytes,
    format_signed,
    format_whole,
)
from jaxpt.report.read import Point, RunData
from jaxpt.report.records import DroppedDocument, Funnel, PackedCounts, TextAmount

MAX_SKIPS = 12  # shown per run
MAX_AXIS_POINTS = 400  # steps of a run whose tokens, FLOPs and seconds the page knows
UNIT = "nats/token"
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


# ---- what the rules kept and dropped


class SourceData(NamedTuple):
    """A source's funnel, what of it could not be read, and samples of what was dropped."""

    title: str
    table: Table
    skipped: str
    messages: tuple[str, ...]
    dropped: dict[str, list[DroppedDocument]]  # by rule, in the order applied


def make_data(runs: list[RunData]) -> list[SourceData]:
    """Return each source of each corpus."""
    found = []
    for funnels, names in read.group_distinct_values(runs, lambda run: run.funnels):
        packed = []
        for run in runs:
            if run.name in names:
                packed += run.packed
        for funnel in funnels:
            for source in funnel.sources:
                title = source + read.name_owners(names, runs)
                found.append(describe_source(funnel, source, title, packed))
    return found


def describe_source(
    funnel: Funnel, source: str, title: str, packed: list[PackedCounts]
) -> SourceData:
    """Return what the page shows of a source of a corpus."""
    reasons = []
    messages = ()
    skipped = funnel.skipped.get(source)
    if skipped:
        reasons = [f"{format_whole(n)} times {reason}" for reason, n in skipped.counts.items()]
        messages = skipped.messages
    text = f"Skipped while reading: {', '.join(reasons)}." if reasons else ""
    table = make_funnel_table(funnel, source, packed)
    return SourceData(title, table, text, messages, list_dropped(funnel, source))


def make_funnel_table(funnel: Funnel, source: str, packed: list[PackedCounts]) -> Table:
    """Return what was read, left after each rule, and split into training and held-out text.

    Args:
        funnel: of the corpus.
        source: one of its sources.
        packed: of the runs that read the corpus: its tokens, counted.
    """
    labels = []
    amounts = []
    edits = []
    for step in funnel.steps:
        labels.append(step.rule.replace("_", " "))
        amounts.append(step.kept.get(source, TextAmount()))
        n_edits = step.n_edits or {}
        edits.append(format_whole(n_edits.get(source) or None))
    documents = [amount.n_documents for amount in amounts]
    n_read_bytes = next((amount.n_bytes for amount in amounts), 0)
    dropped = [""]
    for before, after in itertools.pairwise(documents):
        dropped.append(format_whole(before - after))
    tokens = [format_estimate(amount.n_tokens) for amount in amounts]
    splits = {"kept for training": (funnel.train, "train"), "held out": (funnel.heldout, "heldout")}
    for label, (split, name) in splits.items():
        if source in split:
            labels.append(label)
            amounts.append(split[source])
            counted = set()
            for counts in packed:
                if source in getattr(counts, name):
                    counted.add(getattr(counts, name)[source].n_tokens)
            is_known = len(counted) == 1
            estimate = format_estimate(split[source].n_tokens)
            tokens.append(format_whole(*counted) if is_known else estimate)
    shares = []
    for amount in amounts:
        frac = amount.n_bytes / n_read_bytes if n_read_bytes else 0
        shares.append(Share(frac))
    columns: dict[str, Sequence[str | Share]] = {"rule": labels}
    columns["documents"] = [format_whole(amount.n_documents) for amount in amounts]
    columns |= {"dropped": dropped, "edits": edits}
    columns["MB"] = [format_decimal(amount.n_bytes / 1e6, 2) for amount in amounts]
    columns["tokens"] = tokens
    columns["share"] = shares
    # what no rule did, or nobody counted, has no column
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    rows = list(itertools.zip_longest(*columns.values(), fillvalue=""))
    return Table(list(columns), rows, css_class="funnel")


def format_estimate(n_tokens: float | None) -> str:
    """Return a number of tokens as an estimate; empty if there is none."""
    return f"\u2248 {format_count(n_tokens)}" if n_tokens else ""


def list_dropped(funnel: Funnel, source: str) -> dict[str, list[DroppedDocument]]:
    """Return samples of what each rule dropped, in the order of the rules."""
    found = {}
    order = [step.rule for step in funnel.steps]
    for rule in read.order_keys(order, funnel.dropped):
        documents = [each for each in funnel.dropped.get(rule, ()) if each.source == source]
        if documents:
            found[rule.replace("_", " ")] = documents
    return found


# ---- what the steps read


class Mixture(NamedTuple):
    """What the section Mixture shows: the share of each source by step."""

    sources: Palette
    figures: list[Figure]  # of the runs in which it changes
    table: Table


def make_mixture(runs: list[RunData]) -> Mixture | None:
    """Return the shares of each run; None if no run has trained."""
    runs = [run for run in runs if run.phases and run.metrics.train]
    if not runs:
        return None
    names = read.list_sources(runs)
    for run in runs:
        for phase in run.phases:
            names = read.order_keys(names, [*names, *phase.shares])
    figures = []
    rows = []
    for run in runs:
        if len(run.phases) > 1:
            title = run.name if len(runs) > 1 else "Shares"
            figures.append(plot_mixture(run, color_domains(names), title))
        for phase in run.phases:
            row = [run.name, format_whole(phase.step)]
            for name in names:
                share = phase.shares.get(name)
                row.append("" if share is None else f"{100 * share:.3g} %")
            rows.append(row)
    heads = ["run", "from step", *names]
    return Mixture(color_domains(names), figures, Table(heads, rows))


def plot_mixture(run: RunData, sources: Palette, title: str) -> Figure:
    """Draw each source's share as steps of a stair."""
    starts = [phase.step for phase in run.phases]
    last_step = max(starts[-1], run.metrics.train[-1].step)
    ends = [*starts[1:], last_step]
    series = []
    for name in sources.names:
        points = []
        for phase, start, end in zip(run.phases, starts, ends, strict=True):
            share = phase.shares.get(name, 0.0)
            points += [(start, share), (end, share)]
        series.append((name, points))
    options = {"unit": "of the sequences", "scale": "share", "domains": sources}
    plot = plot_over_steps([run], series, "share", 180, **options)
    return Figure(plot, "Share of the sequences of each step.", title)


# ---- losses


class Losses(NamedTuple):
    """What the section Loss shows."""

    runs: Palette
    axes: dict[str, dict[str, list[float]]]  # run -> what its steps took
    training: Figure | None
    heldout: list[Figure]
    tasks: list[Figure]  # benchmarks scored meanwhile
    table: Table


def make_losses(runs: list[RunData]) -> Losses | None:
    """Return training and held-out losses; None if nothing was measured."""
    metrics = [run.metrics for run in runs]
    if not any(metric.train or metric.heldout for metric in metrics):
        return None
    training = plot_training_loss(runs) if any(metric.train for metric in metrics) else None
    sources = []
    for name in read.list_sources(runs):
        if any(read.get_heldout_points(run, name) for run in runs):
            sources.append(name)
    heldout = [plot_heldout_loss(runs, name) for name in sources]
    table = make_loss_table(runs, sources)
    axes = {run.name: list_axes(run) for run in runs}
    return Losses(color_runs(runs), axes, training, heldout, plot_tasks(runs), table)


def list_axes(run: RunData) -> dict[str, list[float]]:
    """Return steps, and the tokens, FLOPs and seconds up to each, as far as all are known.

    The page draws curves over them, and interpolates between these steps.
    """
    records = run.metrics.train
    every = max(1, len(records) // MAX_AXIS_POINTS)
    kept = [*records[::every], *records[-1:]]
    axes: dict[str, list[float]] = {"step": [0, *(record.step for record in kept)]}
    for field, name in (("n_tokens", "tokens"), ("flops", "FLOPs"), ("seconds", "seconds")):
        found = (finite_or_none(getattr(record, field)) for record in kept)
        values = [value for value in found if value is not None]
        if kept and len(values) == len(kept):
            axes[name] = [0, *values]
    return axes


def plot_training_loss(runs: list[RunData]) -> Figure:
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
    series = [(run.name, read.get_points(run.metrics.train, "loss")) for run in runs]
    options = {"unit": UNIT, "levels": entropies, "is_smooth": True}
    plot = plot_over_steps(runs, series, "loss", 330, **options)
    return Figure(plot, caption + growths)


def plot_heldout_loss(runs: list[RunData], source: str) -> Figure:
    """Draw the held-out loss of one source, and the parents' on the same sequences."""
    series = []
    parents = []
    entropies = []
    for run in runs:
        series.append((run.name, read.get_heldout_points(run, source)))
        parents.append((run.name, read.get_parent_points(run, source)))
        entropy = get_heldout_entropy(run, source)
        if entropy is not None:
            entropies.append(entropy)
    caption = "Nats per token."
    if any(points for _, points in parents):
        caption += " Thin: its parent on the same sequences."
    options = {"unit": UNIT, "levels": entropies, "thin_series": parents}
    plot = plot_over_steps(runs, series, source, 220, **options)
    return Figure(plot, caption, f"Held out: {source}")


def plot_tasks(runs: list[RunData]) -> list[Figure]:
    """Draw each metric of each benchmark that was scored during the runs."""
    names: dict[tuple[str, str], None] = {}
    for run in runs:
        for point in run.metrics.tasks:
            for task, metrics in point.scores.items():
                names |= {(task, metric): None for metric in metrics}
    figures = []
    for task, metric in names:
        if metric.endswith("_stderr"):
            continue
        series = [(run.name, read.get_task_points(run, task, metric)) for run in runs]
        errors = [read.get_task_points(run, task, f"{metric}_stderr") for run in runs]
        caption = "On the same items each time."
        last = [f"{points[-1][1]:.4f}" for points in errors if points]
        if last:
            caption += f" Standard error at the end: {', '.join(last)}."
        plot = plot_over_steps(runs, series, metric, 200)
        figures.append(Figure(plot, caption, f"{task}: {metric.replace('_', ' ')}"))
    return figures


def make_loss_table(runs: list[RunData], sources: list[str]) -> Table:
    """Return each run's first and last loss, in training and of each held-out source."""
    rows = []

    def add(run: RunData, text: str, points: Sequence[Point], *others: float | None) -> None:
        if points:
            (_, first), (_, last) = points[0], points[-1]
            values = map(format_decimal, [first, last, *others])
            rows.append([run.name, text, *values])

    for run in runs:
        entropy = [*list_training_entropy(run), None][0]
        add(run, "training", read.get_points(run.metrics.train, "loss"), entropy, None)
        for name in sources:
            parent = None
            for point in read.get_parent_points(run, name)[-1:]:
                _, parent = point
            entropy = get_heldout_entropy(run, name)
            add(run, name, read.get_heldout_points(run, name), entropy, parent)
    heads = ["run", "text", "first", "last", "unigram", "parent"]
    return Table(heads, rows, "Nats per token.", n_text_columns=2)


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


# ---- forgetting


class Forgetting(NamedTuple):
    """What the section Forgetting shows."""

    sources: Palette
    figures: list[Figure]
    table: Table


def make_forgetting(runs: list[RunData]) -> Forgetting | None:
    """Return how far each source's held-out loss is above the parent's; None without a parent."""
    compared = set()
    for run in runs:
        for point in run.metrics.heldout:
            compared |= set(point.parent_loss or ())
    sources = [name for name in read.list_sources(runs) if name in compared]
    figures = []
    rows = []
    for run in runs:
        series = [(name, subtract_parent(run, name)) for name in sources]
        if not any(points for _, points in series):
            continue
        figures.append(plot_forgetting(run, series, color_domains(sources)))
        for name, points in series:
            if points:
                rows.append([run.name, name, *list_forgetting(points)])
    if not rows:
        return None
    heads = ["run", "text", "first", "worst", "last"]
    caption = "Nats per token above the parent; above 0, the child has forgotten."
    return Forgetting(
        color_domains(sources), figures, Table(heads, rows, caption, n_text_columns=2)
    )


def subtract_parent(run: RunData, source: str) -> list[Point]:
    """Return (step, child's - parent's held-out loss) wherever both are finite."""
    parent = dict(read.get_parent_points(run, source))
    points = []
    for step, loss in read.get_heldout_points(run, source):
        if step in parent:
            points.append((step, loss - parent[step]))
    return points


def plot_forgetting(
    run: RunData, series: list[tuple[str, list[Point]]], sources: Palette
) -> Figure:
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
    options = {"unit": UNIT, "levels": levels, "level_name": "", "domains": sources}
    plot = plot_over_steps([run], series, "above the parent", 220, **options)
    return Figure(plot, caption, run.name)


def list_forgetting(points: list[Point]) -> list[str | Cell]:
    """Return the first, worst and last rise."""
    step, worst = max(points, key=lambda point: point[1])
    worst_cell = Cell(format_signed(worst), f"step {format_whole(step)}")
    (_, first), (_, last) = points[0], points[-1]
    return [format_signed(first), worst_cell, format_signed(last)]


# ---- training


class Training(NamedTuple):
    """What the section Training shows."""

    runs: Palette
    figures: list[Figure]
    table: Table
    skips: Table | None
    skip_notes: str  # what is not in their table
    commands: list[str]  # to find the document of a skipped update


def make_training(runs: list[RunData]) -> Training | None:
    """Return every metric of the steps, memory, epochs and skipped updates; None without steps."""
    if not any(run.metrics.train for run in runs):
        return None
    figures = []
    for field, title, unit, caption, scale in TRAIN_METRICS:
        series = [(run.name, read.get_points(run.metrics.train, field)) for run in runs]
        if any(value for _, points in series for _, value in points):
            options = {"unit": unit, "scale": scale, "is_smooth": True}
            plot = plot_over_steps(runs, series, title.lower(), 200, **options)
            figures.append(Figure(plot, caption, title))
    figures += [plot_scalar(runs, name) for name in list_scalars(runs)]
    heads = ["run", "tokens/s, median", "peak memory, GB", "steps skipped", "epochs"]
    table = Table(heads, [list_training(run, read.list_sources(runs)) for run in runs])
    return Training(color_runs(runs), figures, table, *list_skips(runs))


def list_scalars(runs: list[RunData]) -> list[str]:
    """Return the names of the further scalars that the steps returned."""
    names: set[str] = set()
    for run in runs:
        for point in run.metrics.train:
            names |= point.scalars.keys()
    return sorted(names)


def plot_scalar(runs: list[RunData], name: str) -> Figure:
    """Draw a scalar that the steps returned beside those of TRAIN_METRICS."""
    series = [(run.name, read.get_scalar_points(run.metrics.train, name)) for run in runs]
    plot = plot_over_steps(runs, series, name, 200, is_smooth=True)
    return Figure(plot, "Of the last step at each logged step.", name)


def list_training(run: RunData, order: list[str]) -> list[str]:
    """Return a run's row of the table."""
    train = run.metrics.train
    speeds = [speed for _, speed in read.get_points(train, "tokens_per_second")]
    memory = [n_bytes for _, n_bytes in read.get_points(train, "memory_bytes") if n_bytes]
    epochs: dict[str, float] = {}
    for point in train:
        if point.epochs is not None:
            epochs = point.epochs
    texts = []
    for name in read.order_keys(order, epochs):
        if epochs.get(name):
            texts.append(f"{name} {format_decimal(epochs[name], 2)}")
    speed = statistics.median_high(speeds) if speeds else None
    peak = max(memory, default=None)
    row = [run.name, format_whole(speed), format_gigabytes(peak, 2)]
    row.append(format_whole(read.last_value(train, "n_skipped")))
    row.append(", ".join(texts))
    return row


def list_skips(runs: list[RunData]) -> tuple[Table | None, str, list[str]]:
    """Return the skipped updates with their documents, a note, and a command per run."""
    rows = []
    notes = ""
    commands = []
    for run in runs:
        skipped = run.metrics.skipped
        for point in skipped[:MAX_SKIPS]:
            loss = format_decimal(point.loss, 2) or "not finite"
            grad_norm = format_decimal(point.grad_norm, 2) or "not finite"
            rows.append([run.name, format_whole(point.step), loss, grad_norm, point])
        if len(skipped) > MAX_SKIPS:
            n_more = len(skipped) - MAX_SKIPS
            notes += f"{run.name}: {n_more} more are in its metrics.jsonl. "
        if skipped:
            arguments = f"--workdir {run.directory} --step {skipped[0].step} --losses"
            commands.append(f"jaxpt trace {arguments}")
    heads = ["run", "step", "loss", "gradient norm", "documents"]
    table = Table(heads, rows, css_class="skips") if rows else None
    return table, notes, commands
