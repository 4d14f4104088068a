"""Benchmark items that the model may have seen: which of them share 13 words in a row with a document it was trained on, and its score without them."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from jaxpt import stage
from jaxpt.data import benchmarks, decontaminate, executor
from jaxpt.lineage import read_lineage

MIN_BYTES_FOR_PROCESSES = (
    2**25
)  # bytes of shards from which processes of their own are started: that takes some seconds
MAX_EXAMPLES = 3  # overlapping items of each task that the results quote


class TrainingCorpora(NamedTuple):
    """What a model's lineage says of the text it was trained on.

    directories  prepared corpora that still lie where they were read
    unknown      a sentence for each origin whose text cannot be looked at
    """

    directories: list[pathlib.Path]
    unknown_sources: list[str]


def find_training_corpora(model: pathlib.Path) -> TrainingCorpora:
    """The corpora behind a run, a checkpoint or an export, its parents' too, by following the manifests."""
    found, unknown = [], []
    nodes = read_lineage(model.resolve(), unknown)
    for node in nodes:
        if node.kind == "corpus" and (node.path / "train").is_dir() and not node.has_changed:
            found.append(node.path)
        elif node.kind == "corpus":
            unknown.append(
                f"{node.path}: {'was made anew since it was read' if node.has_changed else 'does not lie there any more'}."
            )
        elif not node.manifest and node is not nodes[-1]:
            unknown.append(f"{node.path}: made elsewhere, so what text went into it is not known.")
    return TrainingCorpora(found, unknown)


def measure_contamination(
    corpora: TrainingCorpora, samples: dict[str, list[dict]], configs: dict[str, dict]
) -> dict[str, Any]:
    """What of the benchmarks' items stands in the training documents, and each task's scores without those items.

    samples  of each task, what the harness logged of its items: doc_id, doc, filter, and each metric's value
    configs  of each task, as the harness reports it: how a metric's values become a score

    Returns {"ngram", "corpora": {path: documents}, "unknown", "tasks": {task: {"items", "overlapping", "short", "examples", "without"}}}; short
    items have fewer than 13 words, so nothing can be found of them.
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
    """({(task, item): (13 words that it shares, id of the first document that has them)}, {corpus: its training documents}).

    A shard is a job; of several, each core does its own (20 MB a second and core).
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
    """{"file", "documents": how many it holds, "shared": [[task, item, words, id of the first document], ...]} of a shard."""
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
    """Of items as JSON; made once in each process."""
    return decontaminate.NgramIndex(
        [benchmarks.BenchmarkItem(task, id, text, {}) for task, id, text in json.loads(items)]
    )


def split_scores(logged: list[dict], settings: dict) -> dict[str, float]:
    """The harness's score and standard error of each metric over these items, {} of none.

    A metric is aggregated as its task says, by mean where it does not say: the harness's own default for those that it logs by item.
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
    """A line for each task: items that overlap, and each score beside the score without them."""
    lines = []
    for task, each in found["tasks"].items():
        line = f"{task}: {each['overlapping']:,} of {each['items']:,} items share {found['ngram']} words in a row with a training document"
        line += f" ({each['short']:,} are too short to tell)" if each["short"] else ""
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
            f"looked through: {looked or 'nothing'}",
            *(f"not looked at: {why}" for why in found["unknown"]),
        ]
    )
