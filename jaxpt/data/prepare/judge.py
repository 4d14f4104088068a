"""Second pass: the rules judge each text alone, wherever the executor runs and in any order."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jaxpt import io
from jaxpt.data import benchmarks, decontaminate, dedup, filters, sources
from jaxpt.data.prepare.jobs import Advance, Job, JobResult, JobRunner, write_job_result
from jaxpt.data.prepare.rows import (
    INT32,
    INT64,
    STRING,
    DocumentTable,
    ReadFile,
    count_file_bytes,
    iterate_batches_of_file,
    number_texts,
    open_arrow_writer,
    read_column,
)

# the rules that compare documents
EXACT = "exact_dedup"
NEAR = "near_dedup"
PARAGRAPHS = "corpus_paragraphs"
NOT_SAMPLED = -1  # in place of a rule: prepare.max_mb left the document out
EDIT_FIELDS = ("edits", "chars", "bytes")  # edits, and the text after them


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
        with io.open_write(pathlib.Path(repeats)) as out:
            np.save(out, find_repeated(files, starts))
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
    n_bytes = sum(int(read_column(file.path, "bytes").sum()) for file in files)
    progress = "judging", "B", n_bytes
    results = runner.run(judge_file, todo, JobResult, progress, count_file_bytes(files))
    judged = [pathlib.Path(result.files[0]) for result in results]
    heldout_frac = json.loads(section)["heldout_frac"]
    heldout = int(heldout_frac * 2**64)
    return DocumentTable(names, files, judged, starts, heldout)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeJob(Job):
    """Judge the documents of a file."""

    section: str  # JSON
    repeats: str | None  # file of which documents repeat an earlier one, [n] bool
    file: str
    threshold: int
    start: int  # first row of the file


def judge_file(job: JudgeJob, advance: Advance = lambda n: None) -> int:
    """Do a JudgeJob: write the verdicts beside the file. Return the bytes of its texts."""
    rules, _ = open_rules(job.section)
    file = pathlib.Path(f"{job.output_prefix}.arrow")
    repeats = None
    if job.repeats:
        repeats = np.load(job.repeats, mmap_mode="r")
    signatures = []
    n = n_bytes = 0
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
            size = int(np.sum(batch.column("bytes").to_numpy()))
            n_bytes += size
            advance(size)
    files = [file]
    if find_rule(rules, NEAR) is not None:
        prefix = pathlib.Path(job.output_prefix)
        files.append(dedup.write_signatures(prefix, signatures))
    write_job_result(job, JobResult(files=tuple(map(str, files))))
    return n_bytes


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
