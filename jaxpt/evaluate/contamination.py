"""Find benchmark items that share 13 words with a training document, and score without them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from jaxpt import io, stage
from jaxpt.data import benchmarks, decontaminate, executor
from jaxpt.lineage import read_lineage
from jaxpt.spec import Record

# bytes of shards from which processes are started: that takes some seconds
MIN_BYTES_FOR_PROCESSES = 2**25
MAX_EXAMPLES = 3  # overlapping items of each task that the results quote
BOOTSTRAP_SAMPLES = 1000  # for standard errors, as in harness.run_harness

ItemKey = tuple[str, str]  # task and item id
Match = tuple[str, str]  # shared words and document id


class TrainingCorpora(NamedTuple):
    """The text that a model was trained on, by its lineage.

    Attributes:
        directories: prepared corpora that are still where they were read.
        unknown_sources: a message for each origin whose text cannot be checked.
    """

    directories: list[io.Path]
    unknown_sources: list[str]


@dataclasses.dataclass(frozen=True)
class OverlapExample(Record):
    """Words that a benchmark item shares with a training document."""

    item: str  # id
    shared: str  # the words
    document: str  # id


@dataclasses.dataclass(frozen=True)
class TaskContamination(Record):
    """Benchmark items of one task that overlap the training text."""

    items: int
    overlapping: int
    short: int  # items of fewer than `ngram` words, for which no overlap can be found
    examples: tuple[OverlapExample, ...]
    # "METRIC,FILTER" -> score without the overlapping items; None: NaN or infinite
    without: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class ContaminationReport(Record):
    """Overlap of benchmarks with the text that a model was trained on."""

    ngram: int  # consecutive words that make an overlap
    corpora: dict[str, int]  # path -> training documents
    unknown: tuple[str, ...]  # messages, see TrainingCorpora
    tasks: dict[str, TaskContamination]


class ShardJob(NamedTuple):
    """A parquet file to look through."""

    file: str
    items: str  # JSON: [[task, id, text], ...]


class ShardOverlaps(NamedTuple):
    """What a ShardJob found."""

    file: str
    n_documents: int
    matches: tuple[tuple[str, str, str, str], ...]  # task, item id, shared words, document id


def find_training_corpora(model: io.Path) -> TrainingCorpora:
    """Return the corpora behind a run, checkpoint or export and its parents, by their manifests."""
    found, unknown = [], []
    nodes = read_lineage(io.resolve(model), unknown)
    for node in nodes:
        if node.kind == "corpus":
            if node.has_changed:
                unknown.append(f"{node.path}: was written again since it was read.")
            elif io.exists(node.path / "train"):
                found.append(node.path)
            else:
                unknown.append(f"{node.path}: is not there.")
        elif not node.manifest and node is not nodes[-1]:
            unknown.append(f"{node.path}: made elsewhere, so its training text is unknown.")
    return TrainingCorpora(found, unknown)


def measure_contamination(
    corpora: TrainingCorpora, samples: dict[str, list[dict]], configs: dict[str, dict]
) -> ContaminationReport:
    """Find the items that overlap training documents, and score each task without them.

    Args:
        corpora: what to look through.
        samples: per task, what the harness logged of its items: doc_id, doc, filter, metrics.
        configs: per task, as the harness reports it: how a metric's values become a score.
    """
    ngram = decontaminate.DEFAULT_NGRAM
    items_by_task = {task: list_task_items(task, logged) for task, logged in samples.items()}
    items = list(itertools.chain.from_iterable(items_by_task.values()))
    matches, n_documents = find_overlaps(items, corpora.directories)
    tasks = {}
    for task, own in items_by_task.items():
        n_short = 0
        examples: dict[str, OverlapExample] = {}
        for item in own:
            words = decontaminate.normalize_words(item.text)
            n_short += len(words) < ngram
            match = matches.get((task, item.id))
            if match:
                examples[item.id] = OverlapExample(item.id, *match)
        clean = [sample for sample in samples[task] if str(sample["doc_id"]) not in examples]
        quoted = list(examples.values())[:MAX_EXAMPLES]
        tasks[task] = TaskContamination(
            items=len(own),
            overlapping=len(examples),
            short=n_short,
            examples=tuple(quoted),
            without=compute_scores(clean, configs.get(task, {})),
        )
    return ContaminationReport(ngram, n_documents, tuple(corpora.unknown_sources), tasks)


def list_task_items(task: str, logged: list[dict]) -> list[benchmarks.BenchmarkItem]:
    """Return the items of a task that the harness logged, each once."""
    docs = {sample["doc_id"]: sample["doc"] for sample in logged}
    items = []
    for number, doc in docs.items():
        text = benchmarks.join_item_text(doc)
        items.append(benchmarks.BenchmarkItem(task, str(number), text, {}))
    return items


def find_overlaps(
    items: list[benchmarks.BenchmarkItem], directories: list[io.Path]
) -> tuple[dict[ItemKey, Match], dict[str, int]]:
    """Find the first training document that each item overlaps.

    A shard is a job; several run on all cores (20 MB/s per core).

    Returns:
        The match of each item that has one, and corpus -> number of training documents.
    """
    packed_items = json.dumps([[item.task, item.id, item.text] for item in items])
    n_documents: dict[str, int] = {}
    jobs = []
    n_bytes = 0
    for directory in directories:
        corpus = str(directory)
        n_documents[corpus] = 0
        files = io.find(io.local_copy(directory / "train"), "*.parquet")
        io.check_published(files)
        for file in files:
            n_documents[corpus] += pq.read_metadata(file).num_rows
            n_bytes += io.size(file) or 0
            jobs.append(ShardJob(str(file), packed_items))
    found = {}
    total = sum(n_documents.values())
    where = "local" if n_bytes >= MIN_BYTES_FOR_PROCESSES else "here"
    with stage.progress_bar("contamination", total, "documents") as advance:
        for overlaps in executor.map_jobs(where, find_shard_overlaps, jobs):
            found[overlaps.file] = overlaps.matches
            advance(overlaps.n_documents)
    first: dict[ItemKey, Match] = {}
    for job in jobs:  # in the order of the corpora, in whatever order the jobs ended
        for task, item, words, document in found[job.file]:
            first.setdefault((task, item), (words, document))
    return first, n_documents


def find_shard_overlaps(job: ShardJob) -> ShardOverlaps:
    """Look through one shard."""
    index = build_item_index(job.items)
    found: dict[ItemKey, Match] = {}
    n_documents = 0
    shard = pq.ParquetFile(job.file)
    for batch in shard.iter_batches(256, columns=["id", "text"]):
        ids = batch["id"].to_pylist()
        texts = batch["text"].to_pylist()
        for document, text in zip(ids, texts, strict=True):
            for item, words in index.find_matches(text):
                found.setdefault((item.task, item.id), (words, document))
        n_documents += batch.num_rows
    matches = tuple((*key, *match) for key, match in found.items())
    return ShardOverlaps(job.file, n_documents, matches)


@functools.lru_cache(maxsize=1)
def build_item_index(items: str) -> decontaminate.NgramIndex:
    """Return the index of ShardJob.items, once per process."""
    unpacked = []
    for task, id, text in json.loads(items):
        unpacked.append(benchmarks.BenchmarkItem(task, id, text, {}))
    return decontaminate.NgramIndex(unpacked)


def compute_scores(logged: list[dict], task_config: dict) -> dict[str, float | None]:
    """Return the harness's score and standard error of each metric over these items.

    A metric is aggregated as its task defines, else by the mean, the harness's own default for
    those that it logs per item.

    Args:
        logged: what the harness logged of the items.
        task_config: of the task, as the harness reports it.

    Returns:
        "METRIC,FILTER" -> score, and "METRIC_stderr,FILTER" -> standard error.
    """
    from lm_eval.api import metrics

    metric_list = task_config.get("metric_list") or []
    aggregations = {entry["metric"]: entry.get("aggregation") for entry in metric_list}
    scores: dict[str, float | None] = {}
    by_filter: dict[str, list[dict]] = {}
    for sample in logged:
        by_filter.setdefault(sample["filter"], []).append(sample)
    for rule, kept in by_filter.items():
        for metric in kept[0]["metrics"]:
            aggregate = find_aggregation(aggregations.get(metric) or "mean")
            values = [sample[metric] for sample in kept]
            scores[f"{metric},{rule}"] = float(aggregate(values))
            if len(values) < 2:
                continue
            estimate_stderr = metrics.stderr_for_metric(aggregate, BOOTSTRAP_SAMPLES)
            if estimate_stderr:
                scores[f"{metric}_stderr,{rule}"] = float(estimate_stderr(values))
    return scores


def find_aggregation(named: str | Callable[..., Any]) -> Callable[[Sequence[Any]], float]:
    """Return the function that makes one score of the values of a metric, given it or its name."""
    from lm_eval.api import registry

    if callable(named):
        return named
    aggregate = registry.get_aggregation(named)
    assert aggregate is not None
    return aggregate


def format_contamination(found: ContaminationReport, results: dict[str, dict]) -> str:
    """Return a line per task: items that overlap, and each score with and without them."""
    lines = []
    for task, counts in found.tasks.items():
        line = f"{task}: {counts.overlapping:,} of {counts.items:,} items share "
        line += f"{found.ngram} consecutive words with a training document"
        if counts.short:
            line += f" ({counts.short:,} are too short to check)"
        for metric, score in counts.without.items():
            if "_stderr," in metric or not counts.overlapping:
                continue
            name = metric.removesuffix(",none")
            before = results[task][metric]
            if before is None or score is None:
                continue
            line += f"; {name} {before:.4f}, without them {score:.4f}"
        lines.append(line)
    checked = [f"{path} ({n:,} documents)" for path, n in found.corpora.items()]
    lines.append(f"checked: {', '.join(checked) or 'nothing'}")
    lines += [f"not checked: {reason}" for reason in found.unknown]
    return "\n".join(lines)
