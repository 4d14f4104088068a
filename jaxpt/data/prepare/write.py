"""Third pass: what stays goes to its split, and a sample of what is dropped is kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxpt import io
from jaxpt.data import filters, paragraphs
from jaxpt.data.prepare.decide import SPLITS, Drops, is_kept
from jaxpt.data.prepare.jobs import (
    Advance,
    Job,
    JobResult,
    JobRunner,
    write_job_result,
)
from jaxpt.data.prepare.judge import find_rule, open_rules
from jaxpt.data.prepare.rows import (
    CORPUS_SCHEMA,
    STRING,
    DocumentTable,
    FilePart,
    count_file_bytes,
    iterate_batches_of_file,
    read_column,
)
from jaxpt.spec import Record

N_SAMPLES = 50  # dropped documents kept per rule
SAMPLE_CHARS = 10_000  # of each at most: enough to judge a rule by
GROUP_BYTES = 2**25  # of text per row group of a shard, about
GROUP_ROWS = 10_000  # documents per row group, at most
PAGE_ROWS = 1024  # documents per page, at most
PAGE_BYTES = 2**22  # of text per page, about
SAMPLE_SCHEMA = CORPUS_SCHEMA.append(pa.field("reason", STRING))
NO_CUTS = np.empty(0, [("row", np.int64)])


def write_corpus(
    runner: JobRunner,
    table: DocumentTable,
    rules: list[filters.Rule],
    drops: Drops,
    section: str,
    out: pathlib.Path,
) -> list[Match]:
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
        io.make_directory(directory)
        for name in io.list_names(directory):
            file = directory / name
            if str(file) not in planned:  # written before the code was changed
                io.remove(file)
    ends = np.cumsum(np.append(0, table.read_all("bytes")))
    sizes = [ends[job.stop] - ends[job.first] for job in todo]
    progress = "writing", "B", int(sum(sizes))
    n_bytes = count_file_bytes(table.files)
    n_threads = os.cpu_count() or 1
    results = runner.run(write_corpus_shard, todo, WriteResult, progress, n_bytes, n_threads)
    write_samples(results, rules, drops, out / "dropped")
    return [match for result in results for match in result.contaminated]


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
    with io.open_write(decided) as file:
        np.save(file, drops.dropped_by)
    cuts = None
    if drops.repeated:
        cuts = str(state_dir / "cuts.npy")
        with io.open_write(state_dir / "cuts.npy") as file:
            np.save(file, drops.repeated.cuts)
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


@dataclasses.dataclass(frozen=True)
class Match(Record):
    """Words that a training document shared with a benchmark item."""

    id: str
    source: str
    task: str
    item: str
    words: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteResult(JobResult):
    """What a WriteJob left, and looked up."""

    samples: dict[int, dict[str, Any]]  # row -> its columns, of SAMPLE_SCHEMA
    ids: dict[int, str]  # row -> id
    contaminated: tuple[Match, ...]


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


def select_rows(rows: np.ndarray, first: int, stop: int) -> tuple[int, ...]:
    """Return the sorted rows from `first` up to `stop`."""
    begin, end = np.searchsorted(rows, [first, stop])
    selected = rows[begin:end]
    return tuple(selected.tolist())


def write_corpus_shard(job: WriteJob, advance: Advance = lambda n: None) -> int:
    """Do a WriteJob and return the bytes of the texts that it passed."""
    writer = ShardWriter(job)
    tables = writer.iterate_tables(advance)
    files = []
    if job.file:
        files.append(pathlib.Path(job.file))
        with io.writing(files[0]) as path:
            write_row_groups(path, tables, writer.split_groups(), writer.count_page_rows())
    # the rest has rows of the other split, but documents may be looked up in it
    for _ in tables:
        pass
    result = WriteResult(
        files=tuple(map(str, files)),
        samples=writer.samples,
        ids=writer.ids,
        contaminated=tuple(writer.contaminated),
    )
    write_job_result(job, result)
    return writer.n_bytes


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
        self.contaminated: list[Match] = []
        self.n_bytes = 0  # of the texts that passed

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

    def count_page_rows(self) -> int:
        """Return the rows of a page, which readers unpack as a whole: Arrow's own if few bytes."""
        sizes = self.read_judged("new.bytes")[self.kept]
        mean = sizes.mean() if len(sizes) else 0.0
        return int(min(PAGE_ROWS, PAGE_BYTES // max(mean, 1.0) + 1))

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
                size = int(np.sum(read.column("bytes").to_numpy()))
                self.n_bytes += size
                advance(size)
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
                where = document["id"], document["source"]
                self.contaminated.append(Match(*where, item.task, item.id, words))


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


def write_row_groups(
    file: pathlib.Path, tables: Iterator[pa.Table], groups: list[int], page_rows: int
) -> None:
    """Write a parquet shard with row groups of these sizes.

    Each group is contiguous in memory, or its bytes would depend on how its rows came.
    """
    options: dict[str, Any] = {"use_dictionary": ["source", "meta"], "write_batch_size": page_rows}
    with pq.ParquetWriter(file, CORPUS_SCHEMA, compression="zstd", **options) as out:
        waiting = CORPUS_SCHEMA.empty_table()
        for n in groups:
            while len(waiting) < n:
                waiting = pa.concat_tables([waiting, next(tables)])
            group = waiting.slice(0, n).combine_chunks()
            out.write_table(group, row_group_size=n)
            waiting = waiting.slice(n)


def pick_samples(show: np.ndarray, dropped_by: np.ndarray, n_rules: int) -> np.ndarray:
    """Return up to N_SAMPLES rows that each rule dropped, in order: random but the same always."""
    chosen = [np.empty(0, np.int64)]
    for k in range(n_rules):
        dropped = np.flatnonzero(dropped_by == k)
        order = np.argsort(show[dropped], kind="stable")
        chosen.append(dropped[order[:N_SAMPLES]])
    return np.sort(np.concatenate(chosen))


def write_samples(
    results: list[WriteResult],
    rules: list[filters.Rule],
    drops: Drops,
    directory: pathlib.Path,
) -> None:
    """Write DIRECTORY/RULE.parquet for each rule that dropped documents."""
    ids = {}
    samples = {}
    for result in results:
        ids |= result.ids
        samples |= result.samples
    io.remove_working(directory)
    io.make_directory(directory)
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
            with io.writing(directory / f"{rule.name}.parquet") as file:
                pq.write_table(table, file, compression="zstd")
