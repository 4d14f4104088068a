"""Section: benchmarks and bits per byte, by model and backend."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from jaxpt.report.figures import figure, palette
from jaxpt.report.markup import details, esc, grid, key_of
from jaxpt.report.read import RunData, domains_of, in_order, model_name, model_order
from jaxpt.report.words import clip, decimal, duration, finite, whole


def section(runs: list[RunData]) -> str:
    columns: dict[tuple[str, str], dict] = {}  # (model's path, backend) -> {(task, metric): (score, error, n)}
    seconds: dict[tuple[str, str], float] = {}
    for run in runs:
        for result in run.evals.values():
            key = (str(result.get("model", run.name)), str(result.get("backend", "")))
            seconds[key] = seconds.get(key, 0) + (finite(result.get("seconds")) or 0)
            scores = columns.setdefault(key, {})
            for task, metrics in result.get("results", {}).items():
                scores.update({(task, metric): value for metric, value in scores_of(result, task, metrics)})
    if not columns:
        return ""
    columns = dict(sorted(columns.items(), key=lambda item: (model_order(item[0][0], runs), item[0][1] == "hf")))
    names = column_names(list(columns))
    domains = [(f"bits_per_byte/{name}", "bits_per_byte") for name in domains_of(runs)]
    keys = in_order(domains, (key for scores in columns.values() for key in scores))
    has_error = any(error is not None for scores in columns.values() for _, error, _ in scores.values())
    body = []
    for task, metric in keys:
        found = [scores.get((task, metric)) for scores in columns.values()]
        n = next((each[2] for each in found if each and each[2]), None)
        label = f"{esc(task.removeprefix('bits_per_byte/'))} <small>{esc(metric.replace('_', ' '))}{f', {whole(n)} items' if n else ''}</small>"
        body.append([label, *(score_text(*each) if each else "" for each in found)])
    body.append(["time", *(duration(seconds[key] or None) for key in columns)])
    caption = "Bits per byte: lower is better." + (" Benchmarks: higher is better, ± one standard error." if has_error else "")
    caption += " jax: our code; hf: the exported model in transformers." + backends_differ(columns)
    heads = [f"{esc(name)}<br>{esc(backend)}" for name, backend in names]
    return (
        grid(["", *heads], body, caption)
        + (benchmarks(columns, names) if has_error else "")
        + contaminated(runs, dict(zip(columns, names, strict=True)))
    )


def contaminated(runs: list[RunData], names: dict[tuple[str, str], tuple[str, str]]) -> str:
    """Benchmark items that stand in the text a model was trained on, and its scores without them."""
    body, short, unknown, quotes = [], 0, [], []
    for result in (result for run in runs for result in run.evals.values() if result.get("contamination")):
        found, name = result["contamination"], " ".join(names[str(result["model"]), str(result["backend"])])
        unknown += found["unknown"]
        for task, each in found["tasks"].items():
            short = max(short, each["short"])
            quotes += [f"{task}, item {quote['item']}, in {quote['document']}: {clip(quote['shared'], 200)}" for quote in each["examples"]]
            ours = dict(scores_of(result, task, result["results"][task]))
            without = dict(scores_of(result, task, each["without"]))
            for metric, (score, error, _) in ours.items():
                shown = score_text(*without[metric]) if metric in without and each["overlapping"] else ""
                label = f"{esc(task)} <small>{esc(metric.replace('_', ' '))}</small>"
                body.append([label, esc(name), f"{whole(each['overlapping'])} of {whole(each['items'])}", score_text(score, error, 0), shown])
    if not body:
        return ""
    caption = "Items that share 13 words in a row with a document the model was trained on, found by following its lineage to the corpora."
    caption += f" At most {whole(short)} items of a task have fewer words, so nothing can be found of them." if short else ""
    caption += "".join(f" Not looked at: {why}" for why in dict.fromkeys(unknown))
    table = grid(["", "model", "overlap", "score", "without them"], body, caption, texts=2)
    listed = "".join(f"<li>{esc(quote)}</li>" for quote in dict.fromkeys(quotes))
    return f"<h3>Seen in training</h3>{table}" + (details("What they share", f'<ul class="small">{listed}</ul>') if quotes else "")


def backends_differ(columns: dict) -> str:
    """How far our numbers are from the reference's, where a model was scored by both."""
    differences = []
    for (model, backend), ours in columns.items():
        theirs = columns.get((model, "hf"), {}) if backend == "jax" else {}
        differences += [abs(ours[key][0] - theirs[key][0]) for key in ours.keys() & theirs.keys()]
    if not any(differences):
        return " They are equal." if differences else ""
    return f" They differ by {max(differences):.0e} at most."


def score_text(score: float, error: float | None, n: int) -> str:
    return decimal(score) + (f" <small>± {decimal(error)}</small>" if error is not None else "")


def scores_of(result: dict, task: str, metrics: dict) -> Iterable[tuple[str, tuple]]:
    """("acc", (score, standard error or None, number of items)) for each metric that the harness reports of a task."""
    n = (result.get("n-samples") or {}).get(task) or {}
    for name, value in metrics.items():
        metric, _, rule = name.partition(",")
        if rule and not metric.endswith("_stderr") and finite(value) is not None:
            error = finite(metrics.get(f"{metric}_stderr,{rule}"))
            yield metric if rule == "none" else f"{metric}, {rule}", (value, error, n.get("effective") if isinstance(n, dict) else n)


def benchmarks(columns: dict, names: list[tuple[str, str]]) -> str:
    """Scores with their standard error, drawn: a colour for each model, hollow where transformers computed them."""
    values = []
    for (name, backend), scores in zip(names, columns.values(), strict=True):
        for (task, metric), (score, error, _) in scores.items():
            if error is not None:
                where = {"task": f"{task} {metric}", "column": f"{name} {backend}", "model": name, "backend": backend}
                values.append({**where, "score": score, "low": score - error, "high": score + error})
    models = list(dict.fromkeys(name for name, _ in names))
    by_model = {"field": "model", "type": "nominal", "legend": None, "scale": palette(models)}
    hollow = {"test": "datum.backend === 'hf'", "value": "var(--bg)"}
    axis = {"type": "quantitative", "title": "score", "scale": {"zero": False}}
    tooltip = [{"field": field, "type": "nominal"} for field in ("task", "column")]
    tooltip += [{"field": field, "type": "quantitative", "format": ".3f"} for field in ("score", "low", "high")]
    point = {"x": {"field": "score", **axis}, "fill": {"condition": hollow, **by_model}, "stroke": by_model, "tooltip": tooltip}
    spec = {
        "height": 45 + 14 * len(values) + 20 * len({value["task"] for value in values}),
        "data": {"values": values},
        "encoding": {
            "y": {"field": "task", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 130}},
            "yOffset": {"field": "column", "sort": [f"{name} {backend}" for name, backend in names]},
        },
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": {"x": {"field": "low", **axis}, "x2": {"field": "high"}, "color": by_model}},
            {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "strokeWidth": 1.5}, "encoding": point},
        ],
    }
    caption = "One standard error to either side; where bars overlap, the difference may be chance."
    return key_of(models) + figure(spec, caption + (" Hollow: hf." if any(value["backend"] == "hf" for value in values) else ""))


def column_names(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(run's name, backend); with the end of the path where two columns would read the same."""
    names = [(model_name(model), backend) for model, backend in keys]
    ends = ["/".join(pathlib.PurePath(model).parts[-3:]) for model, _ in keys]
    return [(end, name[1]) if names.count(name) > 1 else name for name, end in zip(names, ends, strict=True)]
