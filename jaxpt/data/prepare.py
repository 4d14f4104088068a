"""Prepare a corpus: sources -> rules -> deduplication -> train and held-out parquet shards.

Every rule but those that compare documents looks at one text alone, and those that compare look at
small marks. So there are three passes over the texts, whatever the number of rules: read (into
numbered rows on disk), judge (each text alone), write. Between judging and writing, a table of
numbers decides in canonical order which rule drops each document.

Each pass is split into jobs, done in processes here or on a cluster, in any order. What a job
writes depends on the texts and the config alone, and so does the corpus, whatever the workers and
the files of the input. A file gets its name when it is complete, so a killed run continues with the
jobs that were not done.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import heapq
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.data import benchmarks, decontaminate, dedup, executor, filters, paragraphs, sources
from jaxpt.data import tokenizer as tokenizers
from jaxpt.data.jobs import Advance, Job, JobRunner, open_atomic, write_job_result
from jaxpt.spec import Manifest, UserError

log = logging.getLogger(__name__)

N_SAMPLES = 50  # dropped documents kept per rule
SAMPLE_CHARS = 10_000  # of each at most: enough to judge a rule by
JOB_BYTES = 2**23  # of text per judging job, about
BATCH_BYTES = 2**22  # of text judged at once, about
BATCH_DOCUMENTS = 1024  # documents judged at once, at most
GROUP_BYTES = 2**25  # of text per row group of a shard, about
GROUP_ROWS = 10_000  # documents per row group, at most
# Up to these bytes no other process is started: that would take longer.
MAX_INLINE_BYTES = {"read_part": 2**27, "judge_file": 2**24, "write_corpus_shard": 2**28}
TOKEN_BYTES = 4  # bytes per token, about
MAX_UNREADABLE_SHOWN = 20  # messages per source about what cannot be read
NOT_SAMPLED = -1  # in place of a rule: prepare.max_mb left the document out

STRING = pa.string()
INT32 = pa.int32()
INT64 = pa.int64()
CORPUS_FIELDS = {"id": STRING, "source": STRING, "text": STRING}
CORPUS_FIELDS |= {"prompt_chars": INT32, "meta": STRING}
CORPUS_SCHEMA = pa.schema(CORPUS_FIELDS)  # of the shards
READ_FIELDS = {"id": STRING, "text": STRING, "prompt_chars": INT32, "meta": STRING}
READ_FIELDS |= {"digest": pa.binary(32), "chars": INT64, "bytes": INT64}
READ_SCHEMA = pa.schema(READ_FIELDS)
SAMPLE_SCHEMA = CORPUS_SCHEMA.append(pa.field("reason", STRING))
EDIT_FIELDS = ("edits", "chars", "bytes")  # edits, and the text after them
COMPRESSION = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
# the rules that compare documents
EXACT = "exact_dedup"
NEAR = "near_dedup"
PARAGRAPHS = "corpus_paragraphs"
SPLITS = ("train", "heldout")
NO_CUTS = np.empty(0, [("row", np.int64)])

Funnel = dict[str, Any]


def prepare_corpus(
    section: config.PrepareConfig,
    workdir: pathlib.Path,
    replace: bool = False,
    tokenizer_source: str = "train",
) -> Manifest:
    """Prepare WORKDIR/corpus as the section asks, or find it finished.

    Args:
        section: sources and rules.
        workdir: the run directory.
        replace: overwrite the corpus of another config or other inputs.
        tokenizer_source: one to count tokens with; "train": there is none yet.

    Raises:
        UserError: a source, rule, benchmark, executor or record cannot be used, or every document
            is dropped.
    """
    check_section(section)
    text_sources = sources.parse_sources(section.sources)
    section_json = json.dumps(stage.to_jsonable(section))
    rules, index = open_rules(section_json)
    executor.check_executor(section.executor)
    tokenizer = None
    if tokenizer_source != "train":
        tokenizer = tokenizers.load_tokenizer(tokenizer_source)
    if index.n_short:
        log.info(
            f"prepare: {index.n_short:,} of {len(index.items):,} benchmark items have fewer than "
            f"{index.n} words: no document can be matched with them"
        )
    inputs = {}
    for source in text_sources:
        inputs |= source.fingerprint_inputs()
    for i, path in enumerate(section.decontaminate):
        inputs[f"benchmarks/{i}"] = stage.local_path(path)
    corpus = workdir / "corpus"
    work = CorpusWork(section, section_json, text_sources, rules, index, tokenizer)
    request = work.describe_request()
    manifest = stage.run_stage(
        "prepare", corpus, work.run, config=request, inputs=inputs, replace=replace
    )
    log_counts(manifest.counts, corpus)
    return manifest


def check_section(section: config.PrepareConfig) -> None:
    """Raise UserError for sizes out of range."""
    if section.shard_mb < 1:
        raise UserError(f"prepare.shard_mb: expected at least 1, got {section.shard_mb}.")
    if section.max_mb < 0:
        raise UserError(f"prepare.max_mb: expected at least 0, got {section.max_mb}.")
    if section.decontaminate_ngram < 1:
        raise UserError(
            f"prepare.decontaminate_ngram: expected at least 1, got {section.decontaminate_ngram}."
        )


@functools.lru_cache(maxsize=1)
def open_rules(section_json: str) -> tuple[list[filters.Rule], decontaminate.NgramIndex]:
    """Return the rules in order and the benchmarks' n-grams, once per process.

    Args:
        section_json: the section `prepare`.
    """
    section = json.loads(section_json)
    items = []
    for path in section["decontaminate"]:
        items += benchmarks.read_benchmark(path)
    index = decontaminate.NgramIndex(items, section["decontaminate_ngram"])
    changes = list(section["rules"])
    preset = section["preset"]
    preset_rules = filters.PRESETS[preset]
    if section["near_dedup"] and NEAR not in preset_rules:
        changes.append(NEAR)
    rules = filters.parse_rules(preset, changes)
    if section["decontaminate"]:
        name = "decontaminate"
        rule = filters.Rule(name, drop=index.find_contaminated, help=name)
        rules.append(rule)
    # what the other rules drop must not take along a paragraph that stays elsewhere
    return sorted(rules, key=lambda rule: rule.name == PARAGRAPHS), index


def find_rule(rules: Sequence[filters.Rule], name: str) -> int | None:
    """Return the index of the rule of this name."""
    for k, rule in enumerate(rules):
        if rule.name == name:
            return k
    return None


@dataclasses.dataclass(frozen=True)
class CorpusWork:
    """The work of one stage `prepare`."""

    section: config.PrepareConfig
    section_json: str
    sources: list[sources.TextSource]
    rules: list[filters.Rule]
    index: decontaminate.NgramIndex
    tokenizer: tokenizers.Tokenizer | None  # it estimates the funnel's tokens

    def describe_request(self) -> dict[str, Any]:
        """Return the settings that the corpus depends on."""
        request = stage.to_jsonable(self.section)
        del request["executor"]  # it decides where the work is done, not what comes out
        request["rules"] = [rule.help for rule in self.rules]
        if self.tokenizer:
            request["tokenizer"] = self.tokenizer.fingerprint
        request["installed"] = {}
        for source in self.sources:
            versions = source.describe_installation()
            if versions:
                request["installed"][source.name] = versions
        return request

    def run(self, partial: pathlib.Path) -> dict[str, Any]:
        """Write the corpus and return the counts of the manifest."""
        partial = partial.resolve()
        state_dir = partial / ".work"
        runner = JobRunner(self.section.executor, state_dir)
        files, unread = read_sources(runner, self.sources, self.section)
        names = [source.name for source in self.sources]
        table = judge_documents(runner, files, names, self.section_json, self.rules)
        drops = decide_drops(table, self.rules)
        matches = write_corpus(runner, table, self.rules, drops, self.section_json, partial)
        if self.section.decontaminate:
            lines = []
            for match in matches:
                line = json.dumps(match, ensure_ascii=False)
                lines.append(line + "\n")
            (partial / "contaminated.jsonl").write_text("".join(lines))
        token_bytes = estimate_token_bytes(table, self.tokenizer)
        funnel = build_funnel(table, self.rules, drops, token_bytes)
        funnel["unread"] = unread
        text = json.dumps(funnel, indent=1)
        (partial / "funnel.json").write_text(text + "\n")
        train_amounts = funnel["train"].values()
        if not any(amounts["rows"] for amounts in train_amounts):
            raise UserError(
                f"prepare: none of {len(drops.dropped_by):,} documents is left to train on.\n"
                f"{format_funnel(funnel)}\nSamples of what each rule dropped are in "
                f"{partial / 'dropped'}. Choose another prepare.preset or source, or lower "
                "prepare.heldout_frac."
            )
        shutil.rmtree(state_dir)
        contaminated = self.count_contaminated(matches)
        return {**funnel, "contaminated": contaminated}

    def count_contaminated(self, matches: list[dict[str, str]]) -> dict[str, int]:
        """Return how many documents matched each benchmark task."""
        tasks = {item.task for item in self.index.items}
        documents = {task: set() for task in sorted(tasks)}
        for match in matches:
            ids = documents[match["task"]]
            ids.add(match["id"])
        return {task: len(ids) for task, ids in documents.items()}


def log_counts(counts: dict[str, Any], corpus: pathlib.Path) -> None:
    """Log the funnel, edits, skipped records and contaminated documents."""
    log.info(format_funnel(counts))
    for step in counts["steps"]:
        edits = step.get("edits", {})
        for name, n in edits.items():
            if n:
                log.info(f"prepare: {step['rule']} made {n:,} edits in {name}")
    for name, unread in counts["unread"].items():
        for reason, n in unread["counts"].items():
            log.warning(f"prepare: {name}: skipped {n:,} records or files: {reason}")
        for message in unread["first"]:
            log.warning(f"prepare: skipped: {message}")
    for task, n in counts["contaminated"].items():
        log.info(
            f"prepare: dropped {n:,} documents that overlap {task}; see {corpus}/contaminated.jsonl"
        )
    for split in SPLITS:
        per_source = counts[split].values()
        n = sum(amounts["rows"] for amounts in per_source)
        n_bytes = sum(amounts["bytes"] for amounts in per_source)
        log.info(f"prepare: {split}: {n:,} documents ({n_bytes / 1e6:.1f} MB)")
    log.info(f"prepare: wrote {corpus}")


# ---- first pass: every document becomes a numbered row


class ReadFile(NamedTuple):
    """A file of rows, in canonical order."""

    path: pathlib.Path
    source: int
    n: int
    hash_threshold: int  # of the sampling number: documents from it on are left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadJob(Job):
    """Read a part of a source into files of about max_bytes of text each."""

    source_index: int
    source: sources.TextSource
    limit: int
    max_bytes: int
    on_error: str


def read_sources(
    runner: JobRunner, text_sources: Sequence[sources.TextSource], section: config.PrepareConfig
) -> tuple[list[ReadFile], dict[str, dict]]:
    """Write the documents of all sources to disk: all, or at least those that max_mb keeps.

    Returns:
        The files, and per source what was skipped: records and files by reason, and the first
        messages about what cannot be read.
    """
    limit = int(section.max_mb * 1e6)
    todo = []
    n_bytes = 0
    on_error = section.on_error
    for k, source in enumerate(text_sources):
        for part, size in split_source(source):
            job = ReadJob(
                source_index=k,
                source=part,
                limit=limit,
                max_bytes=JOB_BYTES,
                on_error=on_error,
            )
            todo.append(job)
            n_bytes += size
    in_processes = n_bytes > MAX_INLINE_BYTES["read_part"]
    progress = ("reading", "B", None)
    results = runner.run(read_part, todo, progress, in_processes)
    by_source = [[] for _ in text_sources]
    for job, result in zip(todo, results, strict=True):
        by_source[job.source_index].append(result)
    files = []
    unread = {}
    for k, source in enumerate(text_sources):
        own = by_source[k]
        source_files, n_taken = collect_read_files(own, k, limit)
        skipped = collect_skipped(own)
        if skipped["counts"]:
            unread[source.name] = skipped
        if not n_taken:
            raise explain_empty_source(source, skipped, section.max_mb)
        files += source_files
    return files, unread


def collect_read_files(
    results: list[dict[str, Any]], source: int, limit: int
) -> tuple[list[ReadFile], int]:
    """Return the files of a source and how many documents are taken from them."""
    paths: list[pathlib.Path] = []
    rows: list[int] = []
    for result in results:
        paths += map(pathlib.Path, result["files"])
        rows += result["rows"]
    threshold = min(result["threshold"] for result in results)
    n_taken = sum(rows)
    if limit and paths:
        digests = [read_column(path, "digest") for path in paths]
        numbers = np.concatenate(digests)[:, 3]
        text_bytes = [read_column(path, "bytes") for path in paths]
        sizes = np.concatenate(text_bytes)
        reached = find_hash_threshold(numbers, sizes, limit)
        threshold = min(threshold, reached)
        is_taken = numbers < threshold
        n_taken = int(is_taken.sum())
    files = []
    for path, n in zip(paths, rows, strict=True):
        file = ReadFile(path, source, n, threshold)
        files.append(file)
    return files, n_taken


def collect_skipped(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was skipped of a source: "counts" by reason, and the "first" messages."""
    counts = collections.Counter()
    first = []
    for result in results:
        counts.update(result["unread"])
        first += result["first"]
    by_reason = dict(sorted(counts.items()))
    return {"counts": by_reason, "first": first[:MAX_UNREADABLE_SHOWN]}


def explain_empty_source(
    source: sources.TextSource, skipped: dict[str, Any], max_mb: float
) -> UserError:
    """Return the error for a source without documents."""
    where = f"prepare.sources: {source.name} ({source.kind}:{source.pattern})"
    if max_mb:
        return UserError(
            f"{where}: no document fits into prepare.max_mb={max_mb:g}. Raise prepare.max_mb."
        )
    counts = collections.Counter(skipped["counts"])
    reasons = ""
    for reason, n in counts.most_common(3):
        reasons += f", {n:,} times {reason}"
    message = ""
    if skipped["first"]:
        message = f" ({skipped['first'][0]})"
    return UserError(f"{where}: no document in it{reasons}{message}. Leave it out.")


def split_source(source: sources.TextSource) -> Iterator[tuple[sources.TextSource, int]]:
    """Yield parts of about JOB_BYTES on disk, split between files, and their bytes."""
    files = []
    n_bytes = 0
    sizes = source.list_file_sizes()
    for file, size in zip(source.files, sizes, strict=True):
        files.append(file)
        n_bytes += size
        if n_bytes >= JOB_BYTES:
            yield dataclasses.replace(source, files=tuple(files)), n_bytes
            files = []
            n_bytes = 0
    if files or not source.files:
        # the size of a source without files is unknown
        n_bytes = n_bytes or MAX_INLINE_BYTES["read_part"]
        yield dataclasses.replace(source, files=tuple(files)), n_bytes


def read_part(job: ReadJob, advance: Advance = lambda n: None) -> int:
    """Do a ReadJob and return the bytes of its texts."""
    is_streamed = job.source.kind == "hf"
    sampler = ByteLimitSampler(job.limit, is_streamed)
    unread = collections.Counter()
    first = []

    def skip(reason: str, message: str) -> None:
        unread[reason] += 1
        if reason == sources.READ_ERRORS and len(first) < MAX_UNREADABLE_SHOWN:
            first.append(message)

    documents = job.source.iterate_documents(skip, job.on_error)
    stream = sampler.keep_below(documents)
    files = []
    rows = []
    total = 0
    for i in itertools.count():
        file = pathlib.Path(f"{job.output_prefix}-{i:05d}.arrow")
        n_rows, n_bytes = write_read_file(file, stream, job.max_bytes, advance)
        if not n_rows:
            file.unlink()
            break
        files.append(file)
        rows.append(n_rows)
        total += n_bytes
    result = {"rows": rows, "threshold": sampler.threshold, "unread": unread, "first": first}
    write_job_result(job, files, **result)
    return total


def write_read_file(
    file: pathlib.Path, stream: Iterator[tuple], max_bytes: int, advance: Advance
) -> tuple[int, int]:
    """Write the next rows of about max_bytes of text. Return their number and bytes."""
    n_rows = n_bytes = 0
    with open_arrow_writer(file, READ_SCHEMA) as out:
        while n_bytes < max_bytes:
            n_left = max_bytes - n_bytes
            batch = take_batch(stream, min(BATCH_BYTES, n_left))
            if not batch:
                break
            columns = zip(*batch, strict=True)
            arrays = list(map(extract_column, columns, READ_SCHEMA))
            record_batch = pa.record_batch(arrays, schema=READ_SCHEMA)
            out.write_batch(record_batch)
            size = sum(row[-1] for row in batch)
            n_rows += len(batch)
            n_bytes += size
            advance(size)
    return n_rows, n_bytes


@contextlib.contextmanager
def open_arrow_writer(file: pathlib.Path, schema: pa.Schema) -> Iterator[Any]:
    """Open an Arrow file for record batches. It gets its name when it is complete."""
    with (
        open_atomic(file, file.parent) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=COMPRESSION) as out,
    ):
        yield out


def extract_column(values: Sequence[Any], field: pa.Field) -> pa.Array:
    """Return a column of READ_SCHEMA.

    Texts come encoded, so they need no conversion and no check, which would take a third of the
    time.
    """
    if field.name != "text":
        return pa.array(values, field.type)
    lengths = map(len, values)
    offsets = np.cumsum([0, *lengths], dtype=np.int32)
    data = b"".join(values)
    buffers = map(pa.py_buffer, (offsets, data))
    return pa.StringArray.from_buffers(len(values), *buffers)


def take_batch(stream: Iterator[tuple], max_bytes: int) -> list[tuple]:
    """Return the next rows: BATCH_DOCUMENTS or max_bytes of text, whichever comes first."""
    batch = []
    for row in itertools.islice(stream, BATCH_DOCUMENTS):
        batch.append(row)
        max_bytes -= row[-1]
        if max_bytes <= 0:
            break
    return batch


class ByteLimitSampler:
    """Keeps all documents, or those with the smallest sampling numbers that make `limit` bytes.

    A document is yielded before later ones may push it out again: those from the final `threshold`
    on are not taken. Equal texts have equal numbers and stay or go together. A streamed data set
    may have no end: its first `limit` bytes are taken.
    """

    def __init__(self, limit: int, is_streamed: bool):
        """Start with nothing taken."""
        self.limit = limit
        self.is_streamed = is_streamed
        self.threshold = 2**64
        self.total = 0
        self.kept: list[tuple[int, int]] = []  # heap of (-sampling number, bytes)

    def keep_below(self, documents: Iterator[sources.Document]) -> Iterator[tuple]:
        """Yield rows of READ_SCHEMA, with the text as bytes: Arrow takes them faster."""
        for document in documents:
            id, text, prompt_chars, meta = document
            data = text.encode()
            n_bytes = len(data)
            digest = dedup.hash_text(data)
            number = int.from_bytes(digest[24:])
            if self.limit and number < self.threshold:
                self.total += n_bytes
                if self.is_streamed and self.total > self.limit:
                    return
                self.lower_threshold(number, n_bytes)
            if number < self.threshold:
                yield id, data, prompt_chars, meta, digest, len(text), n_bytes

    def lower_threshold(self, number: int, size: int) -> None:
        """Count a document in and push out those with the largest numbers."""
        if not self.is_streamed:
            heapq.heappush(self.kept, (-number, size))
        while self.kept:
            largest = -self.kept[0][0]
            if self.total <= self.limit and largest < self.threshold:
                break
            _, removed = heapq.heappop(self.kept)
            self.threshold = min(self.threshold, largest)
            self.total -= removed


def find_hash_threshold(numbers: np.ndarray, sizes: np.ndarray, limit: int) -> int:
    """Return the smallest sampling number whose document does not fit any more."""
    order = np.argsort(numbers)
    total = np.cumsum(sizes[order])
    n_fitting = np.searchsorted(total, limit, "right")
    if n_fitting == len(order):
        return 2**64
    return int(numbers[order[n_fitting]])


# ---- second pass: each text is judged alone


@dataclasses.dataclass(frozen=True)
class DocumentTable:
    """n documents in canonical order, in files: as read and as judged, row beside row."""

    names: list[str]  # of the sources
    files: list[ReadFile]
    judged: list[pathlib.Path]
    starts: np.ndarray  # [files + 1] the first row of each file, and n
    heldout: int  # documents whose split number is below it are held out

    @property
    def n(self) -> int:
        """Number of documents."""
        return int(self.starts[-1])

    def iterate_files(self, *columns: str) -> Iterator[tuple]:
        """Yield for each file the slice of its rows, its source and the columns."""
        for k, file in enumerate(self.files):
            values = []
            for name in columns:
                path = self.judged[k]
                if name in READ_SCHEMA.names:
                    path = file.path
                column = read_column(path, name)
                values.append(column)
            rows = slice(*self.starts[k : k + 2])
            yield rows, file.source, *values

    def read_all(self, column: str) -> np.ndarray:
        """Return a column, [n]."""
        parts = [values for _, _, values in self.iterate_files(column)]
        return np.concatenate(parts)

    def locate(self, first: int, stop: int) -> list[FilePart]:
        """Return the files that hold rows from `first` up to `stop`."""
        i = np.searchsorted(self.starts, first, "right") - 1
        j = np.searchsorted(self.starts, stop)
        parts = []
        for k in range(i, j):
            path = str(self.files[k].path)
            judged = str(self.judged[k])
            start = int(self.starts[k])
            parts.append((path, judged, start))
        return parts


FilePart = tuple[str, str, int]  # file as read, file as judged, first row


def read_column(path: pathlib.Path, name: str) -> Any:
    """Return a column of a file; nothing else of the file is read.

    Returns:
        Numbers as an array, digests as [n, bytes / 8] uint64, bytes as Arrow has them.
    """
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        reader = open_one_column(file, schema.get_field_index(name))
        table = reader.read_all()
        column = table.column(0).combine_chunks()
    if pa.types.is_binary(column.type):
        return column
    if pa.types.is_fixed_size_binary(column.type):
        return number_texts(column)
    return column.to_numpy()


def open_one_column(file: pa.OSFile, index: int) -> Any:
    """Return the reader of a single column of an Arrow file."""
    options = pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False)
    return pa.ipc.open_file(file, options=options)


def number_texts(digests: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Return n digests as [n, bytes / 8] uint64."""
    n_bytes = digests.type.byte_width
    width = n_bytes // 8
    _, buffer = digests.buffers()
    start = digests.offset * n_bytes
    n_numbers = len(digests) * width
    numbers = np.frombuffer(buffer, ">u8", n_numbers, start)
    rows = numbers.reshape(-1, width)
    return rows.astype(np.uint64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeJob(Job):
    """Judge the documents of a file."""

    section: str  # JSON
    repeats: str | None  # file of which documents repeat an earlier one, [n] bool
    file: str
    threshold: int
    start: int  # first row of the file


def judge_documents(
    runner: JobRunner,
    files: list[ReadFile],
    names: list[str],
    section: str,
    rules: Sequence[filters.Rule],
) -> DocumentTable:
    """Run the rules over the texts, wherever the executor runs and in any order."""
    lengths = [file.n for file in files]
    starts = np.cumsum([0, *lengths])
    repeats = None
    if find_rule(rules, EXACT) is not None:
        repeats = str(runner.state_dir / "repeats.npy")
        np.save(repeats, find_repeated(files, starts))
    todo = []
    for file, start in zip(files, starts, strict=False):
        job = JudgeJob(
            section=section,
            repeats=repeats,
            file=str(file.path),
            threshold=file.hash_threshold,
            start=int(start),
        )
        todo.append(job)
    in_processes = count_file_bytes(files) > MAX_INLINE_BYTES["judge_file"]
    progress = "judging", "documents", int(starts[-1])
    results = runner.run(judge_file, todo, progress, in_processes)
    judged = []
    for result in results:
        first_file = next(iter(result["files"]))
        judged.append(pathlib.Path(first_file))
    heldout_frac = json.loads(section)["heldout_frac"]
    heldout = int(heldout_frac * 2**64)
    return DocumentTable(names, files, judged, starts, heldout)


def count_file_bytes(files: list[ReadFile]) -> int:
    """Return the bytes of the files on disk."""
    sizes = [file.path.stat().st_size for file in files]
    return sum(sizes)


def find_repeated(files: list[ReadFile], starts: np.ndarray) -> np.ndarray:
    """Return which documents equal an earlier one to the letter, [n] bool."""
    n = starts[-1]
    known = np.empty((n, 2), np.uint64)
    for file, start in zip(files, starts, strict=False):
        prompt_chars = read_column(file.path, "prompt_chars")
        digests = read_column(file.path, "digest")[:, :2]
        # the same letters with another prompt may be edited in another way
        digests[:, 1] += prompt_chars.astype(np.uint64)
        stop = start + file.n
        known[start:stop] = digests
    first = dedup.find_exact_duplicates(known)
    return first != np.arange(n)


def make_judged_schema(rules: Sequence[filters.Rule]) -> pa.Schema:
    """Return what is known of each document after the rules.

    failed, reason: the first rule that drops it by itself, or the number of rules.
    new.text, new.meta: as they are in the end; null where they are what was read.
    new.chars, new.bytes, new.prompt_chars: of that text.
    split, show: the numbers that decide on its split, and on samples.
    K.edits, K.chars, K.bytes: of the editing rule K, its edits and the text after it.
    K.mark: of a comparing rule K but near_dedup.
    """
    fields = {"failed": pa.int16(), "reason": STRING}
    fields |= {"new.text": STRING, "new.meta": STRING, "new.prompt_chars": INT32}
    fields |= {"new.chars": INT64, "new.bytes": INT64}
    fields |= {"split": pa.uint64(), "show": pa.uint64()}
    for k, rule in enumerate(rules):
        if rule.edit:
            for name in EDIT_FIELDS:
                fields[f"{k}.{name}"] = INT64
        elif rule.name == EXACT:
            fields[f"{k}.mark"] = pa.binary(16)
        elif rule.name == PARAGRAPHS:
            fields[f"{k}.mark"] = pa.binary()
    return pa.schema(fields)


def judge_file(job: JudgeJob, advance: Advance = lambda n: None) -> int:
    """Do a JudgeJob: write the verdicts beside the file. Return the number of documents."""
    rules, _ = open_rules(job.section)
    file = pathlib.Path(f"{job.output_prefix}.arrow")
    repeats = None
    if job.repeats:
        repeats = np.load(job.repeats, mmap_mode="r")
    signatures = []
    n = 0
    schema = make_judged_schema(rules)
    with open_arrow_writer(file, schema) as out:
        for batch in iterate_batches_of_file(job.file):
            digests = number_texts(batch.column("digest"))
            is_taken = digests[:, 3] < job.threshold
            is_repeat = np.zeros_like(is_taken)
            if repeats is not None:
                start = job.start + n
                stop = start + len(is_taken)
                is_repeat = repeats[start:stop] & is_taken
            verdicts = Verdicts(batch, rules)
            verdicts.judge(is_taken & ~is_repeat, rules)
            if is_repeat.any():
                # exact_dedup drops a repeat at the latest, for the earlier text comes as far as it
                # does: the rules after that are spared
                n_rules = (find_rule(rules, EXACT) or 0) + 1
                verdicts.judge(is_repeat, rules[:n_rules])
            out.write_batch(verdicts.build_batch())
            signatures += verdicts.list_signatures()
            n += len(is_taken)
            advance(len(is_taken))
    files = [file]
    if find_rule(rules, NEAR) is not None:
        prefix = pathlib.Path(job.output_prefix)
        files.append(dedup.write_signatures(prefix, signatures))
    write_job_result(job, files)
    return n


class Verdicts:
    """Columns of `make_judged_schema` for a batch of documents."""

    def __init__(self, batch: pa.RecordBatch, rules: list[filters.Rule]):
        """Start with no document judged."""
        columns = []
        for name in sources.Document._fields:
            column = batch.column(name)
            columns.append(column.to_pylist())
        self.documents = list(map(sources.Document, *columns))
        self.rules = rules
        self.schema = make_judged_schema(rules)
        self.signatures: dict[int, bytes] = {}
        self.columns: dict[str, Any] = {}
        n = len(self.documents)
        blank = {STRING: None, pa.binary(16): bytes(16), pa.binary(): b""}
        for field in self.schema:
            if field.type in blank:
                column = [blank[field.type]] * n
            else:
                column = np.zeros(n, str(field.type))
            self.columns[field.name] = column
        self.columns["failed"][:] = NOT_SAMPLED
        digests = number_texts(batch.column("digest"))
        self.columns["split"] = digests[:, 2].copy()
        self.columns["show"] = digests[:, 3].copy()
        for name in ("prompt_chars", "chars", "bytes"):
            self.columns[f"new.{name}"][:] = batch.column(name)

    def judge(self, mask: np.ndarray, rules: list[filters.Rule]) -> None:
        """Apply rules to some documents."""
        places = np.flatnonzero(mask).tolist()
        documents = [self.documents[i] for i in places]
        judged = filters.apply_rules(documents, rules)
        self.columns["failed"][places] = judged.failed_rule
        reasons = self.columns["reason"]
        for i, reason in zip(places, judged.reasons, strict=True):
            reasons[i] = reason or None
        for i, document in zip(places, judged.documents, strict=True):
            self.set_document(i, document)
        for k, edits in judged.edits.items():
            for i, edit in zip(places, edits, strict=True):
                if edit:
                    self.set_edit(i, k, edit)
        for k, marks in judged.marks.items():
            for i, mark in zip(places, marks, strict=True):
                if mark:
                    self.set_mark(i, k, mark)

    def set_document(self, i: int, document: sources.Document) -> None:
        """Set what document i has become."""
        original = self.documents[i]
        if document.meta != original.meta:
            self.columns["new.meta"][i] = document.meta
        if document.text == original.text:
            return
        self.columns["new.text"][i] = document.text
        self.columns["new.prompt_chars"][i] = document.prompt_chars
        digest = dedup.hash_text(document.text.encode())
        _, _, split, show = np.frombuffer(digest, ">u8")
        self.columns["split"][i] = split
        self.columns["show"][i] = show

    def set_edit(self, i: int, k: int, edit: tuple[int, int, int]) -> None:
        """Set the edits that rule k made in document i, and the size of the text after it."""
        for name, value in zip(EDIT_FIELDS, edit, strict=True):
            self.columns[f"{k}.{name}"][i] = value
        _, n_chars, n_bytes = edit
        self.columns["new.chars"][i] = n_chars
        self.columns["new.bytes"][i] = n_bytes

    def set_mark(self, i: int, k: int, mark: bytes) -> None:
        """Set the mark of the comparing rule k."""
        name = self.rules[k].name
        if name == NEAR:
            self.signatures[i] = mark
            return
        if name == EXACT:
            mark = mark[:16]
        self.columns[f"{k}.mark"][i] = mark

    def build_batch(self) -> pa.RecordBatch:
        """Return the columns as Arrow has them."""
        return pa.record_batch(self.columns, schema=self.schema)

    def list_signatures(self) -> list[bytes]:
        """Return the signatures of the documents that came as far as near_dedup."""
        return [self.signatures[i] for i in sorted(self.signatures)]


def count_batch_rows(path: str | pathlib.Path) -> list[int]:
    """Return the rows of each batch of a file, from its smallest column."""
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        is_integer = [pa.types.is_integer(field.type) for field in schema]
        smallest = is_integer.index(True)
        reader = open_one_column(file, smallest)
        batch_numbers = range(reader.num_record_batches)
        batches = map(reader.get_batch, batch_numbers)
        return [batch.num_rows for batch in batches]


def iterate_batches_of_file(
    path: str | pathlib.Path, first: int = 0, stop: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file from `first` up to `stop`, a few at a time."""
    with pa.OSFile(str(path)) as file:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        reader = pa.ipc.open_file(file, options=options)
        start = 0
        for i, n_rows in enumerate(count_batch_rows(path)):
            end = start + n_rows
            if stop is not None and start >= stop:
                return
            if end > first:
                skipped = max(first - start, 0)
                batch = reader.get_batch(i).slice(skipped)
                if stop is not None:
                    n_left = stop - start - skipped
                    batch = batch.slice(0, n_left)
                yield batch
            start = end


# ---- between judging and writing: which rule drops each document


class Drops(NamedTuple):
    """Which documents are dropped.

    Attributes:
        dropped_by: [n] index of the rule, or the number of rules for those kept.
        original: [n] the row that a duplicate repeats, or -1.
        repeated: the paragraphs that go out of others.
    """

    dropped_by: np.ndarray
    original: np.ndarray
    repeated: paragraphs.RepeatedParagraphs | None


def decide_drops(table: DocumentTable, rules: Sequence[filters.Rule]) -> Drops:
    """Decide which rule drops each document.

    A rule that compares documents sees those that all rules before it kept; the first of equals
    stays.
    """
    failed = table.read_all("failed")
    dropped_by = failed.copy()
    original = np.full(len(failed), -1)
    repeated = None
    for k, rule in enumerate(rules):
        is_alive = dropped_by > k
        if rule.name == PARAGRAPHS:
            read_marks = functools.partial(read_paragraph_marks, table, k, is_alive)
            repeated = paragraphs.find_repeated_paragraphs(read_marks, len(failed))
            dropped_by[repeated.empty] = k
            original[repeated.empty] = repeated.original
        elif rule.mark:
            if rule.name == NEAR:
                paths = [judged.with_suffix("") for judged in table.judged]
                is_candidate = dropped_by[failed > k] > k
                first = dedup.find_near_duplicates(paths, is_candidate)
            else:
                parts = []
                for rows, _, mark in table.iterate_files(f"{k}.mark"):
                    part = mark[is_alive[rows]]
                    parts.append(part)
                marks = np.concatenate(parts)
                first = dedup.find_exact_duplicates(marks)
            alive = np.flatnonzero(is_alive)
            is_repeat = first != np.arange(len(alive))
            repeats = alive[is_repeat]
            dropped_by[repeats] = k
            original[repeats] = alive[first[is_repeat]]
    return Drops(dropped_by, original, repeated)


def read_paragraph_marks(
    table: DocumentTable, k: int, is_alive: np.ndarray
) -> Iterator[paragraphs.MarkedDocuments]:
    """Yield what `paragraphs.find_repeated_paragraphs` reads, of rule k and the rows so far.

    What has a prompt is left as it is.
    """
    dtype = paragraphs.MARK_DTYPE
    columns = table.iterate_files("new.prompt_chars", f"{k}.mark")
    for rows, _, prompt_chars, marks in columns:
        has_prompt = prompt_chars != 0
        mask = is_alive[rows] & ~has_prompt
        marks = marks.filter(pa.array(mask))
        lengths = pc.call_function("binary_length", [marks])
        counts = lengths.to_numpy() // dtype.itemsize
        joined = b"".join(marks.to_pylist())
        values = np.frombuffer(joined, dtype)
        marked_rows = rows.start + np.flatnonzero(mask)
        yield paragraphs.MarkedDocuments(marked_rows, counts, values)


# ---- third pass: what stays goes to its split, and a sample of what is dropped is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteJob(Job):
    """Write a shard of one split, and look up single documents on the way."""

    section: str  # JSON
    name: str  # of the source
    split: str
    file: str | None  # None: no document of these rows is in the split
    out: str  # the corpus
    parts: tuple[FilePart, ...]
    first: int  # rows from first up to stop
    stop: int
    dropped_by: str
    heldout: int
    sampled: tuple[int, ...]  # rows whose documents are shown as samples
    originals: tuple[int, ...]  # rows whose ids are named
    cuts: str | None  # file of the paragraphs to remove


def write_corpus(
    runner: JobRunner,
    table: DocumentTable,
    rules: list[filters.Rule],
    drops: Drops,
    section: str,
    out: pathlib.Path,
) -> list[dict[str, str]]:
    """Write the shards and the samples.

    Returns:
        What `decontaminate` dropped: each document with each item and the words that they share.
    """
    show = table.read_all("show")
    sampled = pick_samples(show, drops.dropped_by, len(rules))
    originals = drops.original[sampled]
    originals = np.unique(originals[originals >= 0])
    lookups = (sampled, originals)
    todo = plan_shards(runner.state_dir, table, drops, section, out, lookups)
    planned = {job.file for job in todo}
    for split in SPLITS:
        directory = out / split
        directory.mkdir(exist_ok=True)
        for file in list(directory.iterdir()):
            if str(file) not in planned:  # written before the code was changed
                file.unlink()
    n_rows = [job.stop - job.first for job in todo]
    total = sum(n_rows)
    in_processes = count_file_bytes(table.files) > MAX_INLINE_BYTES["write_corpus_shard"]
    progress = "writing", "documents", total
    n_threads = os.cpu_count() or 1
    results = runner.run(write_corpus_shard, todo, progress, in_processes, n_threads)
    write_samples(results, rules, drops, out / "dropped")
    matches = []
    for result in results:
        matches += result["contaminated"]
    return matches


def plan_shards(
    state_dir: pathlib.Path,
    table: DocumentTable,
    drops: Drops,
    section: str,
    out: pathlib.Path,
    lookups: tuple[np.ndarray, np.ndarray],
) -> list[WriteJob]:
    """Return a job per shard. The training jobs cover all rows: they look up single documents."""
    decided = state_dir / "dropped_by.npy"
    np.save(decided, drops.dropped_by)
    cuts = None
    if drops.repeated:
        cuts = str(state_dir / "cuts.npy")
        np.save(cuts, drops.repeated.cuts)
    rules, _ = open_rules(section)
    shard_bytes = json.loads(section)["shard_mb"] * 1_000_000
    sizes = table.read_all("new.bytes")
    numbers = table.read_all("split")
    n_rules = len(rules)
    heldout = table.heldout
    of_source = [file.source for file in table.files]
    sampled_rows, original_rows = lookups
    sources_and_splits = itertools.product(enumerate(table.names), SPLITS)
    todo = []
    for (k, name), split in sources_and_splits:
        files = np.searchsorted(of_source, [k, k + 1])
        low, high = table.starts[files].tolist()
        rows = slice(low, high)
        dropped_by = drops.dropped_by[rows]
        kept = is_kept(dropped_by, numbers[rows], split, n_rules, heldout)
        kept_sizes = np.where(kept, sizes[rows], 0)
        bounds = split_shards(kept_sizes, shard_bytes) + low
        spans = itertools.pairwise(bounds.tolist())
        for n, (first, stop) in enumerate(spans):
            file = None
            kept_in_shard = kept[first - low : stop - low]
            if kept_in_shard.any():
                path = out / split / f"{name}-{n:05d}.parquet"
                file = str(path)
            sampled = ()
            originals = ()
            if split == "train":
                sampled = select_rows(sampled_rows, first, stop)
                originals = select_rows(original_rows, first, stop)
            elif not file:
                continue
            parts = table.locate(first, stop)
            job = WriteJob(
                section=section,
                name=name,
                split=split,
                file=file,
                out=str(out),
                parts=tuple(parts),
                first=first,
                stop=stop,
                dropped_by=str(decided),
                heldout=heldout,
                sampled=sampled,
                originals=originals,
                cuts=cuts,
            )
            todo.append(job)
    return todo


def select_rows(rows: np.ndarray, first: int, stop: int) -> tuple[int, ...]:
    """Return the sorted rows from `first` up to `stop`."""
    begin, end = np.searchsorted(rows, [first, stop])
    selected = rows[begin:end]
    return tuple(selected.tolist())


def write_samples(
    results: list[dict[str, Any]],
    rules: list[filters.Rule],
    drops: Drops,
    directory: pathlib.Path,
) -> None:
    """Write DIRECTORY/RULE.parquet for each rule that dropped documents."""
    ids = {}
    samples = {}
    for result in results:
        # the keys of a JSON object are strings
        for row, id in result["ids"].items():
            ids[int(row)] = id
        for row, sample in result["samples"].items():
            samples[int(row)] = sample
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for row, sample in samples.items():
        original = int(drops.original[row])
        if original >= 0:
            sample["reason"] = f"repeats {ids[original]}"
    for k, rule in enumerate(rules):
        own = []
        for row in sorted(samples):
            if drops.dropped_by[row] == k:
                own.append(samples[row])
        if own:
            table = pa.Table.from_pylist(own, SAMPLE_SCHEMA)
            file = directory / f"{rule.name}.parquet"
            pq.write_table(table, file, compression="zstd")


def is_kept(
    dropped_by: np.ndarray, numbers: np.ndarray, split: str, n_rules: int, heldout: int
) -> np.ndarray:
    """Return which documents go to a split, [n] bool.

    The text alone decides, so that none changes its split as a corpus grows.
    """
    is_in_split = numbers < heldout
    if split == "train":
        is_in_split = ~is_in_split
    return is_in_split & (dropped_by == n_rules)


def pick_samples(show: np.ndarray, dropped_by: np.ndarray, n_rules: int) -> np.ndarray:
    """Return up to N_SAMPLES rows that each rule dropped, in order: random but the same always."""
    chosen = [np.empty(0, np.int64)]
    for k in range(n_rules):
        dropped = np.flatnonzero(dropped_by == k)
        order = np.argsort(show[dropped], kind="stable")
        chosen.append(dropped[order[:N_SAMPLES]])
    return np.sort(np.concatenate(chosen))


def split_shards(sizes: np.ndarray, max_bytes: int, max_rows: int | None = None) -> np.ndarray:
    """Return the first row of each shard, and the end.

    Each shard but the last just reaches max_bytes, or has max_rows.
    """
    total = np.cumsum(sizes)
    bounds = [0]
    while True:
        first = bounds[-1]
        before = 0
        if first:
            before = total[first - 1]
        reaching = np.searchsorted(total, max_bytes + before)
        end = int(reaching) + 1
        if max_rows:
            end = min(end, first + max_rows)
        if end >= len(sizes) or total[end - 1] == total[-1]:
            bounds.append(len(sizes))
            return np.array(bounds)
        bounds.append(end)


def write_corpus_shard(job: WriteJob, advance: Advance = lambda n: None) -> int:
    """Do a WriteJob and return the rows that it passed."""
    writer = ShardWriter(job)
    tables = writer.iterate_tables(advance)
    files = []
    if job.file:
        files.append(pathlib.Path(job.file))
        temporary_dir = pathlib.Path(job.output_prefix).parent
        with open_atomic(files[0], temporary_dir) as path:
            write_row_groups(path, tables, writer.split_groups())
    # the rest has rows of the other split, but documents may be looked up in it
    for _ in tables:
        pass
    result = {"samples": writer.samples, "ids": writer.ids, "contaminated": writer.contaminated}
    write_job_result(job, files, **result)
    return job.stop - job.first


class ShardWriter:
    """Reads the rows of a WriteJob and collects what it looks up."""

    def __init__(self, job: WriteJob):
        """Read what was decided of the rows."""
        self.job = job
        self.rules, self.index = open_rules(job.section)
        dropped_by = np.load(job.dropped_by, mmap_mode="r")
        self.dropped_by = dropped_by[job.first : job.stop]
        self.cuts = NO_CUTS
        if job.cuts:
            self.cuts = np.load(job.cuts, mmap_mode="r")
        self.spans: list[tuple[int, int]] = []  # of each file's rows
        for _, _, start in job.parts:
            first = max(job.first - start, 0)
            stop = job.stop - start
            self.spans.append((first, stop))
        numbers = self.read_judged("split")
        n_rules = len(self.rules)
        self.kept = is_kept(self.dropped_by, numbers, job.split, n_rules, job.heldout)
        self.samples: dict[int, dict[str, Any]] = {}
        self.ids: dict[int, str] = {}
        self.contaminated: list[dict[str, str]] = []

    def read_judged(self, name: str) -> np.ndarray:
        """Return a judged column of the job's rows."""
        columns = []
        for (_, judged, _), span in zip(self.job.parts, self.spans, strict=True):
            column = read_column(pathlib.Path(judged), name)
            columns.append(column[slice(*span)])
        return np.concatenate(columns)

    def split_groups(self) -> list[int]:
        """Return the rows of each row group."""
        sizes = self.read_judged("new.bytes")[self.kept]
        bounds = split_shards(sizes, GROUP_BYTES, GROUP_ROWS)
        return np.diff(bounds).tolist()

    def iterate_tables(self, advance: Advance) -> Iterator[pa.Table]:
        """Yield the kept documents in tables of CORPUS_SCHEMA."""
        start = 0
        for part, span in zip(self.job.parts, self.spans, strict=True):
            path, judged_path, _ = part
            read_batches = iterate_batches_of_file(path, *span)
            judged_batches = iterate_batches_of_file(judged_path, *span)
            for read, judged in zip(read_batches, judged_batches, strict=True):
                n_rows = len(read)
                table = self.build_table(read, judged, start)
                reasons = judged.column("reason")
                self.look_up(table, reasons, start)
                advance(n_rows)
                stop = start + n_rows
                mask = pa.array(self.kept[start:stop])
                start = stop
                yield table.filter(mask)

    def build_table(self, read: pa.RecordBatch, judged: pa.RecordBatch, start: int) -> pa.Table:
        """Return a batch of documents as they are after the rules."""
        n_rows = len(read)
        new_text = judged.column("new.text")
        text = coalesce(new_text, read.column("text"))
        new_meta = judged.column("new.meta")
        meta = coalesce(new_meta, read.column("meta"))
        first = self.job.first + start
        stop = first + n_rows
        begin, end = np.searchsorted(self.cuts["row"], [first, stop])
        if begin < end:
            text = remove_repeats(text, self.cuts[begin:end], first)
        ids = read.column("id")
        source = pa.repeat(self.job.name, n_rows)
        prompt_chars = judged.column("new.prompt_chars")
        columns = [ids, source, text, prompt_chars, meta]
        return pa.table(columns, CORPUS_SCHEMA)

    def look_up(self, table: pa.Table, reasons: pa.Array, start: int) -> None:
        """Collect samples, ids and contaminated documents of a table."""
        first = self.job.first + start
        stop = first + len(table)
        for row in self.job.originals:
            if first <= row < stop:
                id = table["id"][row - first]
                self.ids[row] = id.as_py()
        for row in self.job.sampled:
            if first <= row < stop:
                i = row - first
                sample = take_row(table, i)
                sample["text"] = sample["text"][:SAMPLE_CHARS]
                sample["reason"] = reasons[i].as_py()
                self.samples[row] = sample
        k = find_rule(self.rules, "decontaminate")
        if k is None or self.job.split != "train":
            return
        dropped_by = self.dropped_by[start : start + len(table)]
        contaminated = np.flatnonzero(dropped_by == k)
        for i in contaminated.tolist():
            document = take_row(table, i)
            matches = self.index.find_matches(document["text"])
            for item, words in matches:
                match = {"id": document["id"], "source": document["source"]}
                match |= {"task": item.task, "item": item.id, "words": words}
                self.contaminated.append(match)


def take_row(table: pa.Table, i: int) -> dict[str, Any]:
    """Return a row by column."""
    [row] = table.slice(i, 1).to_pylist()
    return row


def coalesce(new: pa.Array, old: pa.Array) -> pa.Array:
    """Return the new values, and the old ones where the new are null."""
    return pc.call_function("coalesce", [new, old])


def remove_repeats(texts: pa.Array, cuts: np.ndarray, start: int) -> pa.Array:
    """Return the texts of the rows from `start` on without the paragraphs that are cut."""
    values = texts.to_pylist()
    is_last = np.diff(cuts["row"]) != 0
    bounds = np.flatnonzero(is_last) + 1
    for part in np.split(cuts, bounds):
        i = int(part["row"][0]) - start
        values[i] = paragraphs.remove_spans(values[i], part)
    return pa.array(values, pa.string())


def write_row_groups(file: pathlib.Path, tables: Iterator[pa.Table], groups: list[int]) -> None:
    """Write a parquet shard with row groups of these sizes.

    Each group is contiguous in memory, or its bytes would depend on how its rows came.
    """
    encoded: Any = ["source", "meta"]  # the stub knows bool alone
    with pq.ParquetWriter(file, CORPUS_SCHEMA, compression="zstd", use_dictionary=encoded) as out:
        waiting = CORPUS_SCHEMA.empty_table()
        for n in groups:
            while len(waiting) < n:
                waiting = pa.concat_tables([waiting, next(tables)])
            group = waiting.slice(0, n).combine_chunks()
            out.write_table(group, row_group_size=n)
            waiting = waiting.slice(n)


# ---- the funnel


def estimate_token_bytes(
    table: DocumentTable, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, float]:
    """Return the bytes per token of each source.

    It is TOKEN_BYTES, or measured on a sample with the tokenizer that the config names.
    """
    token_bytes = dict.fromkeys(table.names, float(TOKEN_BYTES))
    if tokenizer is None:
        return token_bytes
    for k, name in enumerate(table.names):
        path = next(file.path for file in table.files if file.source == k)
        batch = next(iterate_batches_of_file(path))
        texts = batch.column("text").to_pylist()
        encoded = tokenizer.encode_batch(texts)
        n_tokens = sum(map(len, encoded))
        n_bytes = sum(len(text.encode()) for text in texts)
        token_bytes[name] = n_bytes / max(1, n_tokens)
    return token_bytes


def build_funnel(
    table: DocumentTable,
    rules: Sequence[filters.Rule],
    drops: Drops,
    token_bytes: dict[str, float],
) -> Funnel:
    """Return what was read, what each rule left and edited, and what each split has, per source."""
    names = table.names
    n_rules = len(rules)
    left = [make_amounts(names) for _ in ("read", *rules)]
    edits = [dict.fromkeys(names, 0) for _ in rules]
    splits = {split: make_amounts(names) for split in SPLITS}
    columns = ["chars", "bytes", "split"]
    for k, rule in enumerate(rules):
        if rule.edit:
            columns += [f"{k}.{name}" for name in EDIT_FIELDS]
    for rows, source, *values in table.iterate_files(*columns):
        after = dict(zip(columns, values, strict=True))
        name = names[source]
        dropped_by = drops.dropped_by[rows]
        chars = after["chars"]
        size = after["bytes"]
        left[0][name] += sum_amounts(dropped_by >= 0, chars, size)
        for k, rule in enumerate(rules):
            mask = dropped_by > k
            n_edits = None
            if rule.edit:
                n_edits = after[f"{k}.edits"]
                chars = after[f"{k}.chars"]
                size = after[f"{k}.bytes"]
            elif rule.name == PARAGRAPHS and drops.repeated:
                repeated_chars = drops.repeated.repeated_chars[rows]
                n_edits, cut_chars, cut_bytes = repeated_chars.T
                chars = chars - cut_chars
                size = size - cut_bytes
            if n_edits is not None:
                n_kept_edits = n_edits[mask].sum()
                edits[k][name] += int(n_kept_edits)
            left[k + 1][name] += sum_amounts(mask, chars, size)
        numbers = after["split"]
        for split, amounts in splits.items():
            mask = is_kept(dropped_by, numbers, split, n_rules, table.heldout)
            amounts[name] += sum_amounts(mask, chars, size)
    steps: list[dict[str, Any]] = []
    labels = ["read", *(rule.name for rule in rules)]
    for label, amounts in zip(labels, left, strict=True):
        kept = name_amounts(amounts, token_bytes)
        steps.append({"rule": label, "kept": kept})
    for k, rule in enumerate(rules):
        if rule.edit or rule.name == PARAGRAPHS:
            steps[k + 1]["edits"] = edits[k]
    funnel = {"sources": names, "steps": steps}
    for split in reversed(SPLITS):
        funnel[split] = name_amounts(splits[split], token_bytes)
    return funnel


def make_amounts(names: list[str]) -> dict[str, np.ndarray]:
    """Return zero documents, characters and bytes of each source."""
    return {name: np.zeros(3, np.int64) for name in names}


def sum_amounts(mask: np.ndarray, chars: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the documents, characters and bytes where the mask is true, [3]."""
    n_documents = mask.sum()
    n_chars = chars[mask].sum()
    n_bytes = size[mask].sum()
    return np.array([n_documents, n_chars, n_bytes], np.int64)


def name_amounts(
    amounts: dict[str, np.ndarray], token_bytes: dict[str, float]
) -> dict[str, dict[str, int]]:
    """Return the amounts of each source by name, with the estimated tokens."""
    named = {}
    for name, values in amounts.items():
        rows, chars, size = values.tolist()
        tokens = round(size / token_bytes[name])
        named[name] = {"rows": rows, "chars": chars, "bytes": size, "tokens": tokens}
    return named


def format_funnel(funnel: Funnel) -> str:
    """Return the documents and MB left after each rule as a table, one column per source."""
    lines = [(step["rule"], step["kept"]) for step in funnel["steps"]]
    lines += [(split, funnel[split]) for split in SPLITS]
    cells = [["left after", *funnel["sources"]]]
    for label, kept in lines:
        amounts = [kept[name] for name in funnel["sources"]]
        row = [f"{each['rows']:,} docs {each['bytes'] / 1e6:8.2f} MB" for each in amounts]
        cells.append([label, *row])
    columns = zip(*cells, strict=True)
    label_width, *widths = (max(map(len, column)) for column in columns)
    formatted = []
    for label, *row in cells:
        padded = [label.ljust(label_width), *map(str.rjust, row, widths)]
        formatted.append("  " + "   ".join(padded))
    return "\n".join(formatted)
