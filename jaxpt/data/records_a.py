"""What preparing a corpus and checking for contamination write as JSON or pass on."""

from __future__ import annotations

import dataclasses

from jaxpt.spec import Record

# ---- funnel.json and the manifest of the stage prepare


@dataclasses.dataclass(frozen=True)
class TextAmounts(Record):
    """How much text one source holds at one point of the funnel."""

    n_documents: int
    n_chars: int
    n_bytes: int  # of UTF-8
    n_tokens: int  # estimated from n_bytes


@dataclasses.dataclass(frozen=True)
class FunnelStep(Record):
    """What is left after one rule; the first step, "read", is what was read."""

    rule: str  # name of the rule, such as "exact_dedup"
    kept: dict[str, TextAmounts]  # source name -> what is left
    # source name -> edits made in documents that were kept; None: the rule does not edit
    n_edits: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class SkippedRecords(Record):
    """Records and files of one source that were skipped while reading it."""

    counts: dict[str, int]  # reason -> records or files
    messages: tuple[str, ...]  # the first errors about unreadable records, with file and record


@dataclasses.dataclass(frozen=True)
class Funnel(Record):
    """How much text each rule left: corpus/funnel.json."""

    sources: tuple[str, ...]  # names, in the order of prepare.sources
    steps: tuple[FunnelStep, ...]  # in the order applied
    train: dict[str, TextAmounts]  # source name -> training split
    heldout: dict[str, TextAmounts]  # source name -> held-out split
    skipped: dict[str, SkippedRecords]  # source name -> skipped records; only sources with any


@dataclasses.dataclass(frozen=True)
class CorpusCounts(Record):
    """Manifest.counts of the stage prepare."""

    funnel: Funnel
    n_contaminated: dict[str, int]  # benchmark task -> documents dropped for overlapping its items


@dataclasses.dataclass(frozen=True)
class ContaminatedDocument(Record):
    """A document dropped for overlapping a benchmark item: a line of corpus/contaminated.jsonl."""

    document_id: str
    source: str  # name
    task: str  # benchmark task, such as "gsm8k"
    item_id: str  # FILE:NUMBER, counted from 1
    shared_words: str  # the first n-gram that both have, normalized


@dataclasses.dataclass(frozen=True)
class DroppedDocument(Record):
    """A sample of what a rule dropped: a row of corpus/dropped/RULE.parquet."""

    id: str
    source: str  # name
    text: str  # truncated to MAX_SAMPLE_CHARS characters
    prompt_chars: int  # leading characters of the whole text that are a prompt
    meta: str  # JSON object, such as {"url": ..., "date": ...}
    reason: str | None  # why the rule dropped it; None: the rule gives no reason


# ---- jobs: prepare.py and pack.py derive their own from these two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(Record):
    """A part of a stage's work that one process does; the base of each kind of job."""

    output_prefix: str = ""  # path with which the names of its output files begin; set by run_jobs
    request_fingerprint: str = ""  # of the job, the code and the packages; set by run_jobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResult(Record):
    """What a finished job left, OUTPUT_PREFIX.json; the base of each kind of result."""

    request_fingerprint: str  # of the job that it answers
    file_sizes: dict[str, int]  # path of each output file -> bytes


# ---- contamination of benchmarks, part of an evaluation's results


@dataclasses.dataclass(frozen=True)
class OverlapExample(Record):
    """A benchmark item that shares words with a training document."""

    item_id: str
    document_id: str
    shared_words: str  # the first n-gram that both have, normalized


@dataclasses.dataclass(frozen=True)
class TaskContamination(Record):
    """How many items of one task overlap training documents, and the scores without them."""

    n_items: int
    n_overlapping: int
    n_short: int  # items of fewer than ngram_size words, for which no overlap can be found
    examples: tuple[OverlapExample, ...]  # a few
    # "METRIC,FILTER" and "METRIC_stderr,FILTER" -> value over items that do not overlap
    clean_scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ContaminationReport(Record):
    """Overlap of benchmark items with the corpora a model was trained on."""

    ngram_size: int  # consecutive words that count as an overlap
    n_documents: dict[str, int]  # path of each corpus checked -> its training documents
    unchecked: tuple[str, ...]  # a message for each origin whose text could not be checked
    tasks: dict[str, TaskContamination]  # task name -> its overlap
