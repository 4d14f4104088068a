"""Describe what models score and write: benchmarks, samples, documents on which two differ."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxpt.report import read
from jaxpt.report.figures import (
    LINE,
    Cell,
    Figure,
    Palette,
    Spec,
    Table,
    color_by,
    nominal,
    quantitative,
    series_color,
)
from jaxpt.report.format import (
    MAX_TEXT,
    clip_text,
    finite_or_none,
    format_brief,
    format_change,
    format_decimal,
    format_seconds,
    format_signed,
    format_whole,
)
from jaxpt.report.read import RunData
from jaxpt.report.records import (
    Continuation,
    DocumentDifference,
    Evaluation,
    Samples,
    TaskScore,
    parse_scores,
)

MetricKey = tuple[str, str]  # (task, metric)
OVERLAP_CAPTION = (
    "Items that share 13 consecutive words with a document the model was trained on, "
    "found by following its lineage to the corpora."
)
SCORE_BAR = {"type": "rule", "strokeWidth": 1.5}
SCORE_DOT = {"type": "point", "filled": True, "size": 60, "opacity": 1, "strokeWidth": 1.5}
SCORE_TOOLTIP = [nominal("task"), nominal("column")]
SCORE_TOOLTIP += [quantitative(field, format=".3f") for field in ("score", "low", "high")]
MAX_PROMPTS = 24  # shown of all files together
MAX_TOKENS_PER_DOCUMENT = 256  # colored; fewer where the page shows several comparisons
MAX_TOKENS_LISTED = 6  # tokens of a document in the table under it
N_CONTEXT_TOKENS = 4  # tokens shown before each of those
NATS_PER_SHADE = 0.7  # each shade is another factor of two in probability
BENCHMARK_CAPTION = (
    "One standard error to either side; where bars overlap, the difference may be chance."
)
# axis of a long context -> measures of which each is of one place on it
PLACES = {"position": r"(nats)_(\d+-\d+)", "depth": r"(acc)_depth_([\d.]+)"}
DIRECTIONS = {True: "higher is better", False: "lower is better"}


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


class EvaluationView(NamedTuple):
    """What the section Evaluation shows."""

    table: Table
    models: Palette
    benchmarks: list[Figure]  # one per Measure: each has an axis of its own
    overlaps: Table | None  # benchmark items that were seen in training
    shared_words: list[str]


def make_evaluation(runs: list[RunData]) -> EvaluationView | None:
    """Return the scores, benchmarks as figures too; None if nothing was evaluated."""
    columns = make_eval_columns(runs)
    if not columns:
        return None
    keys: list[MetricKey] = [
        (f"bits_per_byte/{name}", "bits_per_byte") for name in read.list_sources(runs)
    ]
    for column in columns:
        keys += [key for key in column.scores if key not in keys]
    rows: list[list[str | Cell]] = []
    for key in keys:
        scores = [column.scores.get(key) for column in columns]
        if any(scores):
            n_items = [score.n_items for score in scores if score and score.n_items]
            label = format_metric(*key, *n_items[:1])
            rows.append([label, *map(format_score, scores)])
    times = [format_seconds(column.seconds or None) for column in columns]
    rows.append(["time", *times])
    scores = [score for column in columns for score in column.scores.values()]
    caption = describe_directions(scores)
    if any(score.stderr is not None for score in scores):
        caption += " ±: one standard error."
    caption += " jax: our code; hf: the exported model in transformers."
    caption += describe_backend_difference(columns)
    heads = ["", *(Cell(column.model, column.backend) for column in columns)]
    models = color_models(columns, runs)
    benchmarks = plot_benchmarks(columns, models)
    overlaps, shared_words = list_contamination(runs, columns)
    table = Table(heads, rows, caption)
    return EvaluationView(table, models, benchmarks, overlaps, shared_words)


def color_models(columns: list[EvalColumn], runs: list[RunData]) -> Palette:
    """Return the color of each model: its run's, or one that no run has."""
    colors: dict[str, str] = {}
    n_others = 0
    for column in columns:
        i = read.get_run_index(column.model_paths[0], runs)
        if i == len(runs):
            i += n_others
            n_others += column.model not in colors
        colors.setdefault(column.model, series_color(i))
    return Palette(list(colors), list(colors.values()))


def describe_directions(scores: list[TaskScore]) -> str:
    """Say which metrics are better high and which low, by the harness's own word."""
    sentences = []
    for direction, words in DIRECTIONS.items():
        names = [score.metric for score in scores if score.higher_is_better is direction]
        if names:
            listed = ", ".join(name.replace("_", " ") for name in dict.fromkeys(names))
            sentences.append(f"{words.capitalize()}: {listed}.")
    return " ".join(sentences)


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
    new = EvalColumn(read.short_model_name(path), step, result.backend, {})
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
    return read.get_run_index(column.model, runs), column.step or 0, column.backend == "hf"


def label_apart(columns: list[EvalColumn], make_name: Callable[[EvalColumn], str]) -> None:
    """Rename the models of columns that have one label."""
    labels = [column.label for column in columns]
    for column, label in zip(columns, labels, strict=True):
        if labels.count(label) > 1:
            column.model = make_name(column)


def index_scores(scores: Iterable[TaskScore]) -> dict[MetricKey, TaskScore]:
    """Return the scores by task and metric; a filter other than "none" is part of the metric."""
    by_key = {}
    for score in scores:
        suffix = "" if score.filter == "none" else f", {score.filter}"
        by_key[score.task, score.metric + suffix] = score
    return by_key


def list_contamination(
    runs: list[RunData], columns: list[EvalColumn]
) -> tuple[Table | None, list[str]]:
    """Return which benchmark items were seen in training, and the scores without them."""
    rows = []
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
                    row = [format_metric(*key), label, share]
                    row.append(format_score(score))
                    row.append(format_score(clean.get(key)))
                    rows.append(row)
    if not rows:
        return None, []
    caption = OVERLAP_CAPTION
    if n_short:
        n = format_whole(n_short)
        caption += f" At most {n} items of a task have fewer words, so no overlap can be found."
    for reason in dict.fromkeys(unchecked):
        caption += f" Not searched: {reason}"
    heads = ["", "model", "overlap", "score", "without them"]
    overlaps = Table(heads, rows, caption, n_text_columns=2)
    return overlaps, list(dict.fromkeys(examples))


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
                if our_score is not None and their_score is not None:
                    differences.append(abs(our_score - their_score))
    if not differences:
        return ""
    if not any(differences):
        return " They are equal."
    return f" They differ by {max(differences):.0e} at most."


def format_metric(task: str, metric: str, n_items: int | None = None) -> Cell:
    """Return a row's first cell."""
    details = metric.replace("_", " ")
    if n_items:
        details += f", {format_whole(n_items)} items"
    return Cell(task.removeprefix("bits_per_byte/"), details)


def format_score(score: TaskScore | None) -> Cell:
    """Return the score ± its standard error, or why there is none."""
    if score is None:
        return Cell("")
    if score.score is None:
        return Cell("-", score.reason)
    error = "" if score.stderr is None else f"± {format_decimal(score.stderr)}"
    return Cell(format_decimal(score.score), error)


class Measure(NamedTuple):
    """A kind of measure, whose scores share an axis; of a long context those of one task."""

    metric: str
    higher_is_better: bool | None
    task: str = ""
    places: str = ""  # of PLACES, the other axis


def plot_benchmarks(columns: list[EvalColumn], models: Palette) -> list[Figure]:
    """Draw scores with their standard error, a figure for each kind of measure."""
    values: dict[Measure, list[dict[str, Any]]] = {}
    for column in columns:
        labels = {"column": column.label, "model": column.model, "backend": column.backend}
        for (task, metric), score in column.scores.items():
            if score.score is None or score.stderr is None:
                continue
            ends = {"low": score.score - score.stderr, "high": score.score + score.stderr}
            value = {"task": f"{task} {metric}", **labels, "score": score.score, **ends}
            kind = Measure(score.metric, score.higher_is_better)
            for axis, pattern in PLACES.items():
                found = re.fullmatch(pattern, score.metric)
                if found:
                    kind = Measure(found[1], score.higher_is_better, task, axis)
                    value[axis] = found[2]
            values.setdefault(kind, []).append(value)
    labels = [column.label for column in columns]
    figures = []
    for kind, own in values.items():
        if kind.places:
            figures.append(plot_over_places(kind, own, models))
        else:
            figures.append(plot_measure(kind, own, labels, models))
    return figures


def plot_measure(
    kind: Measure, values: list[dict[str, Any]], labels: list[str], models: Palette
) -> Figure:
    """Draw scores of one kind: a color per model, hollow for hf."""
    by_model = color_by("model", models)
    hollow = {"test": "datum.backend === 'hf'", "value": "var(--bg)"}
    task = {**nominal("task"), "title": None, "sort": None}
    task["axis"] = {"labelLimit": 130}
    offset = {"field": "column", "sort": labels}
    title = kind.metric.replace("_", " ")
    axis = {"title": title, "scale": {"zero": False}}
    bar = {"x": quantitative("low", **axis), "x2": {"field": "high"}}
    bar["color"] = by_model
    point = {"x": quantitative("score", **axis)}
    point["fill"] = {"condition": hollow, **by_model}
    point |= {"stroke": by_model, "tooltip": SCORE_TOOLTIP}
    n_tasks = len({value["task"] for value in values})
    height = 45 + 14 * len(values) + 20 * n_tasks
    spec: Spec = {"height": height, "data": {"values": values}}
    spec["encoding"] = {"y": task, "yOffset": offset}
    bars = {"mark": SCORE_BAR, "encoding": bar}
    points = {"mark": SCORE_DOT, "encoding": point}
    spec["layer"] = [bars, points]
    caption = describe_measure(kind, title)
    if any(value["backend"] == "hf" for value in values):
        caption += " Hollow: hf."
    return Figure(spec, caption)


def plot_over_places(kind: Measure, values: list[dict[str, Any]], models: Palette) -> Figure:
    """Draw what a task measures at several places of a long context, a line per model."""
    places = {value[kind.places]: None for value in values}
    order = sorted(places, key=lambda place: float(place.partition("-")[0]))
    place = {"field": kind.places, "type": "ordinal", "sort": order, "axis": {"labelAngle": 0}}
    title = {"nats": "nats per token"}.get(kind.metric, kind.metric)
    scale = {"zero": False}
    by_model = {"color": color_by("model", models), "detail": nominal("column")}
    score = {"y": quantitative("score", title=title, scale=scale), **by_model}
    bar = {"y": quantitative("low", title=title, scale=scale), "y2": {"field": "high"}, **by_model}
    spec: Spec = {"height": 180, "data": {"values": values}, "encoding": {"x": place}}
    lines = {"mark": LINE, "encoding": score}
    bars = {"mark": SCORE_BAR, "encoding": bar}
    points = {"mark": SCORE_DOT, "encoding": {**score, "tooltip": SCORE_TOOLTIP}}
    spec["layer"] = [lines, bars, points]
    return Figure(spec, describe_measure(kind, title), kind.task)


def describe_measure(kind: Measure, title: str) -> str:
    """Return the caption of a figure: what is better, and what the bars are."""
    if kind.higher_is_better is None:
        return BENCHMARK_CAPTION
    return f"{title.capitalize()}: {DIRECTIONS[kind.higher_is_better]}. {BENCHMARK_CAPTION}"


# ---- samples: continuations of the same prompts, side by side


class Output(NamedTuple):
    """A model's continuation of a prompt."""

    model: str
    color: int | None  # of the run; None: of another model
    text: str
    speed: str


class SampleFile(NamedTuple):
    """What the page shows of a samples.json."""

    prompts: list[tuple[str, list[Output]]]  # each with its continuations
    bits_per_byte: Table | None
    description: str


def make_samples(runs: list[RunData]) -> list[SampleFile]:
    """Return the prompts of each samples.json with their continuations."""
    found = []
    files = read.group_distinct_values(runs, lambda run: run.samples)
    for samples, _ in files:
        max_prompts = max(1, MAX_PROMPTS // len(files))
        prompts = []
        for prompt in samples.prompts[:max_prompts]:
            outputs = [describe_output(output, runs) for output in prompt.continuations]
            prompts.append((clip_text(prompt.prompt, MAX_TEXT), outputs))
        description = describe_samples(samples, len(samples.prompts) - max_prompts)
        found.append(SampleFile(prompts, make_bits_table(samples), description))
    return found


def make_bits_table(samples: Samples) -> Table | None:
    """Return each model's bits per byte on the files that were compared."""
    if not samples.bits_per_byte:
        return None
    models = []
    for scores in samples.bits_per_byte.values():
        models += scores
    models = list(dict.fromkeys(models))
    rows = []
    for file, scores in samples.bits_per_byte.items():
        reasons = samples.reasons.get(file, {})
        cells = []
        for name in models:
            cell = Cell(format_decimal(scores.get(name)))
            if name in scores and scores[name] is None:
                cell = Cell("-", reasons.get(name, ""))
            cells.append(cell)
        rows.append([file, *cells])
    return Table(["bits per byte", *models], rows)


def describe_samples(samples: Samples, n_left_out: int) -> str:
    """Describe how the continuations were sampled."""
    settings = []
    for key, value in (samples.settings or {}).items():
        if value is not None:
            settings.append(f"{key.replace('_', ' ')} {value}")
    text = ", ".join(settings)
    text = f"Each model's continuation of the prompt above it. {text[:1].upper()}{text[1:]}."
    if n_left_out > 0:
        text += f" {n_left_out} more prompts are in eval/samples.json."
    return text


def describe_output(output: Continuation, runs: list[RunData]) -> Output:
    """Return one model's continuation of a prompt."""
    name = read.short_model_name(output.model)
    i = read.get_run_index(name, runs)
    speed = ""
    if output.n_tokens and output.seconds:
        per_second = format_brief(output.n_tokens / output.seconds)
        speed = f"{format_whole(output.n_tokens)} tokens, {per_second} per second"
    text = clip_text(output.text.lstrip(" ").strip("\n"), MAX_TEXT)
    return Output(name, i if i < len(runs) else None, text, speed)


# ---- differences: documents on which two models differ most, by token
# Colors show them in the text; tables of numbers serve whoever cannot see or point.


class TokenLosses(NamedTuple):
    """A token's text and its loss by both models, in nats."""

    text: str
    parent: float
    child: float

    @property
    def change(self) -> float:
        """The child's loss above the parent's."""
        return self.child - self.parent

    @property
    def css_class(self) -> str:
        """Class in page.css: b1 to b3 for better, w1 to w3 for worse, "" for hardly different."""
        level = min(3, int(abs(self.change) / NATS_PER_SHADE))
        side = "b" if self.change < 0 else "w"
        return f"{side}{level}" if level else ""

    @property
    def visible(self) -> str:
        """The text with white space made visible."""
        return show_whitespace(self.text)

    @property
    def losses(self) -> str:
        """Both losses in words."""
        return format_change(self.parent, self.child, 2)


class TokenInContext(NamedTuple):
    """A token behind what stands before it."""

    context: str
    text: str
    css_class: str


class DocumentView(NamedTuple):
    """A document by token, and a table of the tokens that differ most."""

    title: str
    tokens: list[TokenLosses]
    most_different: Table


class DifferencesView(NamedTuple):
    """What the page shows of a differences.json."""

    sides: list[tuple[str, list[DocumentView]]]  # more likely, less likely; each with a title
    note: str


def make_differences(runs: list[RunData]) -> list[DifferencesView]:
    """Return each comparison: documents that got better, then those that got worse."""
    views = []
    comparisons = read.group_distinct_values(runs, lambda run: run.differences)
    for found, _ in comparisons:
        models = [read.short_model_name(name) for name in found.models]
        max_tokens = MAX_TOKENS_PER_DOCUMENT // len(comparisons)
        sides = []
        for side, documents in (("more", found.better), ("less", found.worse)):
            if documents:
                title = f"What {models[1]} finds {side} likely than {models[0]}"
                shown = [describe_document(each, models, max_tokens) for each in documents]
                sides.append((title, shown))
        note = (
            f"Of {format_whole(found.n_documents)} documents, each read up to "
            f"{format_whole(found.max_length)} tokens, those whose mean loss differs most, and of "
            f"each the {max_tokens} tokens that differ most. Losses in nats."
        )
        views.append(DifferencesView(sides, note))
    return views


def describe_document(
    document: DocumentDifference, models: list[str], max_tokens: int
) -> DocumentView:
    """Return a document's first tokens with their losses, and those that differ most."""
    losses = zip(document.token_texts, *document.token_losses, strict=True)
    tokens = [TokenLosses(*values) for values in losses][:max_tokens]
    title = (
        f"{document.document_id}: {format_change(*document.mean_losses)} "
        f"nats per token over {format_whole(document.n_tokens)} tokens"
    )
    if document.window_start:
        title += f", from token {format_whole(document.window_start)}"
    return DocumentView(title, tokens, list_most_different(tokens, models))


def list_most_different(tokens: list[TokenLosses], models: list[str]) -> Table:
    """Return a table of the tokens with the largest difference, each behind its context."""
    order = sorted(range(len(tokens)), key=lambda i: -abs(tokens[i].change))
    rows = []
    for i in order[:MAX_TOKENS_LISTED]:
        token = tokens[i]
        before = tokens[max(0, i - N_CONTEXT_TOKENS) : i]
        context = "".join(each.visible for each in before)
        marked = TokenInContext(context, token.visible, token.css_class)
        losses = [f"{token.parent:.2f}", f"{token.child:.2f}", format_signed(token.change, 2)]
        rows.append([marked, *losses])
    heads = ["token, in its context", *models, "difference"]
    return Table(heads, rows, css_class="listed")


def show_whitespace(text: str) -> str:
    """Make white space visible, so that a token of nothing else is seen."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")
