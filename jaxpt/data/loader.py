"""Read packed sequences from disks and buckets, and make them sharded global Batches.

Step i holds the same sequences in the same slots on any mesh and any number of hosts. Each host
reads only the sequences that its devices' shards hold, which the sharding tells. The position in
the data is one integer, the number of global sequences read; the rest is `jaxpt.data.mixture`, a
pure function of it.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import threading
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Literal, NamedTuple

import grain
import jax
import numpy as np
import pyarrow as pa
from absl import flags
from jax.sharding import NamedSharding

from jaxpt import io, stage
from jaxpt.config import Config, build_config
from jaxpt.data import pack
from jaxpt.data.mixture import MixturePhase, MixtureSchedule, schedule_from_history
from jaxpt.data.storage import BucketStorage, ByteRange, LocalStorage, open_storage
from jaxpt.data.teacher_samples import SampleReader
from jaxpt.spec import Batch, Manifest, UserError

# of a set on disk: below, opening compares all checksums, which takes well under a second
MAX_BYTES_VERIFIED_AT_OPEN = 500e6
MAX_OPEN_BYTES = 256e6  # of record batches that are kept open, of about 1 MB each
PREFETCH_STEPS = 8  # steps ahead whose sequences are requested from a bucket
N_ENDLESS_STEPS = 2**40  # grain needs a length; a stream has no end of its own

Split = Literal["train", "heldout"]
Place = tuple[str, int]  # source name, index of a sequence in it
ZERO = np.zeros(1, np.int32)

if not flags.FLAGS.is_parsed():
    # grain reads absl flags, and refuses under a program that never parsed any
    flags.FLAGS.mark_as_parsed()


def open_packed(packed_paths: Sequence[io.Path | str], split: Split = "train") -> PackedDataset:
    """Open one split of directories that jaxpt pack wrote.

    Every shard must have its size. The checksums of sets on disk are compared at once up to
    MAX_BYTES_VERIFIED_AT_OPEN bytes; beyond that a record batch is checked before its first
    sequence is returned, and `iterate_batches` checks the rest in the background.

    Args:
        packed_paths: directories, on a disk or in a bucket.
        split: which of their splits.

    Raises:
        UserError: directories differ in seq_len or tokenizer, name a source twice, or lack a shard
            or hold a damaged one.
    """
    if not packed_paths:
        raise UserError(
            "mixture.packed_paths: no packed directory given. "
            "Name at least one that jaxpt pack wrote."
        )
    stores = [open_storage(path) for path in packed_paths]
    counts = [parse_counts(store) for store in stores]
    first_store = stores[0]
    first_counts = counts[0]
    readers: dict[str, PackedSourceReader] = {}
    for store, own in zip(stores, counts, strict=True):
        require_same_packing(store, own, first_store, first_counts)
        sources = getattr(own, split)
        for name, source in sources.items():
            if name in readers:
                raise UserError(
                    f"{store.where}: source {name} was opened from another directory already. "
                    "Prepare one of them under another name."
                )
            directory = f"{split}/{name}"
            readers[name] = PackedSourceReader(store, directory, source, own.seq_len)
    if split == "train" and not readers:
        raise UserError(
            f"{first_store.where}: holds no packed source. Prepare and pack a corpus that has text."
        )
    n_bytes = sum(reader.n_local_bytes for reader in readers.values())
    if n_bytes < MAX_BYTES_VERIFIED_AT_OPEN:
        for reader in readers.values():
            reader.verify()
    return PackedDataset(readers, split, first_counts, first_store.manifest)


def parse_counts(store: LocalStorage | BucketStorage) -> pack.PackCounts:
    """Return what jaxpt pack counted. Raise UserError if another stage wrote the directory."""
    manifest = store.manifest
    if manifest.stage != "pack":
        raise UserError(
            f"{store.where}: was made by {manifest.stage}, expected packed sequences. "
            "Name the directory that jaxpt pack wrote."
        )
    return pack.PackCounts.from_json(manifest.counts, str(store.where))


def require_same_packing(
    store: LocalStorage | BucketStorage,
    counts: pack.PackCounts,
    first: LocalStorage | BucketStorage,
    first_counts: pack.PackCounts,
) -> None:
    """Raise UserError if a directory differs from the first in seq_len or tokenizer."""
    if counts.seq_len != first_counts.seq_len:
        raise UserError(
            f"{store.where}: its sequences have {counts.seq_len} tokens, those of {first.where} "
            f"have {first_counts.seq_len}. Pack both with one pack.seq_len."
        )
    tokenizer = store.manifest.tokenizer
    first_tokenizer = first.manifest.tokenizer
    if tokenizer != first_tokenizer:
        raise UserError(
            f"{store.where}: packed with tokenizer {tokenizer}, {first.where} with "
            f"{first_tokenizer}. Pack both with one tokenizer."
        )


NO_SPANS = np.zeros(0, np.int32)


class PackedSequence(NamedTuple):
    """One packed sequence, as views of the mapped file.

    Attributes:
        tokens: int32 [T], padding 0 at the end.
        doc_lens: int32 [segments], tokens of each document or part of one.
        loss_from: int32 [segments], index of the first trained token of each.
        untrained: int32 [2 n], start, stop, start, ... of further tokens that are not trained on.
    """

    tokens: np.ndarray
    doc_lens: np.ndarray
    loss_from: np.ndarray
    untrained: np.ndarray = NO_SPANS


class PackedDataset:
    """Random access to all sequences of some packed sources.

    Attributes:
        names: the sources.
        n_sequences: source -> number of sequences.
        counts: source -> what jaxpt pack counted.
        unigram_nats: source -> loss of the unigram baseline, nats per token.
        seq_len: tokens per sequence.
        vocab_size: of the tokenizer; token ids are below it.
        n_ids: largest id of a token + 1.
        special_tokens: the tokenizer's.
        tokenizer: its fingerprint.
        fingerprint: of all sequences.
        damage: the error that the verification in the background found.
    """

    def __init__(
        self,
        sources: Mapping[str, PackedSourceReader],
        split: Split,
        counts: pack.PackCounts,
        manifest: Manifest,
    ):
        """Gather the sources' counts."""
        self.sources = dict(sources)
        self.names = sorted(sources)
        self.counts: dict[str, pack.PackedSource] = {}
        self.n_sequences: dict[str, int] = {}
        self.unigram_nats: dict[str, float] = {}
        fingerprints = {}
        for name in self.names:
            source = sources[name]
            self.counts[name] = source.counts
            self.n_sequences[name] = source.n_sequences
            self.unigram_nats[name] = source.counts.unigram_nats
            fingerprints[name] = source.fingerprint
        self.seq_len = counts.seq_len
        self.vocab_size = counts.vocab_size
        self.n_ids = max((source.n_ids for source in self.counts.values()), default=1)
        self.special_tokens = counts.special_tokens
        self.tokenizer = manifest.tokenizer
        self.fingerprint = stage.fingerprint([split, fingerprints])
        self.open_batches: collections.OrderedDict[Place, RecordBatchView] = (
            collections.OrderedDict()
        )
        self.n_open_bytes = 0
        self.lock = threading.Lock()
        self.verification: threading.Thread | None = None
        self.damage: UserError | None = None

    def read_sequence(self, name: str, i: int) -> PackedSequence:
        """Return one sequence of a source."""
        batch, k = self.open_record_batch(name, i)
        tokens = batch.input_ids[k]
        segments = slice(batch.offsets[k], batch.offsets[k + 1])
        doc_lens = batch.doc_lens[segments]
        loss_from = batch.loss_from[segments]
        spans = slice(batch.span_offsets[k], batch.span_offsets[k + 1])
        return PackedSequence(tokens, doc_lens, loss_from, batch.untrained[spans])

    def read_document_ids(self, name: str, i: int) -> list[str]:
        """Return the document that each segment of a sequence comes from."""
        batch, k = self.open_record_batch(name, i)
        return batch.record_batch.column("doc_ids")[k].as_py()

    def open_record_batch(self, name: str, i: int) -> tuple[RecordBatchView, int]:
        """Return the record batch that holds a source's i-th sequence, and the index in it.

        Those that were used last stay open, MAX_OPEN_BYTES of them.
        """
        source = self.sources[name]
        number, k = source.locate_sequence(i)
        key = name, number
        with self.lock:
            cached = self.open_batches.get(key)
            if cached is not None:
                self.open_batches.move_to_end(key)
                return cached, k
        batch = source.read_record_batch(number)
        with self.lock:
            if key not in self.open_batches:
                self.n_open_bytes += source.get_byte_range(number).n_bytes
            self.open_batches[key] = batch
            evicted = list(self.evict_batches())
        for old_source, byte_range in evicted:
            old_source.storage.close(byte_range)
        return batch, k

    def evict_batches(self) -> Iterator[tuple[PackedSourceReader, ByteRange]]:
        """Yield the record batches used longest ago, taken off the list, all but the newest."""
        while self.n_open_bytes > MAX_OPEN_BYTES and len(self.open_batches) > 1:
            (name, number), _ = self.open_batches.popitem(last=False)
            source = self.sources[name]
            byte_range = source.get_byte_range(number)
            self.n_open_bytes -= byte_range.n_bytes
            yield source, byte_range

    def prefetch_sequences(self, places: Sequence[Place]) -> None:
        """Begin to fetch those of the sequences that lie in a bucket."""
        for name, i in places:
            source = self.sources[name]
            storage = source.storage
            number, _ = source.locate_sequence(i)
            is_open = (name, number) in self.open_batches
            if isinstance(storage, BucketStorage) and not is_open:
                byte_range = source.get_byte_range(number)
                storage.prefetch(byte_range)

    def start_verification(self, part: int, n_parts: int) -> None:
        """Compare the checksums of a part of every set on disk, in a thread; sets `damage`."""

        def verify() -> None:
            try:
                for source in self.sources.values():
                    source.verify(part, n_parts)
            except UserError as error:
                self.damage = error

        if self.verification is None:
            self.verification = threading.Thread(target=verify, daemon=True, name="checksums")
            self.verification.start()


class RecordBatchView(NamedTuple):
    """A record batch and views of its columns."""

    record_batch: pa.RecordBatch
    input_ids: np.ndarray  # int32 [sequences, T]
    offsets: np.ndarray  # int32 [sequences + 1], where the segments of each sequence begin
    doc_lens: np.ndarray  # int32 [segments]
    loss_from: np.ndarray  # int32 [segments]
    span_offsets: np.ndarray  # int32 [sequences + 1], where those of each sequence begin
    untrained: np.ndarray  # int32 [2 spans]


class PackedSourceReader:
    """Reads one packed source, a record batch at a time.

    Attributes:
        n_sequences: of the source.
        n_local_bytes: bytes of its shards on disk; 0 in a bucket.
        index: int [record batches, 5]: shard, first byte, bytes, sequences, CRC-32.
        is_verified: bool [record batches], whether the checksum was compared.
    """

    def __init__(
        self,
        storage: LocalStorage | BucketStorage,
        directory: str,
        counts: pack.PackedSource,
        seq_len: int,
    ):
        """Read the index. Raise UserError if a file is missing, cut short or damaged."""
        self.storage = storage
        self.directory = directory
        self.counts = counts
        self.seq_len = seq_len
        self.fingerprint = storage.manifest.fingerprint
        self.shard_paths = [f"{directory}/{shard.file}" for shard in counts.shards]
        self.n_local_bytes = 0
        for path, shard in zip(self.shard_paths, counts.shards, strict=True):
            self.require_size(path, shard.n_bytes)
            if isinstance(storage, LocalStorage):
                self.n_local_bytes += shard.n_bytes
        index_path = f"{directory}/{pack.INDEX_FILE}"
        self.require_size(index_path, None)
        index = storage.read_file_bytes(index_path)
        checksum = hashlib.sha256(index).hexdigest()
        if checksum != storage.manifest.outputs[index_path]:
            raise self.make_damage_error(pack.INDEX_FILE, "its checksum is not the manifest's")
        self.index = np.load(BytesIO(index))
        sequence_counts = self.index[:, 3]
        # the first sequence of each record batch
        self.first_sequences = np.cumsum([0, *sequence_counts])
        self.n_sequences = int(self.first_sequences[-1])
        self.is_verified = np.zeros(len(self.index), bool)

    def require_size(self, path: str, n_bytes: int | None) -> None:
        """Raise UserError if a file is missing, or has another size than n_bytes, if given."""
        where = f"{self.storage.where}/{path}"
        size = self.storage.sizes.get(path)
        if size is None:
            raise UserError(
                f"{where}: missing, though the manifest names it. Copy it from where the rest came "
                "from, or run jaxpt pack with --replace."
            )
        if n_bytes is not None and size != n_bytes:
            raise UserError(
                f"{where}: {size:,} bytes, expected {n_bytes:,}: a broken copy. Copy it again, or "
                "run jaxpt pack with --replace."
            )

    def make_damage_error(self, file: str, reason: str) -> UserError:
        """Return the error for a damaged file."""
        return UserError(
            f"{self.storage.where}/{self.directory}/{file}: {reason}: damaged bytes. "
            "Copy it again, or run jaxpt pack with --replace."
        )

    def locate_sequence(self, i: int) -> tuple[int, int]:
        """Return the number of the record batch that holds sequence i, and the index in it."""
        if not 0 <= i < self.n_sequences:
            raise IndexError(f"sequence {i} of {self.n_sequences}")
        n_begun = np.searchsorted(self.first_sequences, i, side="right")
        number = int(n_begun) - 1
        first = int(self.first_sequences[number])
        return number, i - first

    def get_byte_range(self, number: int) -> ByteRange:
        """Return where a record batch lies."""
        shard, start, n_bytes, _, crc = self.index[number].tolist()
        return ByteRange(self.shard_paths[shard], start, n_bytes, crc)

    def read_record_batch(self, number: int) -> RecordBatchView:
        """Open a record batch. Raise UserError if its bytes are not those that jaxpt pack wrote."""
        byte_range = self.get_byte_range(number)
        data = self.storage.read_range(byte_range)
        if not self.is_verified[number]:
            is_intact = zlib.crc32(data) == byte_range.crc
            self.require_intact(byte_range, is_intact)
            # what is fetched again is checked again
            self.is_verified[number] = isinstance(self.storage, LocalStorage)
        schema = pack.packed_schema(self.seq_len)
        batch = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
        token_column = batch.column("input_ids")
        input_ids = token_column.values.to_numpy().reshape(-1, self.seq_len)
        segment_column = batch.column("doc_lens")
        offsets = segment_column.offsets.to_numpy()
        doc_lens = segment_column.values.to_numpy()
        loss_from_column = batch.column("loss_from")
        loss_from = loss_from_column.values.to_numpy()
        spans = batch.column("untrained")
        untrained = spans.values.to_numpy()
        columns = (input_ids, offsets, doc_lens, loss_from, spans.offsets.to_numpy(), untrained)
        return RecordBatchView(batch, *columns)

    def require_intact(self, byte_range: ByteRange, is_intact: bool) -> None:
        """Raise UserError for a range that is not intact."""
        if not is_intact:
            file = byte_range.name.removeprefix(f"{self.directory}/")
            last = byte_range.start + byte_range.n_bytes - 1
            span = f"bytes {byte_range.start:,} to {last:,}"
            raise self.make_damage_error(file, f"the checksum of {span} is not the index's")

    def verify(self, part: int = 0, n_parts: int = 1) -> None:
        """Compare the checksums of the part-th of n_parts of the record batches, if on disk.

        Raises:
            UserError: a shard is damaged.
        """
        if not isinstance(self.storage, LocalStorage):
            return
        n = len(self.index)
        first = part * n // n_parts
        stop = (part + 1) * n // n_parts
        for number in range(first, stop):
            if not self.is_verified[number]:
                byte_range = self.get_byte_range(number)
                is_intact = self.storage.is_whole(byte_range)
                self.require_intact(byte_range, is_intact)
                self.is_verified[number] = True


# ---- sequences to batches


def make_batch(sequences: Sequence[PackedSequence], document_mask: bool) -> Batch:
    """Make a Batch of numpy arrays [B, T].

    Args:
        sequences: B packed sequences.
        document_mask: False makes each sequence one segment: positions count on, and a document's
            last token is trained to predict the next document's first.
    """
    tokens = np.stack([sequence.tokens for sequence in sequences])
    shape = tokens.shape
    _, seq_len = shape
    # the padding of a sequence is one more segment, so that all lengths together tile the batch
    lengths = []
    numbers = []
    loss_from = []
    for sequence in sequences:
        doc_lens = sequence.doc_lens
        n_padding = seq_len - doc_lens.sum()
        lengths += [doc_lens, np.array([n_padding], np.int32)]
        n_documents = len(doc_lens)
        numbers += [np.arange(1, n_documents + 1, dtype=np.int32), ZERO]
        loss_from += [sequence.loss_from, ZERO]
    lengths = np.concatenate(lengths)

    def spread(values: np.ndarray) -> np.ndarray:
        """Repeat one value per segment over its tokens."""
        return np.repeat(values, lengths).reshape(shape)

    segment_ids = spread(np.concatenate(numbers))
    ends = np.cumsum(lengths)
    starts = (ends - lengths).astype(np.int32)
    index = np.arange(tokens.size, dtype=np.int32).reshape(shape)
    positions = index - spread(starts)
    is_trained = positions >= spread(np.concatenate(loss_from))
    for row, sequence in zip(is_trained, sequences, strict=True):
        for start, stop in sequence.untrained.reshape(-1, 2):
            row[start:stop] = False
    if not document_mask:
        segment_ids = (segment_ids > 0).astype(np.int32)
        all_positions = np.arange(seq_len, dtype=np.int32)
        positions = np.broadcast_to(all_positions, shape)
    is_text = segment_ids > 0
    is_continued = segment_ids[:, 1:] == segment_ids[:, :-1]
    loss_mask = np.zeros(shape, np.float32)
    loss_mask[:, :-1] = is_trained[:, 1:] & is_continued & is_text[:, 1:]
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    targets *= loss_mask > 0
    return Batch(tokens, targets, segment_ids, positions * is_text, loss_mask)


def cut_batch(batch: Batch, n: int) -> Batch:
    """Return [B, T] as [B n, T / n]: the n equal parts of each sequence, one after the other.

    Each part counts positions from its own start. No target is lost: the last one of a part is the
    first token of the next.
    """
    if n == 1:
        return batch
    parts = jax.tree.map(lambda x: x.reshape(n * len(x), -1), batch)
    is_cut = parts.segment_ids == parts.segment_ids[:, :1]  # in the part before it began
    positions = parts.positions - is_cut * parts.positions[:, :1]
    return parts._replace(positions=positions)


def iterate_batches(
    dataset: PackedDataset,
    schedule: MixtureSchedule,
    sharding: NamedSharding,
    batch_size: int,
    first_sequence: int,
    document_mask: bool,
    samples: SampleReader | None = None,
    seq_len: int | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches without end, from global sequence first_sequence on.

    Threads make the next ones while the current one trains.

    Args:
        dataset: the packed sequences.
        schedule: their order.
        sharding: of a batch.
        batch_size: global.
        first_sequence: the packed sequence to begin with.
        document_mask: whether a document sees only itself.
        samples: a teacher's, of which each batch brings those of its sequences.
        seq_len: of a batch; packed sequences are cut into parts of it. None: they stay whole.

    Raises:
        UserError: the sharding does not divide batch_size or seq_len, or a shard is damaged.
    """
    seq_len = seq_len or dataset.seq_len
    n_parts = dataset.seq_len // seq_len
    slots = list_local_slots(sharding, batch_size, seq_len)
    # the packed sequences of a step of which this host reads parts, and each one's place among them
    read = {k: place for place, k in enumerate(dict.fromkeys(slot // n_parts for slot in slots))}
    kept = [n_parts * read[slot // n_parts] + slot % n_parts for slot in slots]
    storages = [source.storage for source in dataset.sources.values()]
    storages += [samples.storage] if samples else []
    remote = [storage for storage in storages if isinstance(storage, BucketStorage)]
    for storage in remote:
        storage.start_fetch()
    dataset.start_verification(jax.process_index(), jax.process_count())

    def list_places(step: int) -> list[Place]:
        first = first_sequence + step * batch_size // n_parts
        return [schedule.sequence_at(first + k) for k in read]

    def load(step: int) -> Batch:
        if dataset.damage:
            raise dataset.damage
        if remote:
            for later in range(step, step + PREFETCH_STEPS):
                places = list_places(later)
                dataset.prefetch_sequences(places)
                if samples:
                    samples.prefetch(places)
        places = list_places(step)
        sequences = [dataset.read_sequence(name, i) for name, i in places]
        batch = make_batch(sequences, document_mask)
        if samples:
            batch = batch._replace(samples=samples.read_batch(places))
        parts = cut_batch(batch, n_parts)
        if len(kept) == len(parts.tokens):
            return parts
        return jax.tree.map(lambda x: x[kept], parts)

    steps = grain.MapDataset.range(N_ENDLESS_STEPS).map(load)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator = iter(steps.to_iter_dataset(options))
    try:
        for batch in iterator:
            yield make_global_batch(batch, slots, sharding, batch_size)
    finally:
        iterator.close()


def iterate_heldout_batches(
    dataset: PackedDataset,
    name: str,
    sharding: NamedSharding,
    batch_size: int,
    n_sequences: int,
    document_mask: bool,
    seq_len: int | None = None,
) -> Iterator[Batch]:
    """Yield at most n_sequences sequences of a source, evenly spread and always the same.

    The last batch is filled up with empty sequences, whose loss mask is 0. Where seq_len is
    shorter, batches hold the equal parts of batch_size sequences.
    """
    n_parts = dataset.seq_len // (seq_len or dataset.seq_len)
    slots = list_local_slots(sharding, batch_size, dataset.seq_len)
    available = dataset.n_sequences[name]
    n_sequences = min(n_sequences, available)
    padding = np.zeros(dataset.seq_len, np.int32)
    nothing = np.zeros(0, np.int32)
    empty = PackedSequence(padding, nothing, nothing)
    for start in range(0, n_sequences, batch_size):
        sequences = []
        for slot in slots:
            k = start + slot
            sequence = empty
            if k < n_sequences:
                i = k * available // n_sequences
                sequence = dataset.read_sequence(name, i)
            sequences.append(sequence)
        batch = cut_batch(make_batch(sequences, document_mask), n_parts)
        of_parts = [n_parts * slot + part for slot in slots for part in range(n_parts)]
        yield make_global_batch(batch, of_parts, sharding, n_parts * batch_size)


def list_local_slots(sharding: NamedSharding, batch_size: int, seq_len: int) -> list[int]:
    """Return the slots of a global batch that this host's devices hold, sorted."""
    try:
        shards = sharding.addressable_devices_indices_map((batch_size, seq_len))
    except ValueError as error:
        raise UserError(
            f"train.batch_size: {batch_size} sequences of {seq_len} tokens cannot be sharded "
            f"evenly over the mesh ({error}). Use multiples of its sizes."
        ) from None
    slots: set[int] = set()
    for index in shards.values():
        assert index is not None
        start, stop, _ = index[0].indices(batch_size)
        slots.update(range(start, stop))
    return sorted(slots)


def make_global_batch(
    batch: Batch, slots: list[int], sharding: NamedSharding, batch_size: int
) -> Batch:
    """Return global arrays [batch_size, T], of which this host holds the sequences of its slots."""

    def make_global(values: np.ndarray) -> jax.Array:
        def get_shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = bisect.bisect_left(slots, start)
            return values[first : first + stop - start, index[1]]

        shape = batch_size, *values.shape[1:]
        return jax.make_array_from_callback(shape, sharding, get_shard)

    return jax.tree.map(make_global, batch)


# ---- which documents a step read


class TracedDocument(NamedTuple):
    """A document, or a part of one, that a step read."""

    slot: int  # of the batch
    source: str
    sequence: int  # index in the source
    document: str  # its id in the corpus
    tokens: np.ndarray  # int32


class StepSequences(NamedTuple):
    """What a step of a run read."""

    config: Config  # of the run
    dataset: PackedDataset
    places: list[Place]  # of each slot
    n_parts: int  # into which each was cut


def trace_step(run: io.Path, step: int, tokenizer: str) -> Iterator[TracedDocument]:
    """Yield the documents of one step of a run, in the order of the batch.

    Args:
        run: the run directory.
        step: counted from 1, as in metrics.jsonl.
        tokenizer: fingerprint of the one that will decode the tokens.

    Raises:
        UserError: the run cannot be read.
    """
    _, dataset, places, _ = list_step_sequences(run, step)
    if dataset.tokenizer != tokenizer:
        raise UserError(
            f"{run}: its tokenizer is {tokenizer}, but the sequences were packed with "
            f"{dataset.tokenizer}. They were packed again since."
        )
    for slot, (name, i) in enumerate(places):
        sequence = dataset.read_sequence(name, i)
        ids = dataset.read_document_ids(name, i)
        lengths = sequence.doc_lens.tolist()
        start = 0
        for document, length in zip(ids, lengths, strict=True):
            stop = start + length
            tokens = sequence.tokens[start:stop]
            yield TracedDocument(slot, name, i, document, tokens)
            start = stop


def list_step_sequences(run: io.Path, step: int) -> StepSequences:
    """Return what a step of a run read. Raise UserError if the run cannot be read."""
    try:
        config = build_config(io.read_record(run / "config.json"))
        history = io.read_record(run / "phases.json")
    except io.FileError as error:
        raise UserError(
            f"{run}: has no readable config.json and phases.json ({error}) "
            "Give the directory of a training run."
        ) from None
    phases = [MixturePhase.from_json(fields) for fields in history]
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: expected a step of the run, 1 to {config.train.steps:,}.")
    packed_paths = config.mixture.packed_paths or (run / "packed",)
    dataset = open_packed(packed_paths)
    phase = next(phase for phase in reversed(phases) if phase.step < step)
    if phase.fingerprint != dataset.fingerprint:
        raise UserError(
            f"{run}: step {step} read other sequences than {', '.join(map(str, packed_paths))} "
            "holds now. Restore the original ones."
        )
    schedule = schedule_from_history(phases, dataset.n_sequences, config.mixture.seed)
    places = [schedule.sequence_at(k) for k in schedule.sequences_of(step)]
    lengths = [dataset.seq_len]
    lengths += [length for start, _, length in config.train.shape_schedule if start < step]
    return StepSequences(config, dataset, places, dataset.seq_len // lengths[-1])
