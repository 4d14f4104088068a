"""Packed rows on disk to sharded global Batches.

Step i holds the same rows in the same slots on any mesh and any number of hosts.

Each host reads only the rows that its devices' shards hold, asked of the sharding. The position in
the data is one integer, the
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
from jaxpt.data.mixture import MixturePhase, MixtureSchedule, schedule_from_history
from jaxpt.spec import Batch, UserError

# of a set on disk: below, opening compares all checksums, which takes well under a second
MAX_BYTES_VERIFIED_AT_OPEN = 500e6
MAX_OPEN_BATCHES = 256  # record batches that are kept open, of about 1 MB each
PREFETCH_STEPS = 8  # whose rows are asked of an object store before they are needed
METRICS_NAME = 2**40  # a stream has no end of its own

if not flags.FLAGS.is_parsed():
    # grain reads absl flags, and refuses under a program that never parsed any
    flags.FLAGS.mark_as_parsed()


def open_packed(packed_paths: Sequence[pathlib.Path | str], split: str = "train") -> PackedDataset:
    """Open the sets of one split in directories that pack.py wrote, on disk or in an object store
    (s3://BUCKET/PATH).

    Opening checks that every shard has its size, and the bytes of a set on disk up to VERIFY_BYTES.
    Beyond that a record batch is checked
    before its first row is given out, and `stream` goes over the rest meanwhile.

    Raises UserError when directories differ in row length or tokenizer, name a source twice, or
    hold a missing or damaged shard.
    """
    if not packed_paths:
        raise UserError(
            "mixture.packed_paths: no packed directory given. Name at least one that pack.py wrote."
        )
    opened = [storage.open_storage(path) for path in packed_paths]
    first = opened[0]
    for place in opened:
        manifest = place.manifest
        if manifest.stage != "pack":
            raise UserError(
                f"{place.where}: was made by {manifest.stage}, expected "
                "packed rows. Name the directory that pack.py wrote."
            )
        if manifest.counts["seq_len"] != first.manifest.counts["seq_len"]:
            lengths = (
                f"{manifest.counts['seq_len']} tokens, {first.where} has "
                f"{first.manifest.counts['seq_len']}"
            )
            raise UserError(
                f"{place.where}: its rows have {lengths}. Pack both with one pack.seq_len."
            )
        if manifest.tokenizer != first.manifest.tokenizer:
            theirs = (
                f"packed with tokenizer {manifest.tokenizer}, {first.where} with "
                f"{first.manifest.tokenizer}"
            )
            raise UserError(f"{place.where}: {theirs}. Pack both with one tokenizer.")

    sources: dict[str, PackedSource] = {}
    for place in opened:
        for name in place.manifest.counts[split]:
            if name in sources:
                raise UserError(
                    f"{place.where}: source {name} was opened from another "
                    "directory already. Prepare one of them under another "
                    "name."
                )
            sources[name] = PackedSource(place, split, name)
    if split == "train" and not sources:
        raise UserError(
            f"{first.where}: holds no packed source. Prepare and pack a corpus that has text."
        )
    if sum(source.n_bytes for source in sources.values()) < MAX_BYTES_VERIFIED_AT_OPEN:
        for source in sources.values():
            source.verify_all()
    return PackedDataset(sources, split, first.manifest.counts, first.manifest.tokenizer)


class PackedSequence(NamedTuple):
    """One packed row, as views of the mapped file.

    tokens     [T] int32, padding 0 at the end
    doc_lens   [pieces] int32, tokens of each document or part of one
    loss_from  [pieces] int32, first trained token of each
    """

    tokens: np.ndarray
    doc_lens: np.ndarray
    loss_from: np.ndarray


class PackedDataset:
    """Every row of some packed sources, at random access.

    names, n_rows   the sources, and {source: rows}
    counts          {source: what pack.py counted}
    unigram_nats    {source: nats per token that counting tokens alone gives}
    seq_len         tokens in a row
    vocab_size        of the tokenizer; ids are below it
    tokenizer       its fingerprint
    fingerprint     of all the rows
    """

    def __init__(
        self,
        sources: Mapping[str, PackedSource],
        split: str,
        counts: Mapping[str, Any],
        tokenizer: str | None,
    ):
        self.sources = dict(sources)
        self.names = sorted(sources)
        self.counts = {name: sources[name].counts for name in self.names}
        self.n_rows = {name: sources[name].n_rows for name in self.names}
        self.unigram_nats = {name: self.counts[name]["unigram_nats"] for name in self.names}
        self.seq_len, self.vocab_size, self.tokenizer = (
            counts["seq_len"],
            counts["vocab_size"],
            tokenizer,
        )
        self.fingerprint = stage.fingerprint(
            [split, {name: sources[name].fingerprint for name in self.names}]
        )
        self.open: collections.OrderedDict[tuple[str, int], RecordBatchView] = (
            collections.OrderedDict()
        )
        self.lock = threading.Lock()
        self.sweeper, self.damage = None, None

    def read_sequence(self, name: str, i: int) -> PackedSequence:
        """Return one sequence of a source."""
        batch, k = self.open_record_batch(name, i)
        pieces = slice(batch.offsets[k], batch.offsets[k + 1])
        return PackedSequence(batch.ids[k], batch.doc_lens[pieces], batch.loss_from[pieces])

    def read_document_ids(self, name: str, i: int) -> list[str]:
        """The document that each piece of a row comes from."""
        batch, k = self.open_record_batch(name, i)
        return batch.whole.column("doc_ids")[k].as_py()

    def open_record_batch(self, name: str, i: int) -> tuple[RecordBatchView, int]:
        """The record batch that holds row i of a source, and the row's place in it.

        The last OPEN_BATCHES of them stay open.
        """
        source = self.sources[name]
        number, k = source.locate_sequence(i)
        with self.lock:
            found = self.open.get((name, number))
            if found is not None:
                self.open.move_to_end((name, number))
                return found, k
        found = source.read_record_batch(number)
        with self.lock:
            self.open[name, number] = found
            out = self.open.popitem(last=False)[0] if len(self.open) > MAX_OPEN_BATCHES else None
        if out:
            self.sources[out[0]].close_files(out[1])
        return found, k

    def prefetch(self, places: Sequence[tuple[str, int]]) -> None:
        """Begin to fetch what lies in an object store of these (source, row)."""
        for name, i in places:
            source = self.sources[name]
            number, _ = source.locate_sequence(i)
            if source.place.is_remote and (name, number) not in self.open:
                source.place.prefetch(source.byte_range(number))

    def verify_all(self, part: int, n_parts: int) -> None:
        """Check, meanwhile, the checksums of a part of every set on disk.

        `damage` will hold what is found.
        """

        def check():
            try:
                for source in self.sources.values():
                    source.verify_all(part, n_parts)
            except UserError as error:
                self.damage = error

        if self.sweeper is None:
            self.sweeper = threading.Thread(target=check, daemon=True, name="checksums")
            self.sweeper.start()


class RecordBatchView(NamedTuple):
    """A record batch and views of its columns."""

    whole: pa.RecordBatch
    ids: np.ndarray  # [rows, T] int32
    offsets: np.ndarray  # [rows + 1] int32: the pieces of each row
    doc_lens: np.ndarray  # [pieces] int32
    loss_from: np.ndarray  # [pieces] int32


class PackedSource:
    """One packed source: where its record batches lie."""

    def __init__(self, place: storage.LocalStorage | storage.BucketStorage, split: str, name: str):
        self.place, self.directory, self.counts = (
            place,
            f"{split}/{name}",
            place.manifest.counts[split][name],
        )
        self.fingerprint, self.seq_len = (
            place.manifest.fingerprint,
            place.manifest.counts["seq_len"],
        )
        self.files = [f"{self.directory}/{shard['file']}" for shard in self.counts["shards"]]
        self.n_bytes = (
            0 if place.is_remote else sum(shard["n_bytes"] for shard in self.counts["shards"])
        )  # that opening could check
        for file, shard in zip(
            [*self.files, f"{self.directory}/{pack.INDEX_FILE}"],
            [*self.counts["shards"], None],
            strict=True,
        ):
            size = place.size(file)
            if size is None:
                raise UserError(
                    f"{place.where}/{file}: missing, though the manifest "
                    "names it. Copy it from where the rest came from, or run "
                    "pack.py with --replace."
                )
            if shard and size != shard["n_bytes"]:
                raise UserError(
                    f"{place.where}/{file}: {size:,} bytes, expected "
                    f"{shard['n_bytes']:,}: a broken copy. Copy it again, or "
                    "run pack.py with --replace."
                )
        index = place.read_file_bytes(f"{self.directory}/{pack.INDEX_FILE}")
        if (
            hashlib.sha256(index).hexdigest()
            != place.manifest.outputs[f"{self.directory}/{pack.INDEX_FILE}"]
        ):
            raise self.describe_damage(pack.INDEX_FILE, "its checksum is not the manifest's")
        self.index = np.load(io.BytesIO(index))
        self.starts = np.cumsum([0, *self.index[:, 3]])  # the first row of each record batch
        self.n_rows = int(self.starts[-1])
        self.checked = np.zeros(len(self.index), bool)

    def describe_damage(self, file: str, how: str) -> UserError:
        """Return the error for a damaged file."""
        return UserError(
            f"{self.place.where}/{self.directory}/{file}: {how}: damaged "
            "bytes. Copy it again, or run pack.py with --replace."
        )

    def locate_sequence(self, i: int) -> tuple[int, int]:
        """The record batch that holds row i, and the row's place in it."""
        if not 0 <= i < self.n_rows:
            raise IndexError(f"row {i} of {self.n_rows}")
        batch = int(np.searchsorted(self.starts, i, side="right")) - 1
        return batch, i - int(self.starts[batch])

    def byte_range(self, number: int) -> storage.ByteRange:
        """Return the bytes of a record batch."""
        shard, start, n_bytes, _, crc = self.index[number].tolist()
        return storage.ByteRange(self.files[shard], start, n_bytes, crc)

    def read_record_batch(self, number: int) -> RecordBatchView:
        """Open a record batch.

        Raises UserError where its bytes are not those that pack.py wrote.
        """
        expected = self.byte_range(number)
        found = self.place.read_range(expected)
        if not self.checked[number]:
            self.check_range(expected, zlib.crc32(found) == expected.crc)
            self.checked[
                number
            ] = not self.place.is_remote  # what is fetched again is checked again
        whole = pa.ipc.read_record_batch(pa.py_buffer(found), pack.packed_schema(self.seq_len))
        ids, doc_lens, loss_from = (
            whole.column(name) for name in ("input_ids", "doc_lens", "loss_from")
        )
        return RecordBatchView(
            whole,
            ids.values.to_numpy().reshape(-1, self.seq_len),
            doc_lens.offsets.to_numpy(),
            doc_lens.values.to_numpy(),
            loss_from.values.to_numpy(),
        )

    def check_range(self, expected: storage.ByteRange, is_whole: bool) -> None:
        """Raise UserError if the bytes of a range differ from its checksum."""
        if not is_whole:
            file = expected.name.removeprefix(f"{self.directory}/")
            raise self.describe_damage(
                file,
                (
                    f"the checksum of bytes {expected.start:,} to "
                    f"{expected.start + expected.n_bytes - 1:,} is not the index's"
                ),
            )

    def close_files(self, number: int) -> None:
        """Close the files of a record batch."""
        self.place.close(self.byte_range(number))

    def verify_all(self, part: int = 0, n_parts: int = 1) -> None:
        """Check the part-th of n_parts of the record batches, on disk.

        Raises UserError naming a damaged shard.
        """
        if not self.place.is_remote:
            for number in range(
                part * len(self.index) // n_parts, (part + 1) * len(self.index) // n_parts
            ):
                if not self.checked[number]:
                    self.check_range(
                        self.byte_range(number), self.place.is_whole(self.byte_range(number))
                    )
                    self.checked[number] = True


# ---- rows to batches


def make_batch(rows: Sequence[PackedSequence], document_mask: bool) -> Batch:
    """Rows as a Batch of numpy arrays [B, T].

    document_mask off makes each row one segment: positions run through, and a document's last token
    is trained to foresee the next
    document's first.
    """
    n_rows, seq_len = len(rows), len(rows[0].tokens)
    tokens = np.stack([row.tokens for row in rows])
    # every row's pieces, and after them its padding as one more, so that the lengths of all tile
    # the whole batch
    padding = [np.array([seq_len - row.doc_lens.sum()], np.int32) for row in rows]
    lengths = np.concatenate(
        [part for row, rest in zip(rows, padding, strict=True) for part in (row.doc_lens, rest)]
    )
    zero = np.zeros(1, np.int32)
    numbers = np.concatenate(
        [
            part
            for row in rows
            for part in (np.arange(1, len(row.doc_lens) + 1, dtype=np.int32), zero)
        ]
    )
    loss_from = np.concatenate([part for row in rows for part in (row.loss_from, zero)])

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, lengths).reshape(n_rows, seq_len)

    segments = spread(numbers)
    in_piece = np.arange(n_rows * seq_len, dtype=np.int32).reshape(n_rows, seq_len) - spread(
        (np.cumsum(lengths) - lengths).astype(np.int32)
    )
    trained = in_piece >= spread(loss_from)
    if document_mask:
        positions = in_piece
    else:
        segments = (segments > 0).astype(np.int32)
        positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), segments.shape) * segments
    weights = np.zeros((n_rows, seq_len), np.float32)
    weights[:, :-1] = trained[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    targets *= weights > 0
    return Batch(tokens, targets, segments, positions * (segments > 0), weights)


def iterate_batches(
    rows: PackedDataset,
    mixture: MixtureSchedule,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    first_sequence: int,
    document_mask: bool,
) -> Iterator[Batch]:
    """Batches without end, from global row first_row on.

    Threads make the next ones while the current one trains.

    Raises UserError when batch_size or the row length cannot be cut as the sharding asks.
    """
    local = local_sequence_ids(sharding, batch_size, rows.seq_len)
    remote = [source.place for source in rows.sources.values() if source.place.is_remote]
    for each in remote:
        each.start_fetch()
    rows.verify_all(jax.process_index(), jax.process_count())

    def places(step: int) -> list[tuple[str, int]]:
        return [mixture.sequence_at(first_sequence + step * batch_size + slot) for slot in local]

    def load(step: int) -> Batch:
        if rows.damage:
            raise rows.damage
        if remote:
            for later in range(step, step + PREFETCH_STEPS):
                rows.prefetch(places(later))
        return make_batch([rows.read_sequence(name, i) for name, i in places(step)], document_mask)

    dataset = grain.MapDataset.range(METRICS_NAME).map(load)
    iterator = iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    )
    try:
        for batch in iterator:
            yield make_global_batch(batch, local, sharding, batch_size)
    finally:
        iterator.close()


def iterate_heldout_batches(
    rows: PackedDataset,
    name: str,
    sharding: jax.sharding.NamedSharding,
    batch_size: int,
    n_sequences: int,
    document_mask: bool,
) -> Iterator[Batch]:
    """At most n_rows rows of a source, evenly spread over it and always the same.

    The last batch is filled with empty rows of weight 0.
    """
    local = local_sequence_ids(sharding, batch_size, rows.seq_len)
    available = rows.n_rows[name]
    n_sequences = min(n_sequences, available)
    empty = PackedSequence(
        np.zeros(rows.seq_len, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32)
    )
    for start in range(0, n_sequences, batch_size):
        chosen = [
            rows.read_sequence(name, k * available // n_sequences) if k < n_sequences else empty
            for k in (start + slot for slot in local)
        ]
        yield make_global_batch(make_batch(chosen, document_mask), local, sharding, batch_size)


def local_sequence_ids(
    sharding: jax.sharding.NamedSharding, batch_size: int, seq_len: int
) -> list[int]:
    """The slots of a global batch that this host's devices hold."""
    try:
        shards = sharding.addressable_devices_indices_map((batch_size, seq_len)).values()
    except ValueError as error:
        raise UserError(
            f"train.batch_size: {batch_size} rows of {seq_len} tokens cannot "
            f"be cut evenly over the mesh ({error}). Use multiples of its "
            "sizes."
        ) from None
    return sorted({slot for shard in shards for slot in range(*shard[0].indices(batch_size))})


def make_global_batch(
    batch: Batch, local: list[int], sharding: jax.sharding.NamedSharding, batch_size: int
) -> Batch:
    """This host's rows of a batch as their part of the global arrays [batch_size, T]."""

    def to_global(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, slice]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = bisect.bisect_left(local, start)
            return values[first : first + stop - start, index[1]]

        return jax.make_array_from_callback((batch_size, values.shape[1]), sharding, shard)

    return Batch(*map(to_global, batch))


# ---- which documents a step saw


class TracedDocument(NamedTuple):
    """A document, or a part of one, in a step."""

    slot: int  # row of the batch
    source: str
    sequence: int  # of the source
    document: str  # its id in the corpus
    tokens: np.ndarray  # int32


def trace_step(run: pathlib.Path, step: int, tokenizer: str) -> Iterator[TracedDocument]:
    """The documents of the step-th update of a run, counted from 1 as in metrics.jsonl, in the
    order of the batch.

    tokenizer is the fingerprint of the one that will read the tokens. Raises UserError where the
    run cannot be read.
    """
    _, rows, places = list_step_sequences(run, step)
    if rows.tokenizer != tokenizer:
        raise UserError(
            f"{run}: its tokenizer is {tokenizer}, but the rows were packed "
            f"with {rows.tokenizer}. They were packed anew since."
        )
    for slot, (name, i) in enumerate(places):
        row, start = rows.read_sequence(name, i), 0
        for document, length in zip(
            rows.read_document_ids(name, i), row.doc_lens.tolist(), strict=True
        ):
            yield TracedDocument(slot, name, i, document, row.tokens[start : start + length])
            start += length


def list_step_sequences(
    run: pathlib.Path, step: int
) -> tuple[config.Config, PackedDataset, list[tuple[str, int]]]:
    """(a run's settings, its rows, the (source, row) in each slot of its step-th update).

    Raises UserError where the run cannot be read.
    """
    try:
        settings = config.build_config(json.loads((run / "config.json").read_text()))
        stretches = [
            MixturePhase.from_json(each) for each in json.loads((run / "phases.json").read_text())
        ]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(
            f"{run}: has no readable config.json and phases.json ({error}). "
            "Give the directory of a training run."
        ) from None
    if not 1 <= step <= settings.train.steps:
        raise UserError(f"--step {step}: the run's steps are 1 to {settings.train.steps:,}.")
    rows = open_packed(settings.mixture.packed_paths or [run / "packed"])
    stretch = next(each for each in reversed(stretches) if each.step < step)
    if stretch.fingerprint != rows.fingerprint:
        raise UserError(
            f"{run}: step {step} read other rows than "
            f"{', '.join(settings.mixture.packed_paths) or run / 'packed'} "
            "holds now. Put those back."
        )
    mixture, first = (
        schedule_from_history(stretches, rows.n_rows, settings.mixture.seed),
        stretch.sequence + (step - 1 - stretch.step) * stretch.batch_size,
    )
    return settings, rows, [mixture.sequence_at(first + slot) for slot in range(stretch.batch_size)]
