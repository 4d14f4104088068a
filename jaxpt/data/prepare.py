"""The stage prepare: sources -> rules -> duplicates -> train and held-out parquet shards, with an account of what went.

Every rule but those that compare documents looks at one text alone, and those that compare look at small marks. So the texts
are passed over three times, whatever the number of rules: read (into numbered rows on disk), judge (each text alone), write.
Between judging and writing a table of numbers decides, in canonical order, what each document fell to.

Each pass is cut into jobs, done in processes here or on a cluster, in any order. What a job writes depends on the texts and
the config alone, and so does the corpus, whatever the workers and the files that the input was cut into. A file gets its
name when it is whole, so a killed run goes on with the jobs that were not done.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.data import (
    benchmarks,
    decontaminate,
    dedup,
    executor,
    filters,
    jobs,
    paragraphs,
    sources,
    tokenizer,
)
from jaxpt.spec import Manifest, UserError

log = logging.getLogger(__name__)

N_SAMPLES = 50  # dropped documents shown for each rule
SAMPLE_CHARS = 10_000  # of each, at most: enough to judge a rule by
JOB_BYTES = 2**23  # of text that a job judges, about
BATCH_BYTES = 2**22  # of text judged at once, about, and
BATCH_ROWS = 1024  # the documents in it, at most
GROUP_BYTES = 2**25  # of text in a row group of a shard, about, and
GROUP_ROWS = 10_000  # the documents in it, at most
MAX_INLINE_BYTES = {
    "read_piece": 2**27,
    "judge_rows": 2**24,
    "write_shard": 2**28,
}  # bytes up to which no other process is started: that takes longer
TOKEN_BYTES = 4  # of text that make a token, about
MAX_UNREADABLE_SHOWN = 20  # sentences about what cannot be read, of each source, at most
NOT_SAMPLED = -1  # in place of a rule, of a document that limit_mb left out

CORPUS_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "text": pa.string(),
        "prompt_chars": pa.int32(),
        "meta": pa.string(),
    }
)  # of the shards
READ_SCHEMA = pa.schema({
    "id": pa.string(), "text": pa.string(), "prompt_chars": pa.int32(), "meta": pa.string(), "digest": pa.binary(32),
    "chars": pa.int64(), "bytes": pa.int64(),
})  # fmt: skip
SAMPLE_SCHEMA = CORPUS_SCHEMA.append(pa.field("reason", pa.string()))
COMPRESSION = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
EXACT, NEAR, PARAGRAPHS = (
    "exact_dedup",
    "near_dedup",
    "corpus_paragraphs",
)  # the rules that compare documents


def prepare_corpus(
    settings: config.Config, workdir: pathlib.Path, replace: bool = False
) -> Manifest:
    """Prepare WORKDIR/corpus as the section `prepare` says, or find it finished.

    Raises UserError for a source, rule, benchmark, engine or record that cannot be used, and when every document is dropped.
    """
    knobs = settings.prepare
    if knobs.shard_mb < 1 or knobs.max_mb < 0:
        raise UserError(
            f"prepare.shard_mb and limit_mb: got {knobs.shard_mb} and {knobs.max_mb}, wanted at least 1 and at least 0."
        )
    if knobs.decontaminate_ngram < 1:
        raise UserError(
            f"prepare.decontaminate_ngram: got {knobs.decontaminate_ngram}, wanted at least 1."
        )
    found = sources.parse_sources(knobs.sources)
    asked = json.dumps(stage.to_jsonable(knobs))
    rules, index = open_sources(asked)
    executor.init_executor(knobs.executor)

    request = stage.to_jsonable(knobs)
    del request["engine"]  # it decides where the work is done, not what comes out
    request["rules"] = [rule.help for rule in rules]
    words = (
        None
        if settings.tokenizer.source == "train"
        else tokenizer.load_tokenizer(settings.tokenizer.source)
    )
    request |= {"tokenizer": words.fingerprint} if words else {}  # it estimates the funnel's tokens
    request["installed"] = {
        source.name: versions for source in found if (versions := source.describe_installation())
    }
    inputs = {key: path for source in found for key, path in source.fingerprint_inputs().items()}
    inputs |= {
        f"benchmarks/{i}": stage.local_path(path) for i, path in enumerate(knobs.decontaminate)
    }
    if index.n_short:
        short = f"{index.n_short:,} of {len(index.items):,} benchmark items have fewer than {index.n} words"
        log.info(f"prepare: {short}: no document can be matched with them")

    def work(partial: pathlib.Path) -> dict[str, Any]:
        home = partial.resolve() / ".work"
        do = functools.partial(jobs.run_jobs, knobs.executor, home)
        files, unread = read_sources(do, found, knobs)
        rows = judge_documents(do, files, found, asked, rules, home)
        dropped_by, twin, repeats = decide_drops(rows, rules)
        hits = write_corpus(do, rows, rules, dropped_by, twin, repeats, asked, partial.resolve())
        contaminated = {
            task: len({hit["id"] for hit in hits if hit["task"] == task})
            for task in sorted({item.task for item in index.items})
        }
        if knobs.decontaminate:
            (partial / "contaminated.jsonl").write_text(
                "".join(json.dumps(hit, ensure_ascii=False) + "\n" for hit in hits)
            )
        funnel = {
            **build_funnel(rows, rules, dropped_by, repeats, estimate_token_bytes(rows, words)),
            "unread": unread,
        }
        (partial / "funnel.json").write_text(json.dumps(funnel, indent=1) + "\n")
        if not any(amounts["rows"] for amounts in funnel["train"].values()):
            raise UserError(
                f"prepare: no document of {len(dropped_by):,} is left to train on.\n{format_funnel(funnel)}\nSamples of what each rule dropped lie in "
                f"{partial / 'dropped'}; choose another prepare.preset or source, or lower prepare.heldout_frac."
            )
        shutil.rmtree(home)
        return {**funnel, "contaminated": contaminated}

    manifest = stage.run_stage(
        "prepare", workdir / "corpus", work, config=request, inputs=inputs, replace=replace
    )
    log.info(format_funnel(manifest.counts))
    for step in manifest.counts["steps"]:
        for name, n in step.get("edits", {}).items():
            if n:
                log.info(f"prepare: {step['rule']} made {n:,} edits in {name}")
    for name, one in manifest.counts["unread"].items():
        for why, n in one["counts"].items():
            log.info(f"prepare: {name}: {n:,} records or files passed over: {why}")
        for sentence in one["first"]:
            log.info(f"prepare: passed over: {sentence}")
    for task, n in manifest.counts["contaminated"].items():
        log.info(
            f"prepare: {n:,} documents dropped for what they share with {task}; {workdir / 'corpus/contaminated.jsonl'} lists them"
        )
    sums = [
        sum(amounts[key] for amounts in manifest.counts[side].values())
        for side in ("train", "heldout")
        for key in ("rows", "bytes")
    ]
    made = f"{sums[0]:,} documents ({sums[1] / 1e6:.1f} MB) to train on, {sums[2]:,} ({sums[3] / 1e6:.1f} MB) held out"
    log.info(f"prepare: {workdir / 'corpus'}: {made}")
    return manifest


@functools.lru_cache(maxsize=1)
def open_sources(asked: str) -> tuple[list[filters.Rule], decontaminate.NgramIndex]:
    """(the rules in order, the benchmarks' 13-grams) that a section `prepare`, as JSON, asks for: opened once in each process."""
    knobs = json.loads(asked)
    index = decontaminate.NgramIndex(
        [item for path in knobs["decontaminate"] for item in benchmarks.read_benchmark(path)],
        knobs["decontaminate_ngram"],
    )
    near = [NEAR] if knobs["near_dedup"] and NEAR not in filters.PRESETS[knobs["preset"]] else []
    rules = filters.parse_rules(knobs["preset"], [*knobs["rules"], *near])
    rules += (
        [filters.Rule("decontaminate", drop=index.find_contaminated, help="decontaminate")]
        if knobs["decontaminate"]
        else []
    )
    # what the other rules drop must not take a paragraph along that stays elsewhere
    return sorted(rules, key=lambda rule: rule.name == PARAGRAPHS), index


def order_rules(rules: Sequence[filters.Rule], name: str) -> int | None:
    """Where the rule of this name stands."""
    return next((k for k, rule in enumerate(rules) if rule.name == name), None)


# ---- first pass: every document becomes a numbered row


class ReadFile(NamedTuple):
    """A file of rows, in canonical order."""

    path: pathlib.Path
    source: int
    n: int
    hash_threshold: int  # of the sampling number: documents from it on are not taken


def read_sources(
    do: Callable, found: Sequence[sources.TextSource], knobs: config.PrepareConfig
) -> tuple[list[ReadFile], dict[str, dict]]:
    """Put the documents of all sources on disk: all of them, or those of which limit_mb are taken and some more.

    Also what was passed over of each source: how many records and files, by reason, and the first sentences about what cannot be read.
    """
    todo, n_bytes, limit = [], 0, int(knobs.max_mb * 1e6)
    for k, source in enumerate(found):
        for piece, size in split_source(source):
            todo.append(
                {
                    "source": k,
                    "piece": stage.to_jsonable(piece),
                    "limit": limit,
                    "room": JOB_BYTES,
                    "on_error": knobs.on_error,
                }
            )
            n_bytes += size
    answers = do(read_part, todo, "reading", "B", None, n_bytes > MAX_INLINE_BYTES["read_piece"])
    files, unread = [], {}
    for k, source in enumerate(found):
        mine = [answer for job, answer in zip(todo, answers, strict=True) if job["source"] == k]
        paths = [pathlib.Path(path) for answer in mine for path in answer["files"]]
        ceiling, n_taken = (
            min(answer["ceiling"] for answer in mine),
            sum(sum(answer["rows"]) for answer in mine),
        )
        if limit and paths:
            places = np.concatenate([read_column(path, "digest")[:, 3] for path in paths])
            ceiling = min(
                ceiling,
                find_hash_threshold(
                    places, np.concatenate([read_column(path, "bytes") for path in paths]), limit
                ),
            )
            n_taken = (places < ceiling).sum()
        counts = sum(
            (collections.Counter(answer["unread"]) for answer in mine), collections.Counter()
        )
        first = [sentence for answer in mine for sentence in answer["first"]][:MAX_UNREADABLE_SHOWN]
        if counts:
            unread[source.name] = {"counts": dict(sorted(counts.items())), "first": first}
        if not n_taken:
            passed = "".join(f", {n:,} times {why}" for why, n in counts.most_common(3)) + (
                f" ({first[0]})" if first else ""
            )
            why = (
                f"no document fits into prepare.max_mb={knobs.max_mb:g}, raise it"
                if limit
                else f"no document in it{passed}, leave it out"
            )
            raise UserError(
                f"prepare.sources: {source.name} ({source.kind}:{source.pattern}): {why}."
            )
        rows = [n for answer in mine for n in answer["rows"]]
        files += [ReadFile(path, k, n, ceiling) for path, n in zip(paths, rows, strict=True)]
    return files, unread


def split_source(source: sources.TextSource) -> Iterator[tuple[sources.TextSource, int]]:
    """The source cut between files into parts of about JOB_BYTES on disk, each with its bytes."""
    files, n_bytes = [], 0
    for file, size in zip(source.files, source.list_file_sizes(), strict=True):
        files.append(file)
        n_bytes += size
        if n_bytes >= JOB_BYTES:
            yield dataclasses.replace(source, files=tuple(files)), n_bytes
            files, n_bytes = [], 0
    if files or not source.files:
        yield (
            dataclasses.replace(source, files=tuple(files)),
            n_bytes or MAX_INLINE_BYTES["read_piece"],
        )  # what has no files: nobody knows


def read_part(job: dict, advance: Callable[[int], None] = lambda n: None) -> int:
    """A part of a source to files of rows, with about job["room"] bytes of text each. Returns the bytes of their texts."""
    source = sources.TextSource(**{**job["piece"], "files": tuple(job["piece"]["files"])})
    taken, files, rows, total = ByteLimitSampler(job["limit"], source.kind == "hf"), [], [], 0
    unread, first = collections.Counter(), []

    def passed(why: str, sentence: str) -> None:
        unread[why] += 1
        if why == sources.READ_ERRORS and len(first) < MAX_UNREADABLE_SHOWN:
            first.append(sentence)

    stream = taken.keep_below(source.iterate_documents(passed, job["on_error"]))
    for n in itertools.count():
        file = pathlib.Path(f"{job['to']}-{n:05d}.arrow")
        with (
            jobs.open_atomic(file, file.parent) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, READ_SCHEMA, options=COMPRESSION) as out,
        ):
            n_rows = n_bytes = 0
            while n_bytes < job["room"] and (
                batch := take_batch(stream, min(BATCH_BYTES, job["room"] - n_bytes))
            ):
                columns = zip(*batch, strict=True)
                out.write_batch(
                    pa.record_batch(
                        [
                            extract_column(each, field)
                            for each, field in zip(columns, READ_SCHEMA, strict=True)
                        ],
                        schema=READ_SCHEMA,
                    )
                )
                n_rows += len(batch)
                size = sum(row[-1] for row in batch)
                n_bytes += size
                advance(size)
        if not n_rows:
            file.unlink()
            break
        files.append(file)
        rows.append(n_rows)
        total += n_bytes
    jobs.write_job_result(job, files, rows=rows, ceiling=taken.ceiling, unread=unread, first=first)
    return total


def extract_column(values: Sequence, field: pa.Field) -> pa.Array:
    """Of READ. Texts come encoded, so they need neither a look at each nor a check: a third of the time."""
    if field.name != "text":
        return pa.array(values, field.type)
    return pa.StringArray.from_buffers(
        len(values),
        pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32)),
        pa.py_buffer(b"".join(values)),
    )


def take_batch(stream: Iterator[tuple], room: int) -> list[tuple]:
    """The next rows, BATCH_ROWS of them or `room` bytes of text, whichever is reached first; none at the end."""
    batch = []
    for row in itertools.islice(stream, BATCH_ROWS):
        batch.append(row)
        room -= row[-1]
        if room <= 0:
            break
    return batch


class ByteLimitSampler:
    """Rows of READ for the documents that may be taken: all, or those with the smallest sampling numbers that make `limit` bytes.

    A document is passed on before later ones may push it out again: those from the final `ceiling` on are not taken. Equal
    texts have equal numbers and stay or go together. A streamed set may have no end: of it the first `limit` bytes are taken.
    """

    def __init__(self, limit: int, streamed: bool):
        self.limit, self.streamed, self.ceiling = limit, streamed, 2**64

    def keep_below(self, documents: Iterator[sources.Document]) -> Iterator[tuple]:
        kept: list[tuple[int, int]] = []  # heap of (-sampling number, bytes)
        total = 0
        for found in documents:
            data = found.text.encode()
            digest = dedup.hash_text(data)
            number = int.from_bytes(digest[24:])
            if self.limit and number < self.ceiling:
                total += len(data)
                if self.streamed and total > self.limit:
                    return
                if not self.streamed:
                    heapq.heappush(kept, (-number, len(data)))
                while kept and (total > self.limit or -kept[0][0] >= self.ceiling):
                    number_out, size = heapq.heappop(kept)
                    self.ceiling = min(self.ceiling, -number_out)
                    total -= size
            if number < self.ceiling:
                yield (
                    found.id,
                    data,
                    found.prompt_chars,
                    found.meta,
                    digest,
                    len(found.text),
                    len(data),
                )  # text as bytes: Arrow takes them faster


def find_hash_threshold(numbers: np.ndarray, sizes: np.ndarray, limit: int) -> int:
    """The smallest sampling number of which the documents do not fit any more."""
    order = np.argsort(numbers)
    n_fitting = np.searchsorted(np.cumsum(sizes[order]), limit, "right")
    return int(numbers[order[n_fitting]]) if n_fitting < len(order) else 2**64


# ---- second pass: each text is judged alone


@dataclasses.dataclass(frozen=True)
class DocumentTable:
    """n documents in canonical order: what was read and what was judged of them lies in files, row beside row."""

    names: list[str]  # of the sources
    files: list[ReadFile]
    judged: list[pathlib.Path]
    starts: np.ndarray  # [files + 1] the first row of each file, and n
    heldout: int  # of the split number: documents below it are held out

    def iterate_files(self, *wanted: str) -> Iterator[tuple]:
        """Of each file (the slice of its rows, its source, the wanted columns)."""
        for file, judged, start in zip(self.files, self.judged, self.starts, strict=False):
            yield (
                slice(start, start + file.n),
                file.source,
                *(
                    read_column(file.path if name in READ_SCHEMA.names else judged, name)
                    for name in wanted
                ),
            )

    def read_all(self, wanted: str) -> np.ndarray:
        """[n] a column."""
        return np.concatenate([found for _, _, found in self.iterate_files(wanted)])


def read_column(path: pathlib.Path, name: str) -> np.ndarray:
    """A column of numbers, of digests as [n, bytes / 8] uint64, or of bytes as Arrow has them, of a file; nothing else of the file is read."""
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        reader = pa.ipc.open_file(
            file,
            options=pa.ipc.IpcReadOptions(
                included_fields=[schema.get_field_index(name)], use_threads=False
            ),
        )
        found = reader.read_all().column(0).combine_chunks()
    if pa.types.is_binary(found.type):
        return found
    return number_texts(found) if pa.types.is_fixed_size_binary(found.type) else found.to_numpy()


def number_texts(found: pa.FixedSizeBinaryArray) -> np.ndarray:
    """[n] digests -> [n, bytes / 8] uint64"""
    width = found.type.byte_width // 8
    return (
        np.frombuffer(found.buffers()[1], ">u8", len(found) * width, found.offset * width * 8)
        .reshape(-1, width)
        .astype(np.uint64)
    )


def judge_documents(
    do: Callable,
    files: list[ReadFile],
    found: Sequence[sources.TextSource],
    asked: str,
    rules: Sequence[filters.Rule],
    home: pathlib.Path,
) -> DocumentTable:
    """Run the rules over the texts, wherever the engine runs and in whatever order it answers."""
    starts = np.cumsum([0, *(file.n for file in files)])
    repeats = home / "repeats.npy"
    if order_rules(rules, EXACT) is not None:
        np.save(repeats, find_repeated(files, starts))
    same = {"asked": asked, "repeats": None if order_rules(rules, EXACT) is None else str(repeats)}
    todo = [
        {**same, "file": str(file.path), "ceiling": file.hash_threshold, "start": int(start)}
        for file, start in zip(files, starts, strict=False)
    ]
    answers = do(
        judge_file,
        todo,
        "judging",
        "documents",
        int(starts[-1]),
        sum(file.path.stat().st_size for file in files) > MAX_INLINE_BYTES["judge_rows"],
    )
    judged = [pathlib.Path(next(iter(answer["files"]))) for answer in answers]
    return DocumentTable(
        [source.name for source in found],
        files,
        judged,
        starts,
        int(json.loads(asked)["heldout_frac"] * 2**64),
    )


def find_repeated(files: list[ReadFile], starts: np.ndarray) -> np.ndarray:
    """Which documents say, to the letter, what an earlier one does, [n] bool."""
    known = np.empty((starts[-1], 2), np.uint64)
    for file, start in zip(files, starts, strict=False):
        # the same letters with another prompt may be edited in another way
        prompts = read_column(file.path, "prompt_chars").astype(np.uint64)
        known[start : start + file.n] = read_column(file.path, "digest")[:, :2] + np.stack(
            [np.zeros_like(prompts), prompts], 1
        )
    return dedup.find_exact_duplicates(known) != np.arange(starts[-1])


def make_judged_schema(rules: Sequence[filters.Rule]) -> pa.Schema:
    """What is known of each document after the rules.

    failed, reason          the first rule that drops it, by itself, or the number of rules where none does
    new.text, new.meta      as they stand in the end; null where they are what was read;  new.chars, new.bytes, new.prompt_chars  of that text
    split, show             the numbers that decide on its side, and on samples
    K.edits, K.chars, K.bytes  of the editing rule K: edits, and the text after it;  K.mark  of a comparing rule K but near_dedup
    """
    fields = {
        "failed": pa.int16(),
        "reason": pa.string(),
        "new.text": pa.string(),
        "new.meta": pa.string(),
    }
    fields |= {
        "new.prompt_chars": pa.int32(),
        "new.chars": pa.int64(),
        "new.bytes": pa.int64(),
        "split": pa.uint64(),
        "show": pa.uint64(),
    }
    for k, rule in enumerate(rules):
        if rule.edit:
            fields |= {f"{k}.{name}": pa.int64() for name in ("edits", "chars", "bytes")}
        elif rule.name in (EXACT, PARAGRAPHS):
            fields[f"{k}.mark"] = pa.binary(16) if rule.name == EXACT else pa.binary()
    return pa.schema(fields)


def judge_file(job: dict, advance: Callable[[int], None] = lambda n: None) -> int:
    """What the rules say of each document of a file by itself, in a file beside it. Returns the number of documents."""
    rules, _ = open_sources(job["asked"])
    schema, file = make_judged_schema(rules), pathlib.Path(f"{job['to']}.arrow")
    repeats = np.load(job["repeats"], mmap_mode="r") if job["repeats"] else None
    signatures, n = [], 0
    with (
        jobs.open_atomic(file, file.parent) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=COMPRESSION) as out,
    ):
        for batch in iterate_batches_of_file(job["file"]):
            taken = number_texts(batch.column("digest"))[:, 3] < job["ceiling"]
            start = job["start"] + n
            again = (
                np.zeros_like(taken)
                if repeats is None
                else repeats[start : start + len(taken)] & taken
            )
            columns, found = make_judged_columns(batch, rules, taken & ~again, again)
            out.write_batch(
                pa.record_batch(
                    [pa.array(columns[field.name], field.type) for field in schema], schema=schema
                )
            )
            signatures += found
            n += len(taken)
            advance(len(taken))
    kept = (
        dedup.write_signatures(pathlib.Path(job["to"]), signatures)
        if order_rules(rules, NEAR) is not None
        else []
    )
    jobs.write_job_result(job, [file, *kept])
    return n


def make_judged_columns(
    batch: pa.RecordBatch, rules: list[filters.Rule], fresh: np.ndarray, again: np.ndarray
) -> tuple[dict[str, Any], list[bytes]]:
    """(columns of judged_schema, signatures of those that came so far) of documents that are judged as new or known to be `again` repeats.

    A repeat is dropped by exact_dedup at the latest, for the earlier text comes as far as it does: the rules after that are spared.
    """
    documents = [
        sources.Document(*row)
        for row in zip(
            *(batch.column(name).to_pylist() for name in sources.Document._fields), strict=True
        )
    ]
    blank = {pa.string(): None, pa.binary(16): bytes(16), pa.binary(): b""}
    columns: dict[str, Any] = {
        field.name: [blank[field.type]] * len(documents)
        if field.type in blank
        else np.zeros(len(documents), str(field.type))
        for field in make_judged_schema(rules)
    }
    columns["failed"][:] = NOT_SAMPLED
    columns["split"], columns["show"] = number_texts(batch.column("digest"))[:, 2:].T.copy()
    for name in ("prompt_chars", "chars", "bytes"):
        columns[f"new.{name}"][:] = batch.column(name)
    signatures = {}
    for chosen, some in (
        (fresh, rules),
        (again, rules[: order_rules(rules, EXACT) + 1] if again.any() else []),
    ):
        places = np.flatnonzero(chosen).tolist()
        judged = filters.apply_rules([documents[i] for i in places], some)
        columns["failed"][places] = judged.failed_rule
        for i, reason, made in zip(places, judged.reasons, judged.documents, strict=True):
            columns["reason"][i] = reason or None
            columns["new.meta"][i] = made.meta if made.meta != documents[i].meta else None
            if made.text != documents[i].text:
                columns["new.text"][i], columns["new.prompt_chars"][i] = (
                    made.text,
                    made.prompt_chars,
                )
                columns["split"][i], columns["show"][i] = np.frombuffer(
                    dedup.hash_text(made.text.encode())[16:], ">u8"
                )
        for k, edits in judged.edits.items():
            for i, edited in zip(places, edits, strict=True):
                if edited:
                    columns[f"{k}.edits"][i], columns[f"{k}.chars"][i], columns[f"{k}.bytes"][i] = (
                        edited
                    )
                    columns["new.chars"][i], columns["new.bytes"][i] = edited[1:]
        for k, marks in judged.marks.items():
            for i, mark in zip(places, marks, strict=True):
                if mark and rules[k].name == NEAR:
                    signatures[i] = mark
                elif mark:
                    columns[f"{k}.mark"][i] = mark[:16] if rules[k].name == EXACT else mark
    return columns, [signatures[i] for i in sorted(signatures)]


def count_batch_rows(path: str | pathlib.Path) -> list[int]:
    """The rows of each batch of a file; its smallest column is read for it."""
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        smallest = next(i for i, field in enumerate(schema) if pa.types.is_integer(field.type))
        reader = pa.ipc.open_file(
            file, options=pa.ipc.IpcReadOptions(included_fields=[smallest], use_threads=False)
        )
        return [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]


def iterate_batches_of_file(
    path: str | pathlib.Path, first: int = 0, stop: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file from `first` up to `stop`, a few at a time."""
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(use_threads=False))
        ends = np.cumsum(count_batch_rows(path))
        for i in range(reader.num_record_batches):
            start = ends[i - 1] if i else 0
            if ends[i] > first and (stop is None or start < stop):
                low, high = (
                    max(first - start, 0),
                    (ends[i] if stop is None else min(stop, ends[i])) - start,
                )
                yield reader.get_batch(i).slice(low, high - low)


# ---- between judging and writing: what each document fell to


def decide_drops(
    rows: DocumentTable, rules: Sequence[filters.Rule]
) -> tuple[np.ndarray, np.ndarray, paragraphs.RepeatedParagraphs | None]:
    """What each document fell to: (index of the rule, or len(rules) for those kept; the row that it repeats, or -1), both [n]; what goes out of others.

    A rule that compares documents sees those that all rules before it kept; the first of equals stays.
    """
    failed = rows.read_all("failed")
    dropped_by, twin, repeated = failed.copy(), np.full(len(failed), -1), None
    for k, rule in enumerate(rules):
        if rule.name == PARAGRAPHS:
            repeated = paragraphs.find_repeated_paragraphs(
                functools.partial(count_reasons, rows, k, dropped_by > k), len(failed)
            )
            dropped_by[repeated.empty], twin[repeated.empty] = k, repeated.twin
        elif rule.mark:
            alive = np.flatnonzero(dropped_by > k)
            if rule.name == NEAR:
                first = dedup.find_near_duplicates(
                    [judged.with_suffix("") for judged in rows.judged], dropped_by[failed > k] > k
                )
            else:
                first = dedup.find_exact_duplicates(
                    np.concatenate(
                        [
                            mark[dropped_by[here] > k]
                            for here, _, mark in rows.iterate_files(f"{k}.mark")
                        ]
                    )
                )
            repeats = alive[first != np.arange(len(alive))]
            dropped_by[repeats], twin[repeats] = k, alive[first[first != np.arange(len(alive))]]
    return dropped_by, twin, repeated


def count_reasons(
    rows: DocumentTable, k: int, alive: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What paragraphs.repeats asks for, of the rule k and the rows that came so far; what has a prompt is left as it is."""
    for here, _, prompts, marks in rows.iterate_files("new.prompt_chars", f"{k}.mark"):
        asked = alive[here] & (prompts == 0)
        marks = marks.filter(pa.array(asked))
        counts = pc.binary_length(marks).to_numpy() // paragraphs.MARK_DTYPE.itemsize
        yield (
            here.start + np.flatnonzero(asked),
            counts,
            np.frombuffer(b"".join(marks.to_pylist()), paragraphs.MARK_DTYPE),
        )


# ---- third pass: what stays goes to its side, and of what goes a sample is kept


def write_corpus(
    do: Callable,
    rows: DocumentTable,
    rules: list[filters.Rule],
    dropped_by: np.ndarray,
    twin: np.ndarray,
    repeated: paragraphs.RepeatedParagraphs | None,
    asked: str,
    out: pathlib.Path,
) -> list[dict[str, str]]:
    """Write the shards and the samples. Returns what documents were dropped for by decontaminate: each with each item, and the words that they share."""
    decided, shard_bytes = out / ".work/dropped_by.npy", json.loads(asked)["shard_mb"] * 1_000_000
    np.save(decided, dropped_by)
    if repeated:
        np.save(out / ".work/cuts.npy", repeated.cuts)
    shown = pick_samples(rows.read_all("show"), dropped_by, len(rules))
    named = np.unique(twin[shown][twin[shown] >= 0])
    sizes, split, of_source = (
        rows.read_all("new.bytes"),
        rows.read_all("split"),
        np.array([file.source for file in rows.files]),
    )
    todo = []
    for (k, name), side in itertools.product(enumerate(rows.names), ("train", "heldout")):
        low, high = (int(rows.starts[i]) for i in np.searchsorted(of_source, [k, k + 1]))
        kept = is_kept(dropped_by[low:high], split[low:high], side, len(rules), rows.heldout)
        for n, (first, stop) in enumerate(
            itertools.pairwise(split_shards(np.where(kept, sizes[low:high], 0), shard_bytes) + low)
        ):
            # the shards of the training side, empty or not, pass over all rows: they fetch what is told of single ones
            here = [
                each[(each >= first) & (each < stop)].tolist() if side == "train" else []
                for each in (shown, named)
            ]
            file = (
                str(out / side / f"{name}-{n:05d}.parquet")
                if kept[first - low : stop - low].any()
                else None
            )
            if file or side == "train":
                i, j = (
                    np.searchsorted(rows.starts, first, "right") - 1,
                    np.searchsorted(rows.starts, stop),
                )
                parts = [
                    [str(rows.files[f].path), str(rows.judged[f]), int(rows.starts[f])]
                    for f in range(i, j)
                ]
                todo.append(
                    {
                        "asked": asked,
                        "name": name,
                        "side": side,
                        "file": file,
                        "parts": parts,
                        "first": int(first),
                        "stop": int(stop),
                    }
                )
                todo[-1] |= {
                    "dropped_by": str(decided),
                    "heldout": rows.heldout,
                    "shown": here[0],
                    "named": here[1],
                }
                todo[-1] |= {"cuts": str(out / ".work/cuts.npy")} if repeated else {}
    for side in ("train", "heldout"):
        (out / side).mkdir(exist_ok=True)
        for file in set(map(str, (out / side).iterdir())) - {
            job["file"] for job in todo
        }:  # of other jobs, before the code was changed
            pathlib.Path(file).unlink()
    total = int(rows.starts[-1]) + sum(
        job["stop"] - job["first"] for job in todo if job["side"] == "heldout"
    )
    apart = sum(file.path.stat().st_size for file in rows.files) > MAX_INLINE_BYTES["write_shard"]
    answers = do(write_corpus_shard, todo, "writing", "documents", total, apart, os.cpu_count())
    ids = {int(row): id for answer in answers for row, id in answer["ids"].items()}
    found = {int(row): sample for answer in answers for row, sample in answer["samples"].items()}
    shutil.rmtree(out / "dropped", ignore_errors=True)
    (out / "dropped").mkdir()
    for row, sample in found.items():
        if twin[row] >= 0:
            sample["reason"] = f"repeats {ids[int(twin[row])]}"
    for k, rule in enumerate(rules):
        if told := [found[row] for row in sorted(found) if dropped_by[row] == k]:
            pq.write_table(
                pa.Table.from_pylist(told, SAMPLE_SCHEMA),
                out / "dropped" / f"{rule.name}.parquet",
                compression="zstd",
            )
    return [hit for answer in answers for hit in answer["contaminated"]]


def is_kept(
    dropped_by: np.ndarray, split: np.ndarray, side: str, n_rules: int, heldout: int
) -> np.ndarray:
    """Which documents go to a side, [n] bool: by the text alone, so that none changes sides as a corpus grows."""
    return (dropped_by == n_rules) & ((split < heldout) == (side == "heldout"))


def pick_samples(show: np.ndarray, dropped_by: np.ndarray, n_rules: int) -> np.ndarray:
    """Up to SAMPLES rows that each rule dropped, as good as at random and the same every time; in order."""
    found = [np.empty(0, np.int64)]
    for k in range(n_rules):
        dropped = np.flatnonzero(dropped_by == k)
        found.append(dropped[np.argsort(show[dropped], kind="stable")[:N_SAMPLES]])
    return np.sort(np.concatenate(found))


def split_shards(sizes: np.ndarray, most: int, most_rows: int | None = None) -> np.ndarray:
    """Where to cut rows of these sizes so that each stretch but the last just reaches `most`, or has most_rows: its first rows, and the end."""
    total, found = np.cumsum(sizes), [0]
    while True:
        end = int(np.searchsorted(total, most + (total[found[-1] - 1] if found[-1] else 0))) + 1
        end = min(end, found[-1] + most_rows) if most_rows else end
        if end >= len(sizes) or total[end - 1] == total[-1]:
            return np.array([*found, len(sizes)])
        found.append(end)


def write_corpus_shard(job: dict, advance: Callable[[int], None] = lambda n: None) -> int:
    """A shard of one side and what is asked of single documents on the way. Returns the rows passed."""
    rules, index = open_sources(job["asked"])
    first, stop = job["first"], job["stop"]
    decided = np.load(job["dropped_by"], mmap_mode="r")[first:stop]
    cut = np.load(job["cuts"], mmap_mode="r") if "cuts" in job else np.empty(0, [("row", np.int64)])
    told: dict[str, Any] = {"samples": {}, "ids": {}, "contaminated": []}
    spans = [(max(first - start, 0), stop - start) for _, _, start in job["parts"]]
    kept, sizes = [], []
    for (_, judged, _), span in zip(job["parts"], spans, strict=True):
        kept.append(read_column(pathlib.Path(judged), "split")[slice(*span)])
        sizes.append(read_column(pathlib.Path(judged), "new.bytes")[slice(*span)])
    kept = is_kept(decided, np.concatenate(kept), job["side"], len(rules), job["heldout"])
    groups = (
        np.diff(split_shards(np.concatenate(sizes)[kept], GROUP_BYTES, GROUP_ROWS)).tolist()
        if job["file"]
        else []
    )

    def tables() -> Iterator[pa.Table]:
        at = 0
        for (path, judged, _), span in zip(job["parts"], spans, strict=True):
            for read, verdict in zip(
                iterate_batches_of_file(path, *span),
                iterate_batches_of_file(judged, *span),
                strict=True,
            ):
                here, at = slice(at, at + len(read)), at + len(read)
                text, meta = (
                    pc.coalesce(verdict.column(f"new.{name}"), read.column(name))
                    for name in ("text", "meta")
                )
                if len(
                    cuts_here := cut[
                        slice(*np.searchsorted(cut["row"], [first + here.start, first + here.stop]))
                    ]
                ):
                    text = remove_repeats(text, cuts_here, first + here.start)
                name = pa.DictionaryArray.from_arrays(
                    pa.array(np.zeros(len(read), np.int32)), pa.array([job["name"]])
                ).cast(pa.string())
                table = pa.table(
                    [read.column("id"), name, text, verdict.column("new.prompt_chars"), meta],
                    CORPUS_SCHEMA,
                )
                tell_of(table, verdict.column("reason"), decided[here], first + here.start)
                advance(len(read))
                yield table.filter(pa.array(kept[here]))

    def tell_of(table: pa.Table, reasons: pa.Array, fell_to: np.ndarray, start: int) -> None:
        stop = start + len(table)
        told["ids"] |= {
            row: table["id"][row - start].as_py() for row in job["named"] if start <= row < stop
        }
        for row in (row for row in job["shown"] if start <= row < stop):
            [sample] = table.slice(row - start, 1).to_pylist()
            told["samples"][row] = {
                **sample,
                "text": sample["text"][:SAMPLE_CHARS],
                "reason": reasons[row - start].as_py(),
            }
        for k in (
            k
            for k, rule in enumerate(rules)
            if rule.name == "decontaminate" and job["side"] == "train"
        ):
            for i in np.flatnonzero(fell_to == k).tolist():
                id, source, text = (table[name][i].as_py() for name in ("id", "source", "text"))
                told["contaminated"] += [
                    {"id": id, "source": source, "task": item.task, "item": item.id, "words": words}
                    for item, words in index.find_matches(text)
                ]

    if job["file"]:
        with jobs.open_atomic(
            pathlib.Path(job["file"]), pathlib.Path(job["to"]).parent
        ) as temporary:
            write_row_groups(temporary, tables(), groups)
    else:
        collections.deque(tables(), maxlen=0)
    jobs.write_job_result(job, [pathlib.Path(job["file"])] if job["file"] else [], **told)
    return stop - first


def remove_repeats(texts: pa.Array, cuts: np.ndarray, start: int) -> pa.Array:
    """The texts of the rows from `start` on without the paragraphs that are cut."""
    found = texts.to_pylist()
    for here in np.split(cuts, np.flatnonzero(np.diff(cuts["row"])) + 1):
        i = int(here["row"][0]) - start
        found[i] = paragraphs.remove_spans(found[i], here)
    return pa.array(found, pa.string())


def write_row_groups(file: pathlib.Path, tables: Iterator[pa.Table], groups: list[int]) -> None:
    """A parquet shard with row groups of so many rows. Each is one piece in memory, or its bytes would depend on how it came."""
    with pq.ParquetWriter(
        file, CORPUS_SCHEMA, compression="zstd", use_dictionary=["source", "meta"]
    ) as out:
        waiting = CORPUS_SCHEMA.empty_table()
        for n in groups:
            while len(waiting) < n:
                waiting = pa.concat_tables([waiting, next(tables)])
            out.write_table(waiting.slice(0, n).combine_chunks(), row_group_size=n)
            waiting = waiting.slice(n)
        collections.deque(
            tables, maxlen=0
        )  # the rest has rows of the other side, but may hold what is told of single ones


# ---- the funnel


def estimate_token_bytes(
    rows: DocumentTable, words: tokenizer.Tokenizer | None
) -> dict[str, float]:
    """Bytes that make a token of each source: TOKEN_BYTES, or what a sample makes under the tokenizer that the config names."""
    found = dict.fromkeys(rows.names, float(TOKEN_BYTES))
    for k, name in enumerate(rows.names if words else []):
        file = next(file for file in rows.files if file.source == k)
        texts = next(iterate_batches_of_file(file.path)).column("text").to_pylist()
        n_tokens = sum(map(len, words.encode_batch(texts)))
        found[name] = sum(len(text.encode()) for text in texts) / max(1, n_tokens)
    return found


def build_funnel(
    rows: DocumentTable,
    rules: Sequence[filters.Rule],
    dropped_by: np.ndarray,
    repeated: paragraphs.RepeatedParagraphs | None,
    token_bytes: dict[str, float],
) -> dict[str, Any]:
    """The funnel: what was read, what was left after each rule and how often the rule edited it, and what went to each side, for each source."""
    n = len(rules)
    left = [{name: np.zeros(3, np.int64) for name in rows.names} for _ in range(n + 1)]
    edits = [dict.fromkeys(rows.names, 0) for _ in rules]
    sides = {
        side: {name: np.zeros(3, np.int64) for name in rows.names} for side in ("heldout", "train")
    }
    edited = [
        f"{k}.{what}"
        for k, rule in enumerate(rules)
        if rule.edit
        for what in ("edits", "chars", "bytes")
    ]
    for here, source, chars, size, split, *after in rows.iterate_files(
        "chars", "bytes", "split", *edited
    ):
        after, name, fell_to = (
            dict(zip(edited, after, strict=True)),
            rows.names[source],
            dropped_by[here],
        )
        for k in range(n + 1):
            mask = fell_to >= k
            if k and rules[k - 1].edit:
                edits[k - 1][name] += int(after[f"{k - 1}.edits"][mask].sum())
                chars, size = after[f"{k - 1}.chars"], after[f"{k - 1}.bytes"]
            elif k and rules[k - 1].name == PARAGRAPHS:
                n_cut, *gone = repeated.repeated_chars[here].T
                edits[k - 1][name] += int(n_cut[mask].sum())
                chars, size = chars - gone[0], size - gone[1]
            left[k][name] += [mask.sum(), chars[mask].sum(), size[mask].sum()]
        for side in sides:
            mask = is_kept(fell_to, split, side, n, rows.heldout)
            sides[side][name] += [mask.sum(), chars[mask].sum(), size[mask].sum()]

    def amounts(found: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
        told = {
            name: dict(zip(("rows", "chars", "bytes"), map(int, each), strict=True))
            for name, each in found.items()
        }
        return {
            name: {**each, "tokens": round(each["bytes"] / token_bytes[name])}
            for name, each in told.items()
        }

    steps = [{"rule": "read", "kept": amounts(left[0])}]
    for k, rule in enumerate(rules):
        steps.append(
            {
                "rule": rule.name,
                "kept": amounts(left[k + 1]),
                **({"edits": edits[k]} if rule.edit or rule.name == PARAGRAPHS else {}),
            }
        )
    return {
        "sources": rows.names,
        "steps": steps,
        **{side: amounts(found) for side, found in sides.items()},
    }


def format_funnel(funnel: dict[str, Any]) -> str:
    """The funnel as a small table: documents and MB left after each rule, a column a source."""
    lines = [(step["rule"], step["kept"]) for step in funnel["steps"]] + [
        (side, funnel[side]) for side in ("train", "heldout")
    ]
    cells = [["left after", *funnel["sources"]]]
    cells += [
        [
            rule,
            *(
                f"{kept[name]['rows']:,} docs {kept[name]['bytes'] / 1e6:8.2f} MB"
                for name in funnel["sources"]
            ),
        ]
        for rule, kept in lines
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  " + "   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in cells
    )
