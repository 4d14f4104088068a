"""Packed rows on disk to sharded global Batches: step i holds the same rows in the same slots on any mesh and any number of hosts.

Each host reads only the rows that its devices' shards hold, asked of the sharding. The position in the data is one integer, the
number of global rows consumed; the rest is `jaxpt.data.mixture`, a pure function of it.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import io
import json
import pathlib
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import pyarrow as pa
from absl import flags

from jaxpt import config, stage
from jaxpt.data import pack, storage
from jaxpt.data.mixture import Mixture, Stretch, recorded
from jaxpt.spec import Batch, UserError

VERIFY_BYTES = 500e6  # of a set on disk: below, opening compares all checksums, which takes well under a second
OPEN_BATCHES = 256  # record batches that are kept open, of about 1 MB each
STEPS_AHEAD = 8  # whose rows are asked of an object store before they are needed
STEPS = 2**40  # a stream has no end of its own

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags, and refuses under a program that never parsed any


def open_rows(packed_paths: Sequence[pathlib.Path | str], split: str = "train") -> Rows:
    """Open the sets of one split in directories that pack.py wrote, on disk or in an object store (s3://BUCKET/PATH).

    Opening checks that every shard has its size, and the bytes of a set on disk up to VERIFY_BYTES. Beyond that a record batch is checked
    before its first row is given out, and `stream` goes over the rest meanwhile.

    Raises UserError when directories differ in row length or tokenizer, name a source twice, or hold a missing or damaged shard.
    """
    if not packed_paths:
        raise UserError("mixture.packed: no packed directory given. Name at least one that pack.py wrote.")
    opened = [storage.open_set(path) for path in packed_paths]
    first = opened[0]
    for place in opened:
        manifest = place.manifest
        if manifest.stage != "pack":
            raise UserError(f"{place.where}: was made by {manifest.stage}, wanted packed rows. Name the directory that pack.py wrote.")
        if manifest.counts["row_len"] != first.manifest.counts["row_len"]:
            lengths = f"{manifest.counts['row_len']} tokens, {first.where} has {first.manifest.counts['row_len']}"
            raise UserError(f"{place.where}: its rows have {lengths}. Pack both with one pack.row_len.")
        if manifest.tokenizer != first.manifest.tokenizer:
            theirs = f"packed with tokenizer {manifest.tokenizer}, {first.where} with {first.manifest.tokenizer}"
            raise UserError(f"{place.where}: {theirs}. Pack both with one tokenizer.")

    sources: dict[str, Source] = {}
    for place in opened:
        for name in place.manifest.counts[split]:
            if name in sources:
                raise UserError(f"{place.where}: source {name} was opened from another directory already. Prepare one of them under another name.")
            sources[name] = Source(place, split, name)
    if split == "train" and not sources:
        raise UserError(f"{first.where}: holds no packed source. Prepare and pack a corpus that has text.")
    if sum(source.n_bytes for source in sources.values()) < VERIFY_BYTES:
        for source in sources.values():
            source.sweep()
    return Rows(sources, split, first.manifest.counts, first.manifest.tokenizer)


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
    counts          {source: what pack.py counted}
    unigram_nats    {source: nats a token that counting tokens alone gives}
    row_len         tokens in a row
    n_pieces        of the tokenizer; ids are below it
    tokenizer       its fingerprint
    fingerprint     of all the rows
    """

    def __init__(self, sources: Mapping[str, Source], split: str, counts: Mapping[str, Any], tokenizer: str | None):
        self.sources = dict(sources)
        self.names = sorted(sources)
        self.counts = {name: sources[name].counts for name in self.names}
        self.n_rows = {name: sources[name].n_rows for name in self.names}
        self.unigram_nats = {name: self.counts[name]["unigram_nats"] for name in self.names}
        self.row_len, self.n_pieces, self.tokenizer = counts["row_len"], counts["n_pieces"], tokenizer
        self.fingerprint = stage.fingerprint([split, {name: sources[name].fingerprint for name in self.names}])
        self.open: collections.OrderedDict[tuple[str, int], Opened] = collections.OrderedDict()
        self.lock = threading.Lock()
        self.sweeper, self.damage = None, None

    def row(self, name: str, i: int) -> Row:
        batch, k = self.opened(name, i)
        pieces = slice(batch.offsets[k], batch.offsets[k + 1])
        return Row(batch.ids[k], batch.doc_lens[pieces], batch.loss_from[pieces])

    def doc_ids(self, name: str, i: int) -> list[str]:
        """The document that each piece of a row comes from."""
        batch, k = self.opened(name, i)
        return batch.whole.column("doc_ids")[k].as_py()

    def opened(self, name: str, i: int) -> tuple[Opened, int]:
        """The record batch that holds row i of a source, and the row's place in it. The last OPEN_BATCHES of them stay open."""
        source = self.sources[name]
        number, k = source.locate(i)
        with self.lock:
            found = self.open.get((name, number))
            if found is not None:
                self.open.move_to_end((name, number))
                return found, k
        found = source.read(number)
        with self.lock:
            self.open[name, number] = found
            out = self.open.popitem(last=False)[0] if len(self.open) > OPEN_BATCHES else None
        if out:
            self.sources[out[0]].forget(out[1])
        return found, k

    def ahead(self, places: Sequence[tuple[str, int]]) -> None:
        """Begin to fetch what lies in an object store of these (source, row)."""
        for name, i in places:
            source = self.sources[name]
            number, _ = source.locate(i)
            if source.place.is_remote and (name, number) not in self.open:
                source.place.ahead(source.range(number))

    def sweep(self, part: int, n_parts: int) -> None:
        """Check, meanwhile, the checksums of a part of every set on disk; `damage` will hold what is found."""

        def check():
            try:
                for source in self.sources.values():
                    source.sweep(part, n_parts)
            except UserError as error:
                self.damage = error

        if self.sweeper is None:
            self.sweeper = threading.Thread(target=check, daemon=True, name="checksums")
            self.sweeper.start()


class Opened(NamedTuple):
    """A record batch and views of its columns."""

    whole: pa.RecordBatch
    ids: np.ndarray  # [rows, T] int32
    offsets: np.ndarray  # [rows + 1] int32: the pieces of each row
    doc_lens: np.ndarray  # [pieces] int32
    loss_from: np.ndarray  # [pieces] int32


class Source:
    """One packed source: where its record batches lie."""

    def __init__(self, place: storage.Disk | storage.Bucket, split: str, name: str):
        self.place, self.directory, self.counts = place, f"{split}/{name}", place.manifest.counts[split][name]
        self.fingerprint, self.row_len = place.manifest.fingerprint, place.manifest.counts["row_len"]
        self.files = [f"{self.directory}/{shard['file']}" for shard in self.counts["shards"]]
        self.n_bytes = 0 if place.is_remote else sum(shard["bytes"] for shard in self.counts["shards"])  # that opening could check
        for file, shard in zip([*self.files, f"{self.directory}/{pack.INDEX}"], [*self.counts["shards"], None], strict=True):
            size = place.size(file)
            if size is None:
                raise UserError(
                    f"{place.where}/{file}: missing, though the manifest names it. Copy it from where the rest came from, or run pack.py with --replace."
                )
            if shard and size != shard["bytes"]:
                raise UserError(
                    f"{place.where}/{file}: {size:,} bytes, wanted {shard['bytes']:,}: a broken copy. Copy it again, or run pack.py with --replace."
                )
        index = place.content(f"{self.directory}/{pack.INDEX}")
        if hashlib.sha256(index).hexdigest() != place.manifest.outputs[f"{self.directory}/{pack.INDEX}"]:
            raise self.damaged(pack.INDEX, "its checksum is not the manifest's")
        self.index = np.load(io.BytesIO(index))
        self.starts = np.cumsum([0, *self.index[:, 3]])  # the first row of each record batch
        self.n_rows = int(self.starts[-1])
        self.checked = np.zeros(len(self.index), bool)

    def damaged(self, file: str, how: str) -> UserError:
        return UserError(f"{self.place.where}/{self.directory}/{file}: {how}: damaged bytes. Copy it again, or run pack.py with --replace.")

    def locate(self, i: int) -> tuple[int, int]:
        """The record batch that holds row i, and the row's place in it."""
        if not 0 <= i < self.n_rows:
            raise IndexError(f"row {i} of {self.n_rows}")
        batch = int(np.searchsorted(self.starts, i, side="right")) - 1
        return batch, i - int(self.starts[batch])

    def range(self, number: int) -> storage.Range:
        shard, start, n_bytes, _, crc = self.index[number].tolist()
        return storage.Range(self.files[shard], start, n_bytes, crc)

    def read(self, number: int) -> Opened:
        """Open a record batch. Raises UserError where its bytes are not those that pack.py wrote."""
        wanted = self.range(number)
        found = self.place.read(wanted)
        if not self.checked[number]:
            self.check(wanted, zlib.crc32(found) == wanted.crc)
            self.checked[number] = not self.place.is_remote  # what is fetched again is checked again
        whole = pa.ipc.read_record_batch(pa.py_buffer(found), pack.schema(self.row_len))
        ids, doc_lens, loss_from = (whole.column(name) for name in ("input_ids", "doc_lens", "loss_from"))
        return Opened(
            whole,
            ids.values.to_numpy().reshape(-1, self.row_len),
            doc_lens.offsets.to_numpy(),
            doc_lens.values.to_numpy(),
            loss_from.values.to_numpy(),
        )

    def check(self, wanted: storage.Range, is_whole: bool) -> None:
        if not is_whole:
            file = wanted.name.removeprefix(f"{self.directory}/")
            raise self.damaged(file, f"the checksum of bytes {wanted.start:,} to {wanted.start + wanted.n_bytes - 1:,} is not the index's")

    def forget(self, number: int) -> None:
        self.place.forget(self.range(number))

    def sweep(self, part: int = 0, n_parts: int = 1) -> None:
        """Check the part-th of n_parts of the record batches, on disk. Raises UserError naming a damaged shard."""
        if not self.place.is_remote:
            for number in range(part * len(self.index) // n_parts, (part + 1) * len(self.index) // n_parts):
                if not self.checked[number]:
                    self.check(self.range(number), self.place.is_whole(self.range(number)))
                    self.checked[number] = True


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
    remote = [source.place for source in rows.sources.values() if source.place.is_remote]
    for each in remote:
        each.begin()
    rows.sweep(jax.process_index(), jax.process_count())

    def places(step: int) -> list[tuple[str, int]]:
        return [mixture.row_at(first_row + step * batch_rows + slot) for slot in local]

    def load(step: int) -> Batch:
        if rows.damage:
            raise rows.damage
        if remote:
            for later in range(step, step + STEPS_AHEAD):
                rows.ahead(places(later))
        return make_batch([rows.row(name, i) for name, i in places(step)], document_mask)

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
    _, rows, places = rows_of_step(run, step)
    if rows.tokenizer != tokenizer:
        raise UserError(f"{run}: its tokenizer is {tokenizer}, but the rows were packed with {rows.tokenizer}. They were packed anew since.")
    for slot, (name, i) in enumerate(places):
        row, start = rows.row(name, i), 0
        for document, length in zip(rows.doc_ids(name, i), row.doc_lens.tolist(), strict=True):
            yield Seen(slot, name, i, document, row.tokens[start : start + length])
            start += length


def rows_of_step(run: pathlib.Path, step: int) -> tuple[config.Config, Rows, list[tuple[str, int]]]:
    """(a run's settings, its rows, the (source, row) in each slot of its step-th update). Raises UserError where the run cannot be read."""
    try:
        settings = config.typed(json.loads((run / "config.json").read_text()))
        stretches = [Stretch(**each) for each in json.loads((run / "phases.json").read_text())]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{run}: has no readable config.json and phases.json ({error}). Give the directory of a training run.") from None
    if not 1 <= step <= settings.train.steps:
        raise UserError(f"--step {step}: the run's steps are 1 to {settings.train.steps:,}.")
    rows = open_rows(settings.mixture.packed or [run / "packed"])
    stretch = next(each for each in reversed(stretches) if each.step < step)
    if stretch.packed != rows.fingerprint:
        raise UserError(f"{run}: step {step} read other rows than {', '.join(settings.mixture.packed) or run / 'packed'} holds now. Put those back.")
    mixture, first = recorded(stretches, rows.n_rows, settings.mixture.seed), stretch.row + (step - 1 - stretch.step) * stretch.batch_rows
    return settings, rows, [mixture.row_at(first + slot) for slot in range(stretch.batch_rows)]
