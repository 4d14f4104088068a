"""Section: benchmarks and bits per byte, by model and backend."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

from jaxpt.report.figures import assign_colors, render_figure
from jaxpt.report.format import clip_text, format_decimal, format_seconds, format_whole, is_finite
from jaxpt.report.html import collapsible, color_legend, escape, html_table
from jaxpt.report.read import RunData, list_sources, model_sort_key, order_keys, short_model_name


@dataclasses.dataclass
class EvalColumn:
    """Scores of one model by one backend, from one results file or from several that measured different tasks.

    paths   as which it was measured: a run, its last checkpoint and its export are one model
    scores  (task, metric) -> (score, standard error or None, number of items)
    """

    name: str
    step: int | None
    backend: str
    paths: list[str]
    scores: dict[tuple[str, str], tuple]
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.name} {self.backend}"


def evaluation_section(runs: list[RunData]) -> str:
    columns = collect_columns(runs)
    if not columns:
        return ""
    domains = [(f"bits_per_byte/{name}", "bits_per_byte") for name in list_sources(runs)]
    keys = order_keys(domains, (key for column in columns for key in column.scores))
    has_error = any(
        error is not None for column in columns for _, error, _ in column.scores.values()
    )
    body = []
    for task, metric in keys:
        found = [column.scores.get((task, metric)) for column in columns]
        n = next((each[2] for each in found if each and each[2]), None)
        label = f"{escape(task.removeprefix('bits_per_byte/'))} <small>{escape(metric.replace('_', ' '))}{f', {format_whole(n)} items' if n else ''}</small>"
        body.append([label, *(format_score(*each) if each else "" for each in found)])
    body.append(["time", *(format_seconds(column.seconds or None) for column in columns)])
    caption = "Bits per byte: lower is better." + (
        " Benchmarks: higher is better, ± one standard error." if has_error else ""
    )
    caption += (
        " jax: our code; hf: the exported model in transformers."
        + render_backend_differences(columns)
    )
    heads = [f"{escape(column.name)}<br>{escape(column.backend)}" for column in columns]
    return (
        html_table(["", *heads], body, caption)
        + (render_benchmarks(columns) if has_error else "")
        + render_contamination(runs, columns)
    )


def collect_columns(runs: list[RunData]) -> list[EvalColumn]:
    """Models in the order of the runs, transformers' numbers behind ours; no two of one label."""
    columns: list[EvalColumn] = []
    for run in runs:
        for result in run.evals.values():
            path, backend, step = (
                str(result.get("model", run.name)),
                str(result.get("backend", "")),
                (result.get("lineage") or {}).get("step"),
            )
            scores = {
                (task, metric): value
                for task, metrics in result["results"].items()
                for metric, value in list_scores(result, task, metrics)
            }
            key = (short_model_name(path), step, backend)
            same = (
                each
                for each in columns
                if (each.name, each.step, each.backend) == key
                and (path in each.paths or not each.scores.keys() & scores.keys())
            )
            if not (column := next(same, None)):
                columns.append(column := EvalColumn(*key, [], {}, 0.0))
            column.paths.append(path)
            column.scores |= scores
            column.seconds += is_finite(result.get("seconds")) or 0
    columns.sort(
        key=lambda column: (
            model_sort_key(column.name, runs),
            column.step or 0,
            column.backend == "hf",
        )
    )
    for names in (
        lambda column: f"{column.name}, step {column.step}",
        lambda column: "/".join(pathlib.PurePath(column.paths[0]).parts[-3:]),
    ):
        labels = [column.label for column in columns]
        for column in [each for each in columns if labels.count(each.label) > 1]:
            column.name = names(column)
    return columns


def render_contamination(runs: list[RunData], columns: list[EvalColumn]) -> str:
    """Benchmark items that stand in the text a model was trained on, and its scores without them."""
    body, short, unknown, quotes = [], 0, [], []
    for result in (
        result for run in runs for result in run.evals.values() if result.get("contamination")
    ):
        found, path = result["contamination"], str(result["model"])
        name = next(
            column.label
            for column in columns
            if path in column.paths and column.backend == result["backend"]
        )
        unknown += found["unknown"]
        for task, each in found["tasks"].items():
            short = max(short, each["short"])
            quotes += [
                f"{task}, item {quote['item']}, in {quote['document']}: {clip_text(quote['shared'], 200)}"
                for quote in each["examples"]
            ]
            ours = dict(list_scores(result, task, result["results"][task]))
            without = dict(list_scores(result, task, each["without"]))
            for metric, (score, error, _) in ours.items():
                shown = (
                    format_score(*without[metric])
                    if metric in without and each["overlapping"]
                    else ""
                )
                label = f"{escape(task)} <small>{escape(metric.replace('_', ' '))}</small>"
                body.append(
                    [
                        label,
                        escape(name),
                        f"{format_whole(each['overlapping'])} of {format_whole(each['items'])}",
                        format_score(score, error, 0),
                        shown,
                    ]
                )
    if not body:
        return ""
    caption = "Items that share 13 words in a row with a document the model was trained on, found by following its lineage to the corpora."
    caption += (
        f" At most {format_whole(short)} items of a task have fewer words, so nothing can be found of them."
        if short
        else ""
    )
    caption += "".join(f" Not looked at: {why}" for why in dict.fromkeys(unknown))
    table = html_table(["", "model", "overlap", "score", "without them"], body, caption, texts=2)
    listed = "".join(f"<li>{escape(quote)}</li>" for quote in dict.fromkeys(quotes))
    return f"<h3>Seen in training</h3>{table}" + (
        collapsible("What they share", f'<ul class="small">{listed}</ul>') if quotes else ""
    )


def render_backend_differences(columns: list[EvalColumn]) -> str:
    """How far our numbers are from the reference's, where a model was scored by both."""
    differences = []
    for ours, theirs in itertools.permutations(columns, 2):
        if (ours.name, ours.step, ours.backend, theirs.backend) == (
            theirs.name,
            theirs.step,
            "jax",
            "hf",
        ):
            differences += [
                abs(ours.scores[key][0] - theirs.scores[key][0])
                for key in ours.scores.keys() & theirs.scores.keys()
            ]
    if not any(differences):
        return " They are equal." if differences else ""
    return f" They differ by {max(differences):.0e} at most."


def format_score(score: float, error: float | None, n: int) -> str:
    return format_decimal(score) + (
        f" <small>± {format_decimal(error)}</small>" if error is not None else ""
    )


def list_scores(result: dict, task: str, metrics: dict) -> Iterable[tuple[str, tuple]]:
    """("acc", (score, standard error or None, number of items)) for each metric that the harness reports of a task."""
    n = (result.get("n-samples") or {}).get(task) or {}
    for name, value in metrics.items():
        metric, _, rule = name.partition(",")
        if rule and not metric.endswith("_stderr") and is_finite(value) is not None:
            error = is_finite(metrics.get(f"{metric}_stderr,{rule}"))
            yield (
                metric if rule == "none" else f"{metric}, {rule}",
                (value, error, n.get("effective") if isinstance(n, dict) else n),
            )


def render_benchmarks(columns: list[EvalColumn]) -> str:
    """Scores with their standard error, drawn: a colour for each model, hollow where transformers computed them."""
    values = []
    for column in columns:
        for (task, metric), (score, error, _) in column.scores.items():
            if error is not None:
                where = {
                    "task": f"{task} {metric}",
                    "column": column.label,
                    "model": column.name,
                    "backend": column.backend,
                }
                values.append(
                    {**where, "score": score, "low": score - error, "high": score + error}
                )
    models = list(dict.fromkeys(column.name for column in columns))
    by_model = {"field": "model", "type": "nominal", "legend": None, "scale": assign_colors(models)}
    hollow = {"test": "datum.backend === 'hf'", "value": "var(--bg)"}
    axis = {"type": "quantitative", "title": "score", "scale": {"zero": False}}
    tooltip = [{"field": field, "type": "nominal"} for field in ("task", "column")]
    tooltip += [
        {"field": field, "type": "quantitative", "format": ".3f"}
        for field in ("score", "low", "high")
    ]
    point = {
        "x": {"field": "score", **axis},
        "fill": {"condition": hollow, **by_model},
        "stroke": by_model,
        "tooltip": tooltip,
    }
    spec = {
        "height": 45 + 14 * len(values) + 20 * len({value["task"] for value in values}),
        "data": {"values": values},
        "encoding": {
            "y": {
                "field": "task",
                "type": "nominal",
                "title": None,
                "sort": None,
                "axis": {"labelLimit": 130},
            },
            "yOffset": {"field": "column", "sort": [column.label for column in columns]},
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1.5},
                "encoding": {
                    "x": {"field": "low", **axis},
                    "x2": {"field": "high"},
                    "color": by_model,
                },
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 60,
                    "opacity": 1,
                    "strokeWidth": 1.5,
                },
                "encoding": point,
            },
        ],
    }
    caption = "One standard error to either side; where bars overlap, the difference may be chance."
    return color_legend(models) + render_figure(
        spec,
        caption + (" Hollow: hf." if any(value["backend"] == "hf" for value in values) else ""),
    )
