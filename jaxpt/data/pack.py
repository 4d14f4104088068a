"""Documents to rows of token ids.

Every row exactly seq_len long, every token of the corpus in one row.

    best_fit   bos + ids + eos per document. A document of up to seq_len tokens is never cut; a
    longer one becomes full rows and one
               rest. Whole documents and rests fill rows by best-fit-decreasing within a window of
               the corpus; what stays open is padding.
    course     bos + ids + eos of all documents of a source, concatenated, cut every seq_len tokens;
    the last partial row is dropped.

Two passes, each cut into jobs: tokenize a stretch of the corpus; fill the rows of one Arrow shard.
What a job does depends on the corpus
and the tokenizer alone, so that any number of workers, here or on a cluster, gives the same rows,
and a killed run goes on with the jobs
that were not done. `datasets.load_from_disk` opens the shards; `jaxpt.data.loader` maps them into
memory.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.data import executor, tokenizer
from jaxpt.spec import Manifest, UserError

log = logging.getLogger(__name__)

WINDOW_SEGMENTS = 2**16  # that best-fit sees at once, and
WINDOW_TOKENS = 2**25  # the tokens in them: 128 MB of ids
MAX_ENCODE_CHARS = (
    2**23
)  # encoded at once; the tokenizers library holds about 100 bytes per token meanwhile
JOB_BYTES = 2**25  # of text that a job tokenizes, about
MAX_BYTES_IN_PROCESS = 2**24  # of text up to which no other process is started: that takes longer
SHARD_BYTES = (
    2**28
)  # of ids in a shard of the course's stream; best-fit makes a shard of each window
BATCH_TOKENS = 2**18  # in an Arrow record batch
# beside the shards: [record batches, 5] int64 of shard, first byte, bytes, rows, CRC-32 of the
# bytes
INDEX_SCHEMA = "batches.npy"
DOCUMENT_END = b"\xff\xff\xff\xff" + bytes(
    4
)  # of a stream of Arrow messages, the form that datasets wants
TOKEN_SCHEMA = pa.schema({"id": pa.string(), "ids": pa.list_(pa.int32()), "loss_from": pa.int32()})


def packed_schema(seq_len: int) -> pa.Schema:
    """Of the shards."""
    integers = pa.list_(pa.int32())
    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32(), seq_len),
            "doc_lens": integers,
            "doc_ids": pa.list_(pa.string()),
            "loss_from": integers,
        }
    )


def pack_corpus(settings: config.Config, workdir: pathlib.Path, replace: bool = False) -> Manifest:
    """Make WORKDIR/packed from WORKDIR/corpus and WORKDIR/tokenizer.

    The rows and their order depend on nothing else.

    Raises UserError where a source has less text than one row.
    """
    workdir = stage.local_path(workdir)
    inputs = {"corpus": workdir / "corpus", "tokenizer": workdir / "tokenizer"}
    opened = tokenizer.load_tokenizer(inputs["tokenizer"])
    asked = {
        "seq_len": settings.pack.seq_len,
        "method": settings.pack.method,
        "vocab_size": opened.vocab_size,
    }

    def work(out: pathlib.Path) -> dict[str, Any]:
        out, found = (
            out.resolve(),
            {
                split: tokenizer.list_corpus_files(inputs["corpus"].resolve(), split)
                for split in ("train", "heldout")
            },
        )
        n_bytes = 0
        for file in (
            file for sources in found.values() for files in sources.values() for file in files
        ):
            with open_corpus_file(file):
                n_bytes += tokenizer.count_text_bytes(file)
        where = settings.prepare.executor if n_bytes > MAX_BYTES_IN_PROCESS else "here"
        jobs = out / ".jobs"
        checksums = {
            str(inputs["corpus"].resolve() / name): value
            for name, value in Manifest.load(inputs["corpus"]).outputs.items()
        }
        parts = {
            (split, name): tokenize_corpus(
                files, checksums, inputs["tokenizer"].resolve(), jobs / split / name
            )
            for split, sources in found.items()
            for name, files in sources.items()
        }
        run_pack_jobs(
            where,
            tokenize_shard,
            [job for each in parts.values() for job in each],
            "tokenizing",
            "documents",
        )
        shards = {
            key: fill_sequences(each, out.joinpath(*key), jobs.joinpath(*key), **asked)
            for key, each in parts.items()
        }
        run_pack_jobs(
            where, fill_shard, [job for each in shards.values() for job in each], "packing", "rows"
        )
        counts = {**asked, "train": {}, "heldout": {}}
        for split, name in parts:
            if shards[split, name]:
                counts[split][name] = gather_shards(
                    *(list(map(read_pack_counts, each[split, name])) for each in (parts, shards)),
                    out / split / name,
                    **asked,
                )
            elif split == "train":
                raise UserError(
                    f"pack: source {name} has less than one row of "
                    f"{asked['seq_len']} tokens. Lower pack.seq_len, or "
                    "prepare more text."
                )
        shutil.rmtree(jobs)
        return counts

    manifest = stage.run_stage(
        "pack",
        workdir / "packed",
        work,
        config=stage.to_jsonable(settings.pack),
        inputs=inputs,
        tokenizer=opened.fingerprint,
        replace=replace,
    )
    for split in ("train", "heldout"):
        for name, found in manifest.counts[split].items():
            log.info(
                f"pack: {split}/{name}: {found['rows']:,} rows of "
                f"{asked['seq_len']:,}, {found['tokens']:,} tokens, "
                f"{found['padding_frac']:.2%} padding, "
                f"{found['cut_documents']:,} of {found['documents']:,} "
                "documents cut"
            )
    return manifest


def run_pack_jobs(
    where: str, work: Callable[[dict], dict], jobs: list[dict], label: str, unit: str
) -> None:
    """Do the jobs that no earlier, killed run has done.

    The file job["done"] holds what a job has counted.
    """
    left = [job for job in jobs if not pathlib.Path(job["done"]).exists()]
    # a process a core: the tokenizers library's own threads would only get in each other's way
    threads = "false" if where != "here" and len(left) >= (os.cpu_count() or 1) else "true"
    left = [{**job, "threads": os.environ.get("TOKENIZERS_PARALLELISM", threads)} for job in left]
    with stage.progress_bar(label, None, unit) as advance:
        for counts in map(work, left) if where == "here" else executor.map_jobs(where, work, left):
            advance(counts[unit])


def read_pack_counts(job: dict) -> dict[str, Any]:
    """Return the counts that a job wrote."""
    return json.loads(pathlib.Path(job["done"]).read_text())


# ---- first pass: tokens


class Segment(NamedTuple):
    """A document or a part of one, as it stands in a row."""

    ids: np.ndarray  # int32
    document: str
    part: int = 0  # 0, 1, ... of its document
    loss_from: int = 0  # its first trained token; those before it are a prompt's

    def split(self, start: int, stop: int, part: int) -> Segment:
        """Return a part of the segment."""
        ids = self.ids[start:stop]
        return Segment(ids, self.document, part, min(max(self.loss_from - start, 0), len(ids)))


def tokenize_corpus(
    files: Sequence[pathlib.Path],
    checksums: dict[str, str],
    opened: pathlib.Path,
    jobs: pathlib.Path,
) -> list[dict]:
    """Jobs for `tokenize`.

    Row groups of the files of one source, about JOB_BYTES each, in the corpus's order.
    """
    found: list[dict] = []
    for file in files:
        footer, room = pq.ParquetFile(file).metadata, 0
        for group in range(footer.num_row_groups):
            if room <= 0:
                room, to = JOB_BYTES, jobs / f"tokens-{len(found):06d}.arrow"
                whole = (
                    None if group else checksums.get(str(file))
                )  # the first job of a file looks whether it is whole
                found.append(
                    {
                        "file": str(file),
                        "sha256": whole,
                        "groups": [],
                        "tokenizer": str(opened),
                        "to": str(to),
                        "done": f"{to}.json",
                    }
                )
            found[-1]["groups"].append(group)
            room -= tokenizer.count_text_bytes(file, group)
    return found


def tokenize_shard(job: dict) -> dict[str, int]:
    """A stretch of the corpus to an Arrow stream of its documents' ids, each bos + ids + eos."""
    os.environ["TOKENIZERS_PARALLELISM"] = job["threads"]
    opened, file, to = (
        load_tokenizer(job["tokenizer"]),
        pathlib.Path(job["file"]),
        pathlib.Path(job["to"]),
    )
    if job["sha256"] and stage.sha256_file(file) != job["sha256"]:
        raise UserError(
            f"{file}: its checksum is not the manifest's: it was changed or "
            "damaged. Run prepare.py again with --replace."
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    n_documents = n_bytes = 0
    with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_stream(sink, TOKEN_SCHEMA) as stream:
        for names, texts, prompt_chars in split_row_groups(file, job["groups"]):
            ids, n_prompt = opened.encode_documents(texts, prompt_chars)
            lengths = np.cumsum([0, *map(len, ids)])
            flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths[-1])
            columns = [
                pa.array(names, pa.string()),
                pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), flat),
                pa.array(n_prompt, pa.int32()),
            ]
            stream.write_batch(pa.record_batch(columns, schema=TOKEN_SCHEMA))
            n_documents += len(texts)
            n_bytes += sum(len(text.encode()) for text in texts)
    return finish_job(job, {"documents": n_documents, "bytes": n_bytes})


load_tokenizer = functools.lru_cache(maxsize=1)(tokenizer.load_tokenizer)  # a worker does many jobs


def finish_job(job: dict, counts: dict) -> dict:
    """Write the counts of a job."""
    stage.write_atomic(pathlib.Path(job["done"]), json.dumps(counts))
    return counts


def split_row_groups(
    file: pathlib.Path, groups: list[int]
) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """Ids, texts and prompt lengths of row groups of a parquet file, about ENCODE_CHARS characters
    at a time. Raises UserError naming it.
    """
    held, n_chars, columns = [], 0, ["id", "text", "prompt_chars"]
    with open_corpus_file(file):
        for batch in pq.ParquetFile(file).iter_batches(
            batch_size=256, row_groups=groups, columns=columns
        ):
            for document in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                held.append(document)
                n_chars += len(document[1])
                if n_chars >= MAX_ENCODE_CHARS:
                    yield tuple(map(list, zip(*held, strict=True)))
                    held, n_chars = [], 0
    if held:
        yield tuple(map(list, zip(*held, strict=True)))


@contextlib.contextmanager
def open_corpus_file(file: pathlib.Path) -> Iterator[None]:
    """Raise errors of a corpus file as UserError."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{file}: cannot be read as a shard of a corpus ({line}). Run "
            "prepare.py again with --replace."
        ) from None


# ---- second pass: rows


def fill_sequences(
    tokens: list[dict],
    out: pathlib.Path,
    jobs: pathlib.Path,
    *,
    seq_len: int,
    method: str,
    vocab_size: int,
) -> list[dict]:
    """Jobs for `fill_shard`, one a shard, in the order of their rows.

    Windows of documents, or stretches of the course's stream.
    """
    lengths = [read_lengths(job["to"]) for job in tokens]
    starts = np.cumsum([0, *map(len, lengths)])  # the first document of each file
    lengths = np.concatenate(lengths)
    ends = np.cumsum(lengths)  # in the stream of all tokens
    if method == "best_fit":
        stretches = [(first, last, {}) for first, last in split_windows(lengths, seq_len)]
    else:
        n_rows, at_once = (
            (int(ends[-1]) if len(ends) else 0) // seq_len,
            max(1, SHARD_BYTES // (4 * seq_len)),
        )
        stretches = []
        for row in range(0, n_rows, at_once):
            rows = min(at_once, n_rows - row)
            first, last = np.searchsorted(
                ends, [row * seq_len, (row + rows) * seq_len - 1], side="right"
            ).tolist()
            stretches.append(
                (
                    first,
                    last + 1,
                    {
                        "position": int(ends[first] - lengths[first]),
                        "first_row": row,
                        "n_rows": rows,
                    },
                )
            )
    found = []
    for k, (first, last, stretch) in enumerate(stretches):
        files = range(bisect.bisect_right(starts, first) - 1, bisect.bisect_left(starts, last))
        parts = [
            (tokens[i]["to"], max(first - int(starts[i]), 0), last - int(starts[i])) for i in files
        ]
        to = out / f"data-{k:05d}.arrow"
        found.append(
            {
                "documents": parts,
                "to": str(to),
                "done": str(jobs / f"{to.name}.json"),
                "seq_len": seq_len,
                "method": method,
                "vocab_size": vocab_size,
                **stretch,
            }
        )
    return found


def read_lengths(tokens: str) -> np.ndarray:
    """Tokens of each document of a file that `tokenize` wrote."""
    batches = pa.ipc.open_stream(pa.memory_map(tokens))
    return np.concatenate(
        [
            np.zeros(0, np.int64),
            *(np.diff(batch.column("ids").offsets.to_numpy()) for batch in batches),
        ]
    )


def split_windows(lengths: np.ndarray, seq_len: int) -> list[tuple[int, int]]:
    """Stretches of documents that best-fit sees at once.

    Of WINDOW_PIECES pieces or WINDOW_TOKENS tokens, or somewhat more.
    """
    pieces, tokens = np.cumsum(-(-lengths // seq_len)), np.cumsum(lengths)
    found, first = [], 0
    while first < len(lengths):
        before = (pieces[first - 1], tokens[first - 1]) if first else (0, 0)
        full = min(
            np.searchsorted(pieces, before[0] + WINDOW_SEGMENTS),
            np.searchsorted(tokens, before[1] + WINDOW_TOKENS),
        )
        last = min(int(full) + 1, len(lengths))
        found.append((first, last))
        first = last
    return found


def fill_shard(job: dict) -> dict[str, Any]:
    """Put documents into rows, and the rows into one Arrow shard."""
    documents = (piece for part in job["documents"] for piece in read_documents(*part))
    if job["method"] == "best_fit":
        rows = pack_best_fit(documents, job["seq_len"])
    else:
        rows = itertools.islice(
            pack_course(documents, job["seq_len"], job["position"], job["first_row"]), job["n_rows"]
        )
    return finish_job(
        job, write_sequences(rows, pathlib.Path(job["to"]), job["seq_len"], job["vocab_size"])
    )


def read_documents(tokens: str, first: int, last: int) -> Iterator[Segment]:
    """Documents `first` up to `last` of a file that `tokenize` wrote."""
    start = 0
    for batch in pa.ipc.open_stream(pa.memory_map(tokens)):
        part = batch.slice(max(first - start, 0), max(last - max(first, start), 0))
        start += len(batch)
        offsets, flat = part.column("ids").offsets.to_numpy(), part.column("ids").values.to_numpy()
        for i, (document, loss_from) in enumerate(
            zip(part.column("id").to_pylist(), part.column("loss_from").to_pylist(), strict=True)
        ):
            yield Segment(flat[offsets[i] : offsets[i + 1]], document, 0, loss_from)


# ---- which pieces share a row


def pack_best_fit(documents: Iterable[Segment], seq_len: int) -> Iterator[list[Segment]]:
    """Rows of whole documents, best-fit-decreasing.

    Each piece, longest first, goes into the fullest row that still has room for it. Documents
    longer than a row are cut into full rows and one rest.

    Rows come out in the order of their first pieces in the corpus, so that no stretch of them is
    all long or all short documents.
    """
    pieces = [
        document.split(start, start + seq_len, part)
        for document in documents
        for part, start in enumerate(range(0, len(document.ids), seq_len))
    ]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room -> rows with that room
    rooms: list[int] = []  # the keys of open_rows, sorted
    lengths = np.array([len(piece.ids) for piece in pieces])
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = len(pieces[i].ids)
        k = bisect.bisect_left(rooms, length)
        if k == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[k]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[k]
        rows[row].append(i)
        if room := room - length:
            if room not in open_rows:
                bisect.insort(rooms, room)
                open_rows[room] = []
            open_rows[room].append(row)
    for row in sorted(sorted(row) for row in rows):
        yield [pieces[i] for i in row]


def pack_course(
    documents: Iterable[Segment], seq_len: int, position: int = 0, first_row: int = 0
) -> Iterator[list[Segment]]:
    """Rows as the course packs them, from first_row on.

    One stream of tokens, cut; `position` is the first document's place in it.

    Source: "Pretraining LLMs", lesson 3.
    """
    row: list[Segment] = []
    for document in documents:
        start, stop = position, position + len(document.ids)
        while position < stop:
            border = (position // seq_len + 1) * seq_len
            if position >= first_row * seq_len:
                row.append(
                    document.split(
                        position - start, border - start, position // seq_len - start // seq_len
                    )
                )
            position = min(border, stop)
            if position == border and row:
                yield row
                row = []


# ---- rows on disk


def write_sequences(
    rows: Iterable[list[Segment]], file: pathlib.Path, seq_len: int, vocab_size: int
) -> dict[str, Any]:
    """Write rows as one shard and count them.

    frequencies  of the trained tokens, {id: times}: all but the first of each piece and the prompts
    batches      [first byte, bytes, rows, CRC-32] of each record batch in the file
    """
    rows, batch_size = iter(rows), max(1, BATCH_TOKENS // seq_len)
    n_tokens = n_cut = n_rows = 0
    frequencies = np.zeros(vocab_size, np.int64)
    batches: list[list[int]] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as sink:
        sink.write(packed_schema(seq_len).serialize())
        while group := list(itertools.islice(rows, batch_size)):
            message = make_record_batch(group, seq_len).serialize()
            batches.append([sink.tell(), len(message), len(group), zlib.crc32(message)])
            sink.write(message)
            pieces = [piece for row in group for piece in row]
            n_rows += len(group)
            n_tokens += sum(len(piece.ids) for piece in pieces)
            n_cut += sum(piece.part == 1 for piece in pieces)
            frequencies += np.bincount(
                np.concatenate([piece.ids[max(1, piece.loss_from) :] for piece in pieces]),
                minlength=vocab_size,
            )
        sink.write(DOCUMENT_END)
    seen = np.flatnonzero(frequencies)
    return {
        "file": file.name,
        "rows": n_rows,
        "bytes": file.stat().st_size,
        "tokens": n_tokens,
        "cut_documents": n_cut,
        "batches": batches,
        "frequencies": dict(zip(seen.tolist(), frequencies[seen].tolist(), strict=True)),
    }


def make_record_batch(rows: list[list[Segment]], seq_len: int) -> pa.RecordBatch:
    """Return sequences as an Arrow record batch."""
    ids = np.zeros((len(rows), seq_len), np.int32)  # padding is 0 and stands at the end
    for filled, row in zip(ids, rows, strict=True):
        np.concatenate(
            [piece.ids for piece in row], out=filled[: sum(len(piece.ids) for piece in row)]
        )
    offsets = pa.array(np.cumsum([0, *(len(row) for row in rows)]), pa.int32())
    lengths = pa.array([len(piece.ids) for row in rows for piece in row], pa.int32())
    names = pa.array([piece.document for row in rows for piece in row], pa.string())
    loss_from = pa.array([piece.loss_from for row in rows for piece in row], pa.int32())
    lists = (pa.ListArray.from_arrays(offsets, values) for values in (lengths, names, loss_from))
    return pa.record_batch(
        [pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), seq_len), *lists],
        schema=packed_schema(seq_len),
    )


def gather_shards(
    texts: list[dict],
    shards: list[dict],
    out: pathlib.Path,
    *,
    seq_len: int,
    method: str,
    vocab_size: int,
) -> dict[str, Any]:
    """Make the shards of a source one directory for `datasets.load_from_disk`, with an index of its
    record batches, and add up its counts:
    what `tokenize` and `write` found.

    unigram_nats is the entropy of the trained tokens' own frequencies: the loss of a model that has
    learnt these and nothing else.
    """
    frequencies = np.zeros(vocab_size, np.int64)
    for shard in shards:
        frequencies[list(map(int, shard["frequencies"]))] += list(shard["frequencies"].values())
    np.save(
        out / INDEX_SCHEMA,
        np.array(
            [[k, *batch] for k, shard in enumerate(shards) for batch in shard["batches"]], np.int64
        ),
    )
    describe_packed(out, seq_len, [shard["file"] for shard in shards])
    if method == "course":
        write_course_sequences(out, shards, seq_len)
    n_rows, n_tokens = (sum(shard[name] for shard in shards) for name in ("rows", "tokens"))
    shares = frequencies[frequencies > 0] / max(1, frequencies.sum())
    return {
        "documents": sum(each["documents"] for each in texts),
        "rows": n_rows,
        "tokens": n_tokens,
        "trained_tokens": int(frequencies.sum()),
        "cut_documents": sum(shard["cut_documents"] for shard in shards),
        "padding_frac": 1 - n_tokens / (n_rows * seq_len),
        "unigram_nats": float(-(shares * np.log(shares)).sum()),
        "bytes": sum(each["bytes"] for each in texts),
        "shards": [{name: shard[name] for name in ("file", "rows", "bytes")} for shard in shards],
    }


def write_course_sequences(out: pathlib.Path, shards: list[dict], seq_len: int) -> None:
    """The rows again as the one parquet file that the course's lesson 3 writes and lesson 5 reads.

    A column input_ids.
    """
    lesson = pa.schema({"input_ids": pa.list_(pa.int32())})
    with pq.ParquetWriter(out / "packaged_pretrain_dataset.parquet", lesson) as writer:
        for shard in shards:
            for batch in pa.ipc.open_stream(pa.memory_map(str(out / shard["file"]))):
                writer.write_batch(
                    pa.record_batch(
                        [batch.column("input_ids").cast(lesson.field(0).type)], schema=lesson
                    )
                )


def describe_packed(out: pathlib.Path, seq_len: int, files: list[str]) -> None:
    """The two JSON files without which `datasets.load_from_disk` opens nothing.

    It needs every key of them.
    """
    integer, string = ({"dtype": dtype, "_type": "Value"} for dtype in ("int32", "string"))
    lists = {"doc_lens": integer, "doc_ids": string, "loss_from": integer}
    features = {"input_ids": {"feature": integer, "length": seq_len, "_type": "List"}}
    features |= {name: {"feature": of, "_type": "List"} for name, of in lists.items()}
    state = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": stage.fingerprint([out.name, files]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (out / "dataset_info.json").write_text(json.dumps({"features": features}, indent=1) + "\n")
    (out / "state.json").write_text(json.dumps(state, indent=1) + "\n")
