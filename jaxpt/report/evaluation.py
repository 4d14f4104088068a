"""Render the section Evaluation: benchmarks and bits per byte, by model and backend."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable

from jaxpt.report.figures import (
    Spec,
    color_by,
    nominal,
    quantitative,
    render_figure,
)
from jaxpt.report.format import (
    clip_text,
    finite_or_none,
    format_decimal,
    format_seconds,
    format_whole,
)
from jaxpt.report.html import collapsible, color_legend, escape, html_table
from jaxpt.report.read import (
    RunData,
    get_run_index,
    list_sources,
    short_model_name,
)
from jaxpt.report.records import Evaluation, TaskScore, parse_scores

MetricKey = tuple[str, str]  # (task, metric)
OVERLAP_CAPTION = (
    "Items that share 13 consecutive words with a document the model was trained on, "
    "found by following its lineage to the corpora."
)
BENCHMARK_CAPTION = (
    "One standard error to either side; where bars overlap, the difference may be chance."
)


@dataclasses.dataclass
class EvalColumn:
    """Scores of one model by one backend, from one or several files with different tasks."""

    model: str
    step: int | None
    backend: str  # "jax" or "hf"
    scores: dict[MetricKey, TaskScore]
    # as which it was measured: a run, its last checkpoint and its export are one model
    model_paths: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """Model and backend."""
        return f"{self.model} {self.backend}"


def render_evaluation(runs: list[RunData]) -> str:
    """Render the scores as a table, benchmarks as a figure too, and their contamination."""
    columns = make_eval_columns(runs)
    if not columns:
        return ""
    errors = []
    keys: list[MetricKey] = [
        (f"bits_per_byte/{name}", "bits_per_byte") for name in list_sources(runs)
    ]
    for column in columns:
        keys += [key for key in column.scores if key not in keys]
        errors += [score.stderr for score in column.scores.values()]
    body = []
    for key in keys:
        scores = [column.scores.get(key) for column in columns]
        if any(scores):
            n_items = [score.n_items for score in scores if score and score.n_items]
            label = format_metric(*key, *n_items[:1])
            body.append([label, *map(format_score, scores)])
    times = [format_seconds(column.seconds or None) for column in columns]
    body.append(["time", *times])
    has_error = any(error is not None for error in errors)
    caption = "Bits per byte: lower is better."
    if has_error:
        caption += " Benchmarks: higher is better, ± one standard error."
    caption += " jax: our code; hf: the exported model in transformers."
    caption += describe_backend_difference(columns)
    heads = [f"{escape(column.model)}<br>{escape(column.backend)}" for column in columns]
    html = html_table(["", *heads], body, caption)
    if has_error:
        html += render_benchmark_figure(columns)
    return html + render_contamination(runs, columns)


def make_eval_columns(runs: list[RunData]) -> list[EvalColumn]:
    """Return one column per model and backend, in the order of the runs, hf last."""
    columns: list[EvalColumn] = []
    for run in runs:
        for result in run.evaluations.values():
            add_result(columns, result, result.model or run.name)
    columns.sort(key=lambda column: sort_key(column, runs))
    label_apart(columns, lambda column: f"{column.model}, step {column.step}")
    label_apart(columns, shorten_model_path)
    return columns


def shorten_model_path(column: EvalColumn) -> str:
    """Return the last three parts of a model's path."""
    path = pathlib.PurePath(column.model_paths[0])
    return "/".join(path.parts[-3:])


def add_result(columns: list[EvalColumn], result: Evaluation, path: str) -> None:
    """Add scores to the column of the same model and backend, or to a new one."""
    scores = index_scores(result.scores)
    step = result.evaluated.step if result.evaluated else None
    new = EvalColumn(short_model_name(path), step, result.backend, {})
    for column in columns:
        is_same = (column.label, column.step) == (new.label, step)
        is_known = path in column.model_paths
        is_disjoint = column.scores.keys().isdisjoint(scores)
        if is_same and (is_known or is_disjoint):
            break
    else:
        column = new
        columns.append(column)
    column.model_paths.append(path)
    column.scores |= scores
    column.seconds += finite_or_none(result.seconds) or 0


def sort_key(column: EvalColumn, runs: list[RunData]) -> tuple[int, int, bool]:
    """Return where a column stands."""
    return get_run_index(column.model, runs), column.step or 0, column.backend == "hf"


def label_apart(columns: list[EvalColumn], rename: Callable[[EvalColumn], str]) -> None:
    """Rename the models of columns that have one label."""
    labels = [column.label for column in columns]
    for column, label in zip(columns, labels, strict=True):
        if labels.count(label) > 1:
            column.model = rename(column)


def index_scores(scores: Iterable[TaskScore]) -> dict[MetricKey, TaskScore]:
    """Return the scores by task and metric; a filter other than "none" is part of the metric."""
    by_key = {}
    for score in scores:
        suffix = "" if score.filter == "none" else f", {score.filter}"
        by_key[score.task, score.metric + suffix] = score
    return by_key


def render_contamination(runs: list[RunData], columns: list[EvalColumn]) -> str:
    """Render which benchmark items were seen in training, and the scores without them."""
    body = []
    examples = []
    unchecked = []
    n_short = 0
    for run in runs:
        for result in run.evaluations.values():
            if not result.contamination:
                continue
            label = find_label(result, columns)
            unchecked += result.contamination.unchecked
            for task, overlap in result.contamination.tasks.items():
                n_short = max(n_short, overlap.n_short)
                for example in overlap.examples:
                    place = f"{task}, item {example.item_id}, in {example.document_id}"
                    examples.append(f"{place}: {clip_text(example.shared_words, 200)}")
                share = f"{format_whole(overlap.n_overlapping)} of {format_whole(overlap.n_items)}"
                clean = {}
                if overlap.n_overlapping:
                    clean = index_scores(parse_scores(task, overlap.clean_scores))
                scores = [score for score in result.scores if score.task == task]
                for key, score in index_scores(scores).items():
                    row = [format_metric(*key), escape(label), share]
                    row.append(format_score(score))
                    row.append(format_score(clean.get(key)))
                    body.append(row)
    if not body:
        return ""
    caption = OVERLAP_CAPTION
    if n_short:
        n = format_whole(n_short)
        caption += f" At most {n} items of a task have fewer words, so no overlap can be found."
    for reason in dict.fromkeys(unchecked):
        caption += f" Not searched: {reason}"
    heads = ["", "model", "overlap", "score", "without them"]
    html = "<h3>Seen in training</h3>" + html_table(heads, body, caption, n_text_columns=2)
    items = [f"<li>{escape(example)}</li>" for example in dict.fromkeys(examples)]
    if items:
        shared = f'<ul class="small">{"".join(items)}</ul>'
        html += collapsible("What they share", shared)
    return html


def find_label(result: Evaluation, columns: list[EvalColumn]) -> str:
    """Return the label of the column that a result is part of."""
    for column in columns:
        if result.model in column.model_paths and column.backend == result.backend:
            return column.label
    return f"{result.model} {result.backend}"


def describe_backend_difference(columns: list[EvalColumn]) -> str:
    """Describe how far jax and hf are apart, where a model was scored by both."""
    differences = []
    for ours, theirs in itertools.permutations(columns, 2):
        is_same = (ours.model, ours.step) == (theirs.model, theirs.step)
        if is_same and (ours.backend, theirs.backend) == ("jax", "hf"):
            for key in ours.scores.keys() & theirs.scores.keys():
                our_score = ours.scores[key].score
                their_score = theirs.scores[key].score
                differences.append(abs(our_score - their_score))
    if not differences:
        return ""
    if not any(differences):
        return " They are equal."
    return f" They differ by {max(differences):.0e} at most."


def format_metric(task: str, metric: str, n_items: int | None = None) -> str:
    """Return the HTML of a row's first cell."""
    details = metric.replace("_", " ")
    if n_items:
        details += f", {format_whole(n_items)} items"
    return f"{escape(task.removeprefix('bits_per_byte/'))} <small>{escape(details)}</small>"


def format_score(score: TaskScore | None) -> str:
    """Return the score ± its standard error."""
    if score is None:
        return ""
    text = format_decimal(score.score)
    if score.stderr is None:
        return text
    return f"{text} <small>± {format_decimal(score.stderr)}</small>"


def render_benchmark_figure(columns: list[EvalColumn]) -> str:
    """Draw scores with their standard error: a color per model, hollow for hf."""
    values = []
    for column in columns:
        labels = {"column": column.label, "model": column.model, "backend": column.backend}
        for (task, metric), score in column.scores.items():
            if score.stderr is not None:
                low = score.score - score.stderr
                high = score.score + score.stderr
                ends = {"score": score.score, "low": low, "high": high}
                values.append({"task": f"{task} {metric}", **labels, **ends})
    models = list(dict.fromkeys(column.model for column in columns))
    by_model = color_by("model", models)
    hollow = {"test": "datum.backend === 'hf'", "value": "var(--bg)"}
    tooltip = [nominal("task"), nominal("column")]
    for field in ("score", "low", "high"):
        tooltip.append(quantitative(field, format=".3f"))
    task = {**nominal("task"), "title": None, "sort": None}
    task["axis"] = {"labelLimit": 130}
    labels = [column.label for column in columns]
    offset = {"field": "column", "sort": labels}
    axis = {"title": "score", "scale": {"zero": False}}
    bar = {"x": quantitative("low", **axis), "x2": {"field": "high"}}
    bar["color"] = by_model
    point = {"x": quantitative("score", **axis)}
    point["fill"] = {"condition": hollow, **by_model}
    point |= {"stroke": by_model, "tooltip": tooltip}
    rule = {"type": "rule", "strokeWidth": 1.5}
    dot = {"type": "point", "filled": True, "size": 60, "opacity": 1, "strokeWidth": 1.5}
    n_tasks = len({value["task"] for value in values})
    height = 45 + 14 * len(values) + 20 * n_tasks
    spec: Spec = {"height": height, "data": {"values": values}}
    spec["encoding"] = {"y": task, "yOffset": offset}
    bars = {"mark": rule, "encoding": bar}
    points = {"mark": dot, "encoding": point}
    spec["layer"] = [bars, points]
    caption = BENCHMARK_CAPTION
    if any(value["backend"] == "hf" for value in values):
        caption += " Hollow: hf."
    return color_legend(models) + render_figure(spec, caption)
