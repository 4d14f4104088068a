"""Packed rows on disk to sharded global Batches: step i holds the same rows in the same slots on any mesh and any number of hosts.

Each host reads only the rows that its devices' shards hold, asked of the sharding. The position in the data is one integer, the
number of global rows consumed; the rest is `jaxpt.data.mixture`, a pure function of it.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
import pyarrow as pa
from absl import flags

from jaxpt import config, stage
from jaxpt.data.mixture import Mixture
from jaxpt.spec import Batch, Manifest, UserError

VERIFY_BYTES = 200e6  # of all shards together: below, opening compares checksums, which takes up to about a second; above, sizes only
STEPS = 2**40  # a stream has no end of its own

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags, and refuses under a program that never parsed any


def open_rows(packed_paths: Sequence[pathlib.Path | str], split: str = "train") -> Rows:
    """Open the sets of one split in directories that pack.py wrote. Opening maps shards into memory and reads none of their rows.

    Raises UserError when directories differ in row length or tokenizer, name a source twice, or hold a missing or damaged shard.
    """
    if not packed_paths:
        raise UserError("mixture.packed: no packed directory given. Name at least one that pack.py wrote.")
    manifests = [(path, Manifest.load(path)) for path in map(stage.local_path, packed_paths)]
    first_path, first = manifests[0]
    for path, manifest in manifests:
        if manifest.stage != "pack":
            raise UserError(f"{path}: was made by {manifest.stage}, wanted packed rows. Name the directory that pack.py wrote.")
        if manifest.counts["row_len"] != first.counts["row_len"]:
            lengths = f"{manifest.counts['row_len']} tokens, {first_path} has {first.counts['row_len']}"
            raise UserError(f"{path}: its rows have {lengths}. Pack both with one pack.row_len.")
        if manifest.tokenizer != first.tokenizer:
            raise UserError(f"{path}: packed with tokenizer {manifest.tokenizer}, {first_path} with {first.tokenizer}. Pack both with one tokenizer.")

    n_bytes = sum(shard["bytes"] for _, manifest in manifests for counts in manifest.counts[split].values() for shard in counts["shards"])
    sources: dict[str, Source] = {}
    for path, manifest in manifests:
        for name, counts in manifest.counts[split].items():
            if name in sources:
                raise UserError(f"{path}: source {name} was opened from another directory already. Prepare one of them under another name.")
            files = [path / split / name / shard["file"] for shard in counts["shards"]]
            for file, shard in zip(files, counts["shards"], strict=True):
                check_shard(file, shard["bytes"], manifest.outputs[str(file.relative_to(path))] if n_bytes < VERIFY_BYTES else None)
            sources[name] = Source(files, first.counts["row_len"], counts["unigram_nats"], manifest.fingerprint)
    if split == "train" and not sources:
        raise UserError(f"{first_path}: holds no packed source. Prepare and pack a corpus that has text.")
    return Rows(sources, split, first)


class Row(NamedTuple):
    """One packed row, as views of the mapped file.

    tokens     [T] int32, padding 0 at the end
    doc_lens   [pieces] int32, tokens of each document or part of one
    loss_from  [pieces] int32, first trained token of each
    """

    tokens: np.ndarray
    doc_lens: np.ndarray
    loss_from: np.ndarray


class Rows:
    """Every row of some packed sources, at random access.

    names, n_rows   the sources, and {source: rows}
    unigram_nats    {source: nats a token that counting tokens alone gives}
    row_len         tokens in a row
    n_pieces        of the tokenizer; ids are below it
    tokenizer       its fingerprint
    fingerprint     of all the rows
    """

    def __init__(self, sources: Mapping[str, Source], split: str, manifest: Manifest):
        self.sources = dict(sources)
        self.names = sorted(sources)
        self.n_rows = {name: sources[name].n_rows for name in self.names}
        self.unigram_nats = {name: sources[name].unigram_nats for name in self.names}
        self.row_len, self.n_pieces, self.tokenizer = manifest.counts["row_len"], manifest.counts["n_pieces"], manifest.tokenizer
        self.fingerprint = stage.fingerprint([split, {name: sources[name].fingerprint for name in self.names}])

    def row(self, name: str, i: int) -> Row:
        return self.sources[name].row(i)

    def doc_ids(self, name: str, i: int) -> list[str]:
        """The document that each piece of a row comes from."""
        return self.sources[name].doc_ids(i)


class Source:
    """The shards of one packed source, mapped into memory."""

    def __init__(self, files: Sequence[pathlib.Path], row_len: int, unigram_nats: float, fingerprint: str):
        self.unigram_nats, self.fingerprint = unigram_nats, fingerprint
        self.batches: list[pa.RecordBatch] = []
        self.columns: list[tuple[np.ndarray, ...]] = []  # of each record batch: ids [rows, T], offsets [rows + 1], lengths, loss_from
        self.starts: list[int] = []  # the first row of each record batch
        self.n_rows = 0
        for file in files:
            for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
                ids, doc_lens, loss_from = (batch.column(name) for name in ("input_ids", "doc_lens", "loss_from"))
                self.batches.append(batch)
                self.columns.append((
                    ids.values.to_numpy().reshape(-1, row_len), doc_lens.offsets.to_numpy(), doc_lens.values.to_numpy(), loss_from.values.to_numpy()
                ))  # fmt: skip
                self.starts.append(self.n_rows)
                self.n_rows += len(batch)

    def locate(self, i: int) -> tuple[int, int]:
        """The record batch that holds row i, and the row's place in it."""
        if not 0 <= i < self.n_rows:
            raise IndexError(f"row {i} of {self.n_rows}")
        batch = bisect.bisect_right(self.starts, i) - 1
        return batch, i - self.starts[batch]

    def row(self, i: int) -> Row:
        batch, k = self.locate(i)
        ids, offsets, doc_lens, loss_from = self.columns[batch]
        return Row(ids[k], doc_lens[offsets[k] : offsets[k + 1]], loss_from[offsets[k] : offsets[k + 1]])

    def doc_ids(self, i: int) -> list[str]:
        batch, k = self.locate(i)
        return self.batches[batch].column("doc_ids")[k].as_py()


def check_shard(file: pathlib.Path, n_bytes: int, checksum: str | None) -> None:
    """Raises UserError where a shard is missing or not what pack.py wrote."""
    if not file.is_file():
        raise UserError(f"{file}: missing, though the manifest names it. Copy it from where the rest came from, or run pack.py with --replace.")
    size = file.stat().st_size
    if size != n_bytes:
        raise UserError(f"{file}: {size:,} bytes, wanted {n_bytes:,}: a broken copy. Copy it again, or run pack.py with --replace.")
    if checksum and stage.sha256(file) != checksum:
        raise UserError(f"{file}: its checksum is not the manifest's: damaged bytes. Copy it again, or run pack.py with --replace.")


# ---- rows to batches


def make_batch(rows: Sequence[Row], document_mask: bool) -> Batch:
    """Rows as a Batch of numpy arrays [B, T].

    document_mask off makes each row one segment: positions run through, and a document's last token is trained to foresee the next
    document's first.
    """
    n_rows, row_len = len(rows), len(rows[0].tokens)
    tokens = np.stack([row.tokens for row in rows])
    # every row's pieces, and after them its padding as one more, so that the lengths of all tile the whole batch
    padding = [np.array([row_len - row.doc_lens.sum()], np.int32) for row in rows]
    lengths = np.concatenate([part for row, rest in zip(rows, padding, strict=True) for part in (row.doc_lens, rest)])
    zero = np.zeros(1, np.int32)
    numbers = np.concatenate([part for row in rows for part in (np.arange(1, len(row.doc_lens) + 1, dtype=np.int32), zero)])
    loss_from = np.concatenate([part for row in rows for part in (row.loss_from, zero)])

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, lengths).reshape(n_rows, row_len)

    segments = spread(numbers)
    in_piece = np.arange(n_rows * row_len, dtype=np.int32).reshape(n_rows, row_len) - spread((np.cumsum(lengths) - lengths).astype(np.int32))
    trained = in_piece >= spread(loss_from)
    if document_mask:
        positions = in_piece
    else:
        segments = (segments > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(row_len, dtype=np.int32), segments.shape) * segments
    weights = np.zeros((n_rows, row_len), np.float32)
    weights[:, :-1] = trained[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    targets *= weights > 0
    return Batch(tokens, targets, segments, positions * (segments > 0), weights)


def stream(
    rows: Rows, mixture: Mixture, sharding: jax.sharding.NamedSharding, batch_rows: int, first_row: int, document_mask: bool
) -> Iterator[Batch]:
    """Batches without end, from global row first_row on; threads make the next ones while the current one trains.

    Raises UserError when batch_rows or the row length cannot be cut as the sharding asks.
    """
    local = local_rows(sharding, batch_rows, rows.row_len)

    def load(step: int) -> Batch:
        places = (mixture.row_at(first_row + step * batch_rows + slot) for slot in local)
        return make_batch([rows.row(name, i) for name, i in places], document_mask)

    dataset = grain.MapDataset.range(STEPS).map(load)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
    try:
        for batch in iterator:
            yield place(batch, local, sharding, batch_rows)
    finally:
        iterator.close()


def heldout_batches(
    rows: Rows, name: str, sharding: jax.sharding.NamedSharding, batch_rows: int, n_rows: int, document_mask: bool
) -> Iterator[Batch]:
    """At most n_rows rows of a source, evenly spread over it and always the same; the last batch is filled with empty rows of weight 0."""
    local = local_rows(sharding, batch_rows, rows.row_len)
    available = rows.n_rows[name]
    n_rows = min(n_rows, available)
    empty = Row(np.zeros(rows.row_len, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
    for start in range(0, n_rows, batch_rows):
        chosen = [rows.row(name, k * available // n_rows) if k < n_rows else empty for k in (start + slot for slot in local)]
        yield place(make_batch(chosen, document_mask), local, sharding, batch_rows)


def local_rows(sharding: jax.sharding.NamedSharding, batch_rows: int, row_len: int) -> list[int]:
    """The slots of a global batch that this host's devices hold."""
    try:
        shards = sharding.addressable_devices_indices_map((batch_rows, row_len)).values()
    except ValueError as error:
        raise UserError(
            f"train.batch_rows: {batch_rows} rows of {row_len} tokens cannot be cut evenly over the mesh ({error}). Use multiples of its sizes."
        ) from None
    return sorted({slot for shard in shards for slot in range(*shard[0].indices(batch_rows))})


def place(batch: Batch, local: list[int], sharding: jax.sharding.NamedSharding, batch_rows: int) -> Batch:
    """This host's rows of a batch as their part of the global arrays [batch_rows, T]."""

    def to_global(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, slice]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_rows)
            first = bisect.bisect_left(local, start)
            return values[first : first + stop - start, index[1]]

        return jax.make_array_from_callback((batch_rows, values.shape[1]), sharding, shard)

    return Batch(*map(to_global, batch))


# ---- which documents a step saw


class Seen(NamedTuple):
    """A document, or a part of one, in a step."""

    slot: int  # row of the batch
    source: str
    row: int  # of the source
    document: str  # its id in the corpus
    tokens: np.ndarray  # int32


def trace(run: pathlib.Path, step: int, tokenizer: str) -> Iterator[Seen]:
    """The documents of the step-th update of a run, counted from 1 as in metrics.jsonl, in the order of the batch.

    tokenizer is the fingerprint of the one that will read the tokens. Raises UserError where the run cannot be read.
    """
    try:
        settings = config.typed(json.loads((run / "config.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{run}: has no readable config.json ({error}). Give the directory of a training run.") from None
    if not 1 <= step <= settings.train.steps:
        raise UserError(f"--step {step}: the run's steps are 1 to {settings.train.steps:,}.")
    asked = settings.mixture
    if (run / "phases.json").is_file():  # shares that the run itself changed on its way
        asked = dataclasses.replace(asked, phases=tuple(map(tuple, json.loads((run / "phases.json").read_text()))))
    rows = open_rows(asked.packed or [run / "packed"])
    if rows.tokenizer != tokenizer:
        raise UserError(f"{run}: its tokenizer is {tokenizer}, but the rows were packed with {rows.tokenizer}. They were packed anew since.")
    batch_rows = settings.train.batch_rows
    mixture = Mixture(asked, rows.n_rows, batch_rows)
    for slot in range(batch_rows):
        name, i = mixture.row_at((step - 1) * batch_rows + slot)
        row, start = rows.row(name, i), 0
        for document, length in zip(rows.doc_ids(name, i), row.doc_lens.tolist(), strict=True):
            yield Seen(slot, name, i, document, row.tokens[start : start + length])
            start += length
