"""Documents to rows of token ids: every row exactly row_len long, every token of the corpus in one row.

    best_fit   bos + ids + eos per document. A document of up to row_len tokens is never cut; a longer one becomes full rows and one
               rest. Whole documents and rests fill rows by best-fit-decreasing within a window of the corpus; what stays open is padding.
    course     bos + ids + eos of all documents of a source, concatenated, cut every row_len tokens; the last partial row is dropped.

Two passes, each cut into jobs: tokenize a stretch of the corpus; fill the rows of one Arrow shard. What a job does depends on the corpus
and the tokenizer alone, so that any number of workers, here or on a cluster, gives the same rows, and a killed run goes on with the jobs
that were not done. `datasets.load_from_disk` opens the shards; `jaxpt.data.loader` maps them into memory.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
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
from jaxpt.data import engine, tokenizer
from jaxpt.spec import Manifest, UserError

WINDOW_PIECES = 2**16  # that best-fit sees at once, and
WINDOW_TOKENS = 2**25  # the tokens in them: 128 MB of ids
ENCODE_CHARS = 2**23  # encoded at once; the tokenizers library holds about 100 bytes a token meanwhile
JOB_BYTES = 2**25  # of text that a job tokenizes, about
HERE_BYTES = 2**24  # of text up to which no other process is started: that takes longer
SHARD_BYTES = 2**28  # of ids in a shard of the course's stream; best-fit makes a shard of each window
BATCH_TOKENS = 2**18  # in an Arrow record batch
INDEX = "batches.npy"  # beside the shards: [record batches, 5] int64 of shard, first byte, bytes, rows, CRC-32 of the bytes
END = b"\xff\xff\xff\xff" + bytes(4)  # of a stream of Arrow messages, the form that datasets wants
TOKENS = pa.schema({"id": pa.string(), "ids": pa.list_(pa.int32()), "loss_from": pa.int32()})


def schema(row_len: int) -> pa.Schema:
    """Of the shards."""
    integers = pa.list_(pa.int32())
    return pa.schema({"input_ids": pa.list_(pa.int32(), row_len), "doc_lens": integers, "doc_ids": pa.list_(pa.string()), "loss_from": integers})


def run(settings: config.Config, workdir: pathlib.Path, replace: bool = False) -> Manifest:
    """Make WORKDIR/packed from WORKDIR/corpus and WORKDIR/tokenizer. The rows and their order depend on nothing else.

    Raises UserError where a source has less text than one row.
    """
    workdir = stage.local_path(workdir)
    inputs = {"corpus": workdir / "corpus", "tokenizer": workdir / "tokenizer"}
    opened = tokenizer.load(inputs["tokenizer"])
    asked = {"row_len": settings.pack.row_len, "method": settings.pack.method, "n_pieces": opened.n_pieces}

    def work(out: pathlib.Path) -> dict[str, Any]:
        out, found = out.resolve(), {split: tokenizer.corpus_files(inputs["corpus"].resolve(), split) for split in ("train", "heldout")}
        n_bytes = 0
        for file in (file for sources in found.values() for files in sources.values() for file in files):
            with readable(file):
                n_bytes += tokenizer.text_bytes(file)
        where = settings.prepare.engine if n_bytes > HERE_BYTES else "here"
        jobs = out / ".jobs"
        checksums = {str(inputs["corpus"].resolve() / name): value for name, value in Manifest.load(inputs["corpus"]).outputs.items()}
        parts = {
            (split, name): tokenizing(files, checksums, inputs["tokenizer"].resolve(), jobs / split / name)
            for split, sources in found.items() for name, files in sources.items()
        }  # fmt: skip
        finish(where, tokenize, [job for each in parts.values() for job in each], "tokenizing", "documents")
        shards = {key: filling(each, out.joinpath(*key), jobs.joinpath(*key), **asked) for key, each in parts.items()}
        finish(where, fill_shard, [job for each in shards.values() for job in each], "packing", "rows")
        counts = {**asked, "train": {}, "heldout": {}}
        for split, name in parts:
            if shards[split, name]:
                counts[split][name] = gather(*(list(map(counted, each[split, name])) for each in (parts, shards)), out / split / name, **asked)
            elif split == "train":
                raise UserError(f"pack: source {name} has less than one row of {asked['row_len']} tokens. Lower pack.row_len, or prepare more text.")
        shutil.rmtree(jobs)
        return counts

    manifest = stage.run(
        "pack", workdir / "packed", work, config=stage.plain(settings.pack), inputs=inputs, tokenizer=opened.fingerprint, replace=replace
    )
    for split in ("train", "heldout"):
        for name, found in manifest.counts[split].items():
            stage.say(
                f"pack: {split}/{name}: {found['rows']:,} rows of {asked['row_len']:,}, {found['tokens']:,} tokens, "
                f"{found['padding_frac']:.2%} padding, {found['cut_documents']:,} of {found['documents']:,} documents cut"
            )
    return manifest


def finish(where: str, work: Callable[[dict], dict], jobs: list[dict], label: str, unit: str) -> None:
    """Do the jobs that no earlier, killed run has done: the file job["done"] holds what a job has counted."""
    left = [job for job in jobs if not pathlib.Path(job["done"]).exists()]
    # a process a core: the tokenizers library's own threads would only get in each other's way
    threads = "false" if where != "here" and len(left) >= (os.cpu_count() or 1) else "true"
    left = [{**job, "threads": os.environ.get("TOKENIZERS_PARALLELISM", threads)} for job in left]
    with stage.progress(label, None, unit) as advance:
        for counts in map(work, left) if where == "here" else engine.each(where, work, left):
            advance(counts[unit])


def counted(job: dict) -> dict[str, Any]:
    return json.loads(pathlib.Path(job["done"]).read_text())


# ---- first pass: tokens


class Piece(NamedTuple):
    """A document or a part of one, as it stands in a row."""

    ids: np.ndarray  # int32
    document: str
    part: int = 0  # 0, 1, ... of its document
    loss_from: int = 0  # its first trained token; those before it are a prompt's

    def cut(self, start: int, stop: int, part: int) -> Piece:
        ids = self.ids[start:stop]
        return Piece(ids, self.document, part, min(max(self.loss_from - start, 0), len(ids)))


def tokenizing(files: Sequence[pathlib.Path], checksums: dict[str, str], opened: pathlib.Path, jobs: pathlib.Path) -> list[dict]:
    """Jobs for `tokenize`: row groups of the files of one source, about JOB_BYTES each, in the corpus's order."""
    found: list[dict] = []
    for file in files:
        footer, room = pq.ParquetFile(file).metadata, 0
        for group in range(footer.num_row_groups):
            if room <= 0:
                room, to = JOB_BYTES, jobs / f"tokens-{len(found):06d}.arrow"
                whole = None if group else checksums.get(str(file))  # the first job of a file looks whether it is whole
                found.append({"file": str(file), "sha256": whole, "groups": [], "tokenizer": str(opened), "to": str(to), "done": f"{to}.json"})
            found[-1]["groups"].append(group)
            room -= tokenizer.text_bytes(file, group)
    return found


def tokenize(job: dict) -> dict[str, int]:
    """A stretch of the corpus to an Arrow stream of its documents' ids, each bos + ids + eos."""
    os.environ["TOKENIZERS_PARALLELISM"] = job["threads"]
    opened, file, to = load_tokenizer(job["tokenizer"]), pathlib.Path(job["file"]), pathlib.Path(job["to"])
    if job["sha256"] and stage.sha256(file) != job["sha256"]:
        raise UserError(f"{file}: its checksum is not the manifest's: it was changed or damaged. Run prepare.py again with --replace.")
    to.parent.mkdir(parents=True, exist_ok=True)
    n_documents = n_bytes = 0
    with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_stream(sink, TOKENS) as stream:
        for names, texts, prompt_chars in portions(file, job["groups"]):
            ids, n_prompt = opened.encode_documents(texts, prompt_chars)
            lengths = np.cumsum([0, *map(len, ids)])
            flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths[-1])
            columns = [pa.array(names, pa.string()), pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), flat), pa.array(n_prompt, pa.int32())]
            stream.write_batch(pa.record_batch(columns, schema=TOKENS))
            n_documents += len(texts)
            n_bytes += sum(len(text.encode()) for text in texts)
    return done(job, {"documents": n_documents, "bytes": n_bytes})


load_tokenizer = functools.lru_cache(maxsize=1)(tokenizer.load)  # a worker does many jobs


def done(job: dict, counts: dict) -> dict:
    stage.write_whole(pathlib.Path(job["done"]), json.dumps(counts))
    return counts


def portions(file: pathlib.Path, groups: list[int]) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """Ids, texts and prompt lengths of row groups of a parquet file, about ENCODE_CHARS characters at a time. Raises UserError naming it."""
    held, n_chars, columns = [], 0, ["id", "text", "prompt_chars"]
    with readable(file):
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, row_groups=groups, columns=columns):
            for document in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                held.append(document)
                n_chars += len(document[1])
                if n_chars >= ENCODE_CHARS:
                    yield tuple(map(list, zip(*held, strict=True)))
                    held, n_chars = [], 0
    if held:
        yield tuple(map(list, zip(*held, strict=True)))


@contextlib.contextmanager
def readable(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: cannot be read as a shard of a corpus ({line}). Run prepare.py again with --replace.") from None


# ---- second pass: rows


def filling(tokens: list[dict], out: pathlib.Path, jobs: pathlib.Path, *, row_len: int, method: str, n_pieces: int) -> list[dict]:
    """Jobs for `fill_shard`, one a shard, in the order of their rows: windows of documents, or stretches of the course's stream."""
    lengths = [lengths_of(job["to"]) for job in tokens]
    starts = np.cumsum([0, *map(len, lengths)])  # the first document of each file
    lengths = np.concatenate(lengths)
    ends = np.cumsum(lengths)  # in the stream of all tokens
    if method == "best_fit":
        stretches = [(first, last, {}) for first, last in windows(lengths, row_len)]
    else:
        n_rows, at_once = (int(ends[-1]) if len(ends) else 0) // row_len, max(1, SHARD_BYTES // (4 * row_len))
        stretches = []
        for row in range(0, n_rows, at_once):
            rows = min(at_once, n_rows - row)
            first, last = np.searchsorted(ends, [row * row_len, (row + rows) * row_len - 1], side="right").tolist()
            stretches.append((first, last + 1, {"position": int(ends[first] - lengths[first]), "first_row": row, "n_rows": rows}))
    found = []
    for k, (first, last, stretch) in enumerate(stretches):
        files = range(bisect.bisect_right(starts, first) - 1, bisect.bisect_left(starts, last))
        parts = [(tokens[i]["to"], max(first - int(starts[i]), 0), last - int(starts[i])) for i in files]
        to = out / f"data-{k:05d}.arrow"
        found.append({
            "documents": parts, "to": str(to), "done": str(jobs / f"{to.name}.json"), "row_len": row_len, "method": method, "n_pieces": n_pieces,
            **stretch,
        })  # fmt: skip
    return found


def lengths_of(tokens: str) -> np.ndarray:
    """Tokens of each document of a file that `tokenize` wrote."""
    batches = pa.ipc.open_stream(pa.memory_map(tokens))
    return np.concatenate([np.zeros(0, np.int64), *(np.diff(batch.column("ids").offsets.to_numpy()) for batch in batches)])


def windows(lengths: np.ndarray, row_len: int) -> list[tuple[int, int]]:
    """Stretches of documents that best-fit sees at once: of WINDOW_PIECES pieces or WINDOW_TOKENS tokens, or somewhat more."""
    pieces, tokens = np.cumsum(-(-lengths // row_len)), np.cumsum(lengths)
    found, first = [], 0
    while first < len(lengths):
        before = (pieces[first - 1], tokens[first - 1]) if first else (0, 0)
        full = min(np.searchsorted(pieces, before[0] + WINDOW_PIECES), np.searchsorted(tokens, before[1] + WINDOW_TOKENS))
        last = min(int(full) + 1, len(lengths))
        found.append((first, last))
        first = last
    return found


def fill_shard(job: dict) -> dict[str, Any]:
    """Put documents into rows, and the rows into one Arrow shard."""
    documents = (piece for part in job["documents"] for piece in documents_of(*part))
    if job["method"] == "best_fit":
        rows = best_fit(documents, job["row_len"])
    else:
        rows = itertools.islice(course(documents, job["row_len"], job["position"], job["first_row"]), job["n_rows"])
    return done(job, write(rows, pathlib.Path(job["to"]), job["row_len"], job["n_pieces"]))


def documents_of(tokens: str, first: int, last: int) -> Iterator[Piece]:
    """Documents `first` up to `last` of a file that `tokenize` wrote."""
    start = 0
    for batch in pa.ipc.open_stream(pa.memory_map(tokens)):
        part = batch.slice(max(first - start, 0), max(last - max(first, start), 0))
        start += len(batch)
        offsets, flat = part.column("ids").offsets.to_numpy(), part.column("ids").values.to_numpy()
        for i, (document, loss_from) in enumerate(zip(part.column("id").to_pylist(), part.column("loss_from").to_pylist(), strict=True)):
            yield Piece(flat[offsets[i] : offsets[i + 1]], document, 0, loss_from)


# ---- which pieces share a row


def best_fit(documents: Iterable[Piece], row_len: int) -> Iterator[list[Piece]]:
    """Rows of whole documents, best-fit-decreasing: each piece, longest first, goes into the fullest row that still has room for it.
    Documents longer than a row are cut into full rows and one rest.

    Rows come out in the order of their first pieces in the corpus, so that no stretch of them is all long or all short documents.
    """
    pieces = [document.cut(start, start + row_len, part) for document in documents for part, start in enumerate(range(0, len(document.ids), row_len))]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room -> rows with that room
    rooms: list[int] = []  # the keys of open_rows, sorted
    lengths = np.array([len(piece.ids) for piece in pieces])
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = len(pieces[i].ids)
        k = bisect.bisect_left(rooms, length)
        if k == len(rooms):
            row, room = len(rows), row_len
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


def course(documents: Iterable[Piece], row_len: int, position: int = 0, first_row: int = 0) -> Iterator[list[Piece]]:
    """Rows as the course packs them, from first_row on: one stream of tokens, cut; `position` is the first document's place in it.

    Source: "Pretraining LLMs", lesson 3.
    """
    row: list[Piece] = []
    for document in documents:
        start, stop = position, position + len(document.ids)
        while position < stop:
            border = (position // row_len + 1) * row_len
            if position >= first_row * row_len:
                row.append(document.cut(position - start, border - start, position // row_len - start // row_len))
            position = min(border, stop)
            if position == border and row:
                yield row
                row = []


# ---- rows on disk


def write(rows: Iterable[list[Piece]], file: pathlib.Path, row_len: int, n_pieces: int) -> dict[str, Any]:
    """Write rows as one shard and count them.

    frequencies  of the trained tokens, {id: times}: all but the first of each piece and the prompts
    batches      [first byte, bytes, rows, CRC-32] of each record batch in the file
    """
    rows, batch_rows = iter(rows), max(1, BATCH_TOKENS // row_len)
    n_tokens = n_cut = n_rows = 0
    frequencies = np.zeros(n_pieces, np.int64)
    batches: list[list[int]] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as sink:
        sink.write(schema(row_len).serialize())
        while group := list(itertools.islice(rows, batch_rows)):
            message = record_batch(group, row_len).serialize()
            batches.append([sink.tell(), len(message), len(group), zlib.crc32(message)])
            sink.write(message)
            pieces = [piece for row in group for piece in row]
            n_rows += len(group)
            n_tokens += sum(len(piece.ids) for piece in pieces)
            n_cut += sum(piece.part == 1 for piece in pieces)
            frequencies += np.bincount(np.concatenate([piece.ids[max(1, piece.loss_from) :] for piece in pieces]), minlength=n_pieces)
        sink.write(END)
    seen = np.flatnonzero(frequencies)
    return {
        "file": file.name, "rows": n_rows, "bytes": file.stat().st_size, "tokens": n_tokens, "cut_documents": n_cut, "batches": batches,
        "frequencies": dict(zip(seen.tolist(), frequencies[seen].tolist(), strict=True)),
    }  # fmt: skip


def record_batch(rows: list[list[Piece]], row_len: int) -> pa.RecordBatch:
    ids = np.zeros((len(rows), row_len), np.int32)  # padding is 0 and stands at the end
    for filled, row in zip(ids, rows, strict=True):
        np.concatenate([piece.ids for piece in row], out=filled[: sum(len(piece.ids) for piece in row)])
    offsets = pa.array(np.cumsum([0, *(len(row) for row in rows)]), pa.int32())
    lengths = pa.array([len(piece.ids) for row in rows for piece in row], pa.int32())
    names = pa.array([piece.document for row in rows for piece in row], pa.string())
    loss_from = pa.array([piece.loss_from for row in rows for piece in row], pa.int32())
    lists = (pa.ListArray.from_arrays(offsets, values) for values in (lengths, names, loss_from))
    return pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), row_len), *lists], schema=schema(row_len))


def gather(texts: list[dict], shards: list[dict], out: pathlib.Path, *, row_len: int, method: str, n_pieces: int) -> dict[str, Any]:
    """Make the shards of a source one directory for `datasets.load_from_disk`, with an index of its record batches, and add up its counts:
    what `tokenize` and `write` found.

    unigram_nats is the entropy of the trained tokens' own frequencies: the loss of a model that has learnt these and nothing else.
    """
    frequencies = np.zeros(n_pieces, np.int64)
    for shard in shards:
        frequencies[list(map(int, shard["frequencies"]))] += list(shard["frequencies"].values())
    np.save(out / INDEX, np.array([[k, *batch] for k, shard in enumerate(shards) for batch in shard["batches"]], np.int64))
    describe(out, row_len, [shard["file"] for shard in shards])
    if method == "course":
        write_course(out, shards, row_len)
    n_rows, n_tokens = (sum(shard[name] for shard in shards) for name in ("rows", "tokens"))
    shares = frequencies[frequencies > 0] / max(1, frequencies.sum())
    return {
        "documents": sum(each["documents"] for each in texts), "rows": n_rows, "tokens": n_tokens, "trained_tokens": int(frequencies.sum()),
        "cut_documents": sum(shard["cut_documents"] for shard in shards), "padding_frac": 1 - n_tokens / (n_rows * row_len),
        "unigram_nats": float(-(shares * np.log(shares)).sum()), "bytes": sum(each["bytes"] for each in texts),
        "shards": [{name: shard[name] for name in ("file", "rows", "bytes")} for shard in shards],
    }  # fmt: skip


def write_course(out: pathlib.Path, shards: list[dict], row_len: int) -> None:
    """The rows again as the one parquet file that the course's lesson 3 writes and lesson 5 reads: a column input_ids."""
    lesson = pa.schema({"input_ids": pa.list_(pa.int32())})
    with pq.ParquetWriter(out / "packaged_pretrain_dataset.parquet", lesson) as writer:
        for shard in shards:
            for batch in pa.ipc.open_stream(pa.memory_map(str(out / shard["file"]))):
                writer.write_batch(pa.record_batch([batch.column("input_ids").cast(lesson.field(0).type)], schema=lesson))


def describe(out: pathlib.Path, row_len: int, files: list[str]) -> None:
    """The two JSON files without which `datasets.load_from_disk` opens nothing; it needs every key of them."""
    integer, string = ({"dtype": dtype, "_type": "Value"} for dtype in ("int32", "string"))
    lists = {"doc_lens": integer, "doc_ids": string, "loss_from": integer}
    features = {"input_ids": {"feature": integer, "length": row_len, "_type": "List"}}
    features |= {name: {"feature": of, "_type": "List"} for name, of in lists.items()}
    state = {
        "_data_files": [{"filename": file} for file in files], "_fingerprint": stage.fingerprint([out.name, files]), "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    (out / "dataset_info.json").write_text(json.dumps({"features": features}, indent=1) + "\n")
    (out / "state.json").write_text(json.dumps(state, indent=1) + "\n")
