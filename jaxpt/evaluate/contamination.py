"""Find benchmark items that share 13 words with a training document, and score without them."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from jaxpt import stage
from jaxpt.data import benchmarks, decontaminate, executor
from jaxpt.lineage import read_lineage

# bytes of shards from which processes are started: that takes some seconds
MIN_BYTES_FOR_PROCESSES = 2**25
MAX_EXAMPLES = 3  # overlapping items of each task that the results quote


class TrainingCorpora(NamedTuple):
    """The text that a model was trained on, by its lineage.

    Attributes:
        directories: prepared corpora that are still where they were read.
        unknown_sources: a message for each origin whose text cannot be checked.
    """

    directories: list[pathlib.Path]
    unknown_sources: list[str]


def find_training_corpora(model: pathlib.Path) -> TrainingCorpora:
    """Return the corpora behind a run, checkpoint or export and its parents, by their manifests."""
    found, unknown = [], []
    nodes = read_lineage(model.resolve(), unknown)
    for node in nodes:
        if node.kind == "corpus" and (node.path / "train").is_dir() and not node.has_changed:
            found.append(node.path)
        elif node.kind == "corpus":
            reason = "was written again since it was read" if node.has_changed else "is not there"
            unknown.append(f"{node.path}: {reason}.")
        elif not node.manifest and node is not nodes[-1]:
            unknown.append(f"{node.path}: made elsewhere, so its training text is unknown.")
    return TrainingCorpora(found, unknown)


def measure_contamination(
    corpora: TrainingCorpora, samples: dict[str, list[dict]], configs: dict[str, dict]
) -> dict[str, Any]:
    """Return which items overlap training documents, and each task's scores without them.

    Args:
        corpora: what to look through.
        samples: per task, what the harness logged of its items: doc_id, doc, filter, metrics.
        configs: per task, as the harness reports it: how a metric's values become a score.

    Returns:
        {"ngram", "corpora": {path: documents}, "unknown", "tasks": {task: {"items", "overlapping",
        "short", "examples", "without"}}}. Short items have fewer than 13 words, so no overlap can
        be found for them.
    """
    items = []
    for task, logged in samples.items():
        docs = {each["doc_id"]: each["doc"] for each in logged}
        items += [
            benchmarks.BenchmarkItem(task, str(number), benchmarks.join_item_text(doc), {})
            for number, doc in docs.items()
        ]
    shared, n_documents = find_overlaps(items, corpora.directories)
    tasks = {}
    for task, logged in samples.items():
        own = [item for item in items if item.task == task]
        caught = {item.id: shared[task, item.id] for item in own if (task, item.id) in shared}
        tasks[task] = {
            "items": len(own),
            "overlapping": len(caught),
            "short": sum(
                len(decontaminate.normalize_words(item.text)) < decontaminate.DEFAULT_NGRAM
                for item in own
            ),
            "examples": [
                {"item": item, "shared": words, "document": document}
                for item, (words, document) in list(caught.items())[:MAX_EXAMPLES]
            ],
            "without": split_scores(
                [each for each in logged if str(each["doc_id"]) not in caught],
                configs.get(task, {}),
            ),
        }
    return {
        "ngram": decontaminate.DEFAULT_NGRAM,
        "corpora": n_documents,
        "unknown": corpora.unknown_sources,
        "tasks": tasks,
    }


def find_overlaps(
    items: list[benchmarks.BenchmarkItem], directories: list[pathlib.Path]
) -> tuple[dict[tuple[str, str], tuple[str, str]], dict[str, int]]:
    """Find the first training document that each item overlaps.

    A shard is a job; several run on all cores (20 MB/s per core).

    Returns:
        {(task, item): (shared words, document id)} and {corpus: number of training documents}.
    """
    asked = json.dumps([[item.task, item.id, item.text] for item in items])
    shards = {
        directory: sorted((directory / "train").glob("*.parquet")) for directory in directories
    }
    n_documents = {
        str(directory): sum(pq.read_metadata(file).num_rows for file in files)
        for directory, files in shards.items()
    }
    jobs = [{"file": str(file), "items": asked} for files in shards.values() for file in files]
    small = sum(pathlib.Path(job["file"]).stat().st_size for job in jobs) < MIN_BYTES_FOR_PROCESSES
    found = {}
    with stage.progress_bar("contamination", sum(n_documents.values()), "documents") as advance:
        for answer in (
            map(find_shard_overlaps, jobs)
            if small
            else executor.map_jobs("local", find_shard_overlaps, jobs)
        ):
            found[answer["file"]] = answer["shared"]
            advance(answer["documents"])
    shared: dict[tuple[str, str], tuple[str, str]] = {}
    for job in jobs:  # in the order of the corpora, however the jobs ended
        for task, item, words, document in found[job["file"]]:
            shared.setdefault((task, item), (words, document))
    return shared, n_documents


def find_shard_overlaps(job: dict[str, str]) -> dict[str, Any]:
    """Return a shard's "file", "documents" (count) and "shared": [[task, item, words, id], ...]."""
    index, shared, n = build_item_index(job["items"]), {}, 0
    for batch in pq.ParquetFile(job["file"]).iter_batches(256, columns=["id", "text"]):
        for document, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
            for item, words in index.find_matches(text):
                shared.setdefault((item.task, item.id), (words, document))
        n += batch.num_rows
    return {
        "file": job["file"],
        "documents": n,
        "shared": [[*key, *value] for key, value in shared.items()],
    }


@functools.lru_cache(maxsize=1)
def build_item_index(items: str) -> decontaminate.NgramIndex:
    """Return the index of items given as JSON, once per process."""
    return decontaminate.NgramIndex(
        [benchmarks.BenchmarkItem(task, id, text, {}) for task, id, text in json.loads(items)]
    )


def split_scores(logged: list[dict], settings: dict) -> dict[str, float]:
    """Return the harness's score and standard error of each metric over these items.

    A metric is aggregated as its task defines, else by the mean, the harness's own default for
    those that it logs by item.
    """
    from lm_eval.api import metrics, registry

    how = {each["metric"]: each.get("aggregation") for each in settings.get("metric_list") or []}
    found = {}
    for rule in dict.fromkeys(each["filter"] for each in logged):
        kept = [each for each in logged if each["filter"] == rule]
        for metric in kept[0]["metrics"]:
            named = how.get(metric) or "mean"
            aggregate = named if callable(named) else registry.get_aggregation(named)
            values = [each[metric] for each in kept]
            found[f"{metric},{rule}"] = float(aggregate(values))
            error = metrics.stderr_for_metric(aggregate, 1000) if len(values) > 1 else None
            if error:
                found[f"{metric}_stderr,{rule}"] = float(error(values))
    return found


def log_contamination(found: dict[str, Any], results: dict[str, dict]) -> str:
    """Return a line per task: items that overlap, and each score with and without them."""
    lines = []
    for task, each in found["tasks"].items():
        line = f"{task}: {each['overlapping']:,} of {each['items']:,} items share "
        line += f"{found['ngram']} consecutive words with a training document"
        line += f" ({each['short']:,} are too short to check)" if each["short"] else ""
        beside = [
            f"{metric.removesuffix(',none')} {results[task][metric]:.4f}, without them {score:.4f}"
            for metric, score in each["without"].items()
            if "_stderr," not in metric and each["overlapping"]
        ]
        lines.append("; ".join([line, *beside]))
    looked = ", ".join(f"{path} ({n:,} documents)" for path, n in found["corpora"].items())
    return "\n".join(
        [
            *lines,
            f"checked: {looked or 'nothing'}",
            *(f"not checked: {why}" for why in found["unknown"]),
        ]
    )
