"""Documents to rows of token ids: every row exactly row_len long, every token of the corpus in one row.

    best_fit   bos + ids + eos per document. A document of up to row_len tokens is never cut; a longer one becomes full rows and one
               rest. Whole documents and rests fill rows by best-fit-decreasing within a window of the corpus; what stays open is padding.
    course     bos + ids + eos of all documents of a source, concatenated, cut every row_len tokens; the last partial row is dropped.

Rows lie in Arrow shards that `datasets.load_from_disk` opens and `jaxpt.data.loader` maps into memory.
"""

from __future__ import annotations

import bisect
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt import config, stage
from jaxpt.data import tokenizer
from jaxpt.spec import Manifest, UserError

WINDOW_PIECES = 2**16  # that best-fit sees at once, and
WINDOW_TOKENS = 2**25  # the tokens in them: 128 MB of ids
ENCODE_CHARS = 2**23  # encoded at once; the tokenizers library holds about 100 bytes a token meanwhile
SHARD_BYTES = 2**28  # of ids in a shard
BATCH_TOKENS = 2**18  # in an Arrow record batch


def run(settings: config.Config, workdir: pathlib.Path, replace: bool = False) -> Manifest:
    """Make WORKDIR/packed from WORKDIR/corpus and WORKDIR/tokenizer. The rows and their order depend on nothing else.

    Raises UserError where a source has less text than one row.
    """
    workdir = stage.local_path(workdir)
    inputs = {"corpus": workdir / "corpus", "tokenizer": workdir / "tokenizer"}
    opened = tokenizer.load(inputs["tokenizer"])
    row_len, method = settings.pack.row_len, settings.pack.method

    def work(out: pathlib.Path) -> dict[str, Any]:
        counts = {"row_len": row_len, "method": method, "n_pieces": opened.n_pieces, "train": {}, "heldout": {}}
        for split in ("train", "heldout"):
            for name, files in tokenizer.corpus_files(inputs["corpus"], split).items():
                found = pack_source(files, opened, out / split / name, row_len, method, f"packing {split}/{name}")
                if found["rows"]:
                    counts[split][name] = found
                elif split == "train":
                    raise UserError(f"pack: source {name} has less than one row of {row_len} tokens. Lower pack.row_len, or prepare more text.")
        return counts

    manifest = stage.run(
        "pack", workdir / "packed", work, config=stage.plain(settings.pack), inputs=inputs, tokenizer=opened.fingerprint, replace=replace
    )
    for split in ("train", "heldout"):
        for name, found in manifest.counts[split].items():
            stage.say(
                f"pack: {split}/{name}: {found['rows']:,} rows of {row_len:,}, {found['tokens']:,} tokens, {found['padding_frac']:.2%} padding, "
                f"{found['cut_documents']:,} of {found['documents']:,} documents cut"
            )
    return manifest


class Piece(NamedTuple):
    """A document or a part of one, as it stands in a row."""

    ids: np.ndarray  # int32
    document: str
    part: int = 0  # 0, 1, ... of its document


def pack_source(files: list[pathlib.Path], opened: tokenizer.Tokenizer, out: pathlib.Path, row_len: int, method: str, label: str) -> dict[str, Any]:
    """Pack one source into the directory `out` and return its counts. What an earlier, killed run finished is taken as it is."""
    done = out / "counts.json"
    if done.exists():
        return json.loads(done.read_text())
    n_documents = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    n_bytes = 0

    def documents() -> Iterator[Piece]:
        nonlocal n_bytes
        for document, text, ids in stage.track(encoded(files, opened), label, n_documents, "documents"):
            n_bytes += len(text.encode())
            yield Piece(ids, document)

    rows = best_fit(documents(), row_len) if method == "best_fit" else course(documents(), row_len)
    counts = {"documents": n_documents, **write(rows, out, row_len, opened.n_pieces), "bytes": n_bytes}
    stage.write_whole(done, json.dumps(counts, indent=1) + "\n")
    return counts


def encoded(files: list[pathlib.Path], opened: tokenizer.Tokenizer) -> Iterator[tuple[str, str, np.ndarray]]:
    """(document id, text, bos + ids + eos) of every document, in the corpus's order; encoded on all cores."""
    bos = [] if opened.bos_id is None else [opened.bos_id]
    for file in files:
        for names, texts in portions(file):
            for name, text, ids in zip(names, texts, opened.encode_batch(texts), strict=True):
                yield name, text, np.array([*bos, *ids, opened.eos_id], np.int32)


def portions(file: pathlib.Path) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts of a parquet file, about ENCODE_CHARS characters at a time."""
    names, texts, n_chars = [], [], 0
    for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=["id", "text"]):
        for name, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            names.append(name)
            texts.append(text)
            n_chars += len(text)
            if n_chars >= ENCODE_CHARS:
                yield names, texts
                names, texts, n_chars = [], [], 0
    if texts:
        yield names, texts


# ---- which pieces share a row


def best_fit(documents: Iterable[Piece], row_len: int) -> Iterator[list[Piece]]:
    """Rows of whole documents; those longer than a row are cut into full rows and one rest."""
    window, n_tokens = [], 0
    for document in documents:
        for part, start in enumerate(range(0, len(document.ids), row_len)):
            window.append(Piece(document.ids[start : start + row_len], document.document, part))
        n_tokens += len(document.ids)
        if len(window) >= WINDOW_PIECES or n_tokens >= WINDOW_TOKENS:
            yield from fill(window, row_len)
            window, n_tokens = [], 0
    yield from fill(window, row_len)


def fill(window: list[Piece], row_len: int) -> Iterator[list[Piece]]:
    """Best-fit-decreasing: each piece, longest first, goes into the fullest row that still has room for it.

    Rows come out in the order of their first pieces in the corpus, so that no stretch of them is all long or all short documents.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room -> rows with that room
    rooms: list[int] = []  # the keys of open_rows, sorted
    lengths = np.array([len(piece.ids) for piece in window])
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = len(window[i].ids)
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
        yield [window[i] for i in row]


def course(documents: Iterable[Piece], row_len: int) -> Iterator[list[Piece]]:
    """Rows as the course packs them: one stream of tokens, cut. Source: "Pretraining LLMs", lesson 3."""
    row, room = [], row_len
    for document in documents:
        start, part = 0, 0
        while start < len(document.ids):
            ids = document.ids[start : start + room]
            row.append(Piece(ids, document.document, part))
            start, part, room = start + len(ids), part + 1, room - len(ids)
            if room == 0:
                yield row
                row, room = [], row_len


# ---- rows on disk


def write(rows: Iterable[list[Piece]], out: pathlib.Path, row_len: int, n_pieces: int) -> dict[str, Any]:
    """Write rows as a directory for `datasets.load_from_disk` and count them.

    unigram_nats is the entropy of the trained tokens' own frequencies: the loss of a model that has learnt these and nothing else.
    """
    out.mkdir(parents=True, exist_ok=True)
    whole, integers = pa.list_(pa.int32(), row_len), pa.list_(pa.int32())
    schema = pa.schema({"input_ids": whole, "doc_lens": integers, "doc_ids": pa.list_(pa.string()), "loss_from": integers})
    rows, batch_rows, shard_rows = iter(rows), max(1, BATCH_TOKENS // row_len), max(1, SHARD_BYTES // (4 * row_len))
    groups = iter(lambda: list(itertools.islice(rows, batch_rows)), [])
    n_tokens = n_cut = 0
    frequencies = np.zeros(n_pieces, np.int64)  # of trained tokens: all but the first of each piece
    shards: list[dict[str, Any]] = []
    group = next(groups, [])
    while group or not shards:
        file = out / f"data-{len(shards):05d}.arrow"
        in_shard = 0
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:  # datasets wants the stream format
            while group and in_shard < shard_rows:
                stream.write_batch(record_batch(group, schema, row_len))
                pieces = [piece for row in group for piece in row]
                n_tokens += sum(len(piece.ids) for piece in pieces)
                n_cut += sum(piece.part == 1 for piece in pieces)
                frequencies += np.bincount(np.concatenate([piece.ids[1:] for piece in pieces]), minlength=n_pieces)
                in_shard += len(group)
                group = next(groups, [])
        shards.append({"file": file.name, "rows": in_shard, "bytes": file.stat().st_size})
    describe(out, row_len, [shard["file"] for shard in shards])
    n_rows = sum(shard["rows"] for shard in shards)
    shares = frequencies[frequencies > 0] / max(1, frequencies.sum())
    return {
        "rows": n_rows, "tokens": n_tokens, "cut_documents": n_cut, "padding_frac": 1 - n_tokens / max(1, n_rows * row_len),
        "unigram_nats": float(-(shares * np.log(shares)).sum()), "shards": shards,
    }  # fmt: skip


def record_batch(rows: list[list[Piece]], schema: pa.Schema, row_len: int) -> pa.RecordBatch:
    ids = np.zeros((len(rows), row_len), np.int32)  # padding is 0 and stands at the end
    for filled, row in zip(ids, rows, strict=True):
        np.concatenate([piece.ids for piece in row], out=filled[: sum(len(piece.ids) for piece in row)])
    offsets = pa.array(np.cumsum([0, *(len(row) for row in rows)]), pa.int32())
    lengths = pa.array([len(piece.ids) for row in rows for piece in row], pa.int32())
    names = pa.array([piece.document for row in rows for piece in row], pa.string())
    loss_from = pa.array(np.zeros(len(lengths), np.int32))  # plain text: every token is trained
    lists = (pa.ListArray.from_arrays(offsets, values) for values in (lengths, names, loss_from))
    return pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), row_len), *lists], schema=schema)


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
