"""First pass: every document of every source becomes a numbered row on disk."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxpt import config, io
from jaxpt.data import dedup, sources
from jaxpt.data.prepare.jobs import (
    MAX_INLINE_BYTES,
    Advance,
    Job,
    JobResult,
    JobRunner,
    write_job_result,
)
from jaxpt.data.prepare.rows import READ_SCHEMA, ReadFile, open_arrow_writer, read_column
from jaxpt.data.sources.files import bytes_read, escape_name
from jaxpt.data.sources.source import find_kind
from jaxpt.spec import Record, UserError

JOB_BYTES = 2**23  # of text per file of rows, about
BATCH_BYTES = 2**22  # of text judged at once, about
BATCH_DOCUMENTS = 1024  # documents judged at once, at most
MAX_UNREADABLE_SHOWN = 20  # messages per source about what cannot be read


def read_sources(
    runner: JobRunner,
    text_sources: Sequence[sources.TextSource],
    versions: Mapping[str, str],
    section: config.PrepareConfig,
) -> tuple[list[ReadFile], dict[str, Unread]]:
    """Write the documents of all sources to disk: all, or at least those that max_mb keeps.

    Args:
        runner: of the jobs.
        text_sources: in canonical order.
        versions: of the files when they were fingerprinted.
        section: how to read them.

    Returns:
        The files, and what was skipped of each source of which anything was.
    """
    limit = int(section.max_mb * 1e6)
    todo = []
    n_bytes = 0
    for k, source in enumerate(text_sources):
        for part, size in split_source(source):
            job = ReadJob(
                source_index=k,
                source=part,
                n_bytes=size,
                versions={file: versions[file] for file in part.files},
                limit=limit,
                max_bytes=JOB_BYTES,
                on_error=section.on_error,
            )
            todo.append(job)
            n_bytes += size
    total = n_bytes if all(source.files for source in text_sources) else None
    results = runner.run(read_part, todo, ReadResult, ("reading", "B", total), n_bytes)
    by_source: list[list[ReadResult]] = [[] for _ in text_sources]
    for job, result in zip(todo, results, strict=True):
        by_source[job.source_index].append(result)
    files = []
    unread: dict[str, Unread] = {}
    for k, source in enumerate(text_sources):
        own = by_source[k]
        source_files, n_taken = collect_read_files(own, k, limit)
        skipped = collect_skipped(own)
        if skipped.counts:
            unread[source.name] = skipped
        if not n_taken:
            raise explain_empty_source(source, skipped, section.max_mb)
        files += source_files
    return files, unread


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadJob(Job):
    """Read a part of a source into files of about max_bytes of text each."""

    source_index: int
    source: sources.TextSource
    n_bytes: int  # of its files
    versions: dict[str, str]  # of its files when they were fingerprinted
    limit: int
    max_bytes: int
    on_error: str


@dataclasses.dataclass(frozen=True)
class Unread(Record):
    """What was skipped of a source."""

    counts: dict[str, int]  # records and files by reason
    first: tuple[str, ...]  # messages about what cannot be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadResult(JobResult):
    """What a ReadJob left."""

    rows: tuple[int, ...]  # of each file
    threshold: int
    unread: Unread


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
    """Do a ReadJob and return the bytes of its files, or of its texts if it has no files."""
    sampler = ByteLimitSampler(job.limit, find_kind(job.source.kind).is_streamed)
    unread = collections.Counter()
    first = []

    def skip(reason: str, message: str) -> None:
        unread[reason] += 1
        if reason == sources.READ_ERRORS and len(first) < MAX_UNREADABLE_SHOWN:
            first.append(message)

    documents = job.source.iterate_documents(skip, job.on_error)
    stream = sampler.keep_below(documents)
    start = bytes_read.count()
    done = 0

    def show(n_bytes: int) -> None:
        nonlocal done
        if job.source.files:
            n_bytes = max(min(bytes_read.count() - start, job.n_bytes) - done, 0)
        done += n_bytes
        advance(n_bytes)

    files = []
    rows = []
    for i in itertools.count():
        file = pathlib.Path(f"{job.output_prefix}-{i:05d}.arrow")
        n_rows = write_read_file(file, stream, job.max_bytes, show)
        if not n_rows:
            io.remove(file)
            break
        files.append(file)
        rows.append(n_rows)
    check_unchanged(job)
    result = ReadResult(
        files=tuple(map(str, files)),
        rows=tuple(rows),
        threshold=sampler.threshold,
        unread=Unread(dict(unread), tuple(first)),
    )
    write_job_result(job, result)
    if not job.source.files:
        return done
    advance(job.n_bytes - done)
    return job.n_bytes


def check_unchanged(job: ReadJob) -> None:
    """Raise UserError if a file is not the one that was fingerprinted."""
    for file, version in job.source.list_versions().items():
        if version != job.versions[file]:
            raise UserError(
                f"{escape_name(file)}: changed while it was read. Start again when nothing writes "
                "to it."
            )


def write_read_file(
    file: pathlib.Path, stream: Iterator[tuple], max_bytes: int, advance: Advance
) -> int:
    """Write the next documents of about max_bytes of text. Return their number."""
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
    return n_rows


def take_batch(stream: Iterator[tuple], max_bytes: int) -> list[tuple]:
    """Return the next rows: BATCH_DOCUMENTS or max_bytes of text, whichever comes first."""
    batch = []
    for row in itertools.islice(stream, BATCH_DOCUMENTS):
        batch.append(row)
        max_bytes -= row[-1]
        if max_bytes <= 0:
            break
    return batch


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
            digest = dedup.hash_document(data, meta)
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


def collect_read_files(
    results: list[ReadResult], source: int, limit: int
) -> tuple[list[ReadFile], int]:
    """Return the files of a source and how many documents are taken from them."""
    paths: list[pathlib.Path] = []
    rows: list[int] = []
    for result in results:
        paths += map(pathlib.Path, result.files)
        rows += result.rows
    threshold = min(result.threshold for result in results)
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


def find_hash_threshold(numbers: np.ndarray, sizes: np.ndarray, limit: int) -> int:
    """Return the smallest sampling number whose document does not fit any more."""
    order = np.argsort(numbers)
    total = np.cumsum(sizes[order])
    n_fitting = np.searchsorted(total, limit, "right")
    if n_fitting == len(order):
        return 2**64
    return int(numbers[order[n_fitting]])


def collect_skipped(results: list[ReadResult]) -> Unread:
    """Return what was skipped of a source."""
    counts = collections.Counter()
    first: list[str] = []
    for result in results:
        counts.update(result.unread.counts)
        first += result.unread.first
    return Unread(dict(sorted(counts.items())), tuple(first[:MAX_UNREADABLE_SHOWN]))


def explain_empty_source(source: sources.TextSource, skipped: Unread, max_mb: float) -> UserError:
    """Return the error for a source without documents."""
    where = f"prepare.sources: {source.name} ({source.kind}:{source.pattern})"
    if max_mb:
        return UserError(
            f"{where}: no document fits into prepare.max_mb={max_mb:g}. Raise prepare.max_mb."
        )
    counts = collections.Counter(skipped.counts)
    reasons = ""
    for reason, n in counts.most_common(3):
        reasons += f", {n:,} times {reason}"
    message = ""
    if skipped.first:
        message = f" ({skipped.first[0]})"
    return UserError(f"{where}: no document in it{reasons}{message}. Leave it out.")
