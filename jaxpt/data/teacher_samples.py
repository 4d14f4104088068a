"""Store what a teacher was sampled for beside packed sequences, and read it in their order.

`jaxpt teacher_logits` writes a directory: per source, files of rows, one row per sequence and in
their order, so that a sequence's place among the packed ones is its samples' place too. A row is
the ids, [T, K], the mean log-probabilities, float32 [T], and the CRC-32 of both.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxpt import io
from jaxpt.data.storage import BucketStorage, ByteRange, open_storage
from jaxpt.spec import Record, TeacherSamples, UserError
from jaxpt.text import name_some

STAGE = "teacher_logits"
FILE_BYTES = 2**26  # of a file, about: what a killed command computes again
# CRC-32 of any bytes followed by their own CRC-32, little-endian
CRC_RESIDUE = 0x2144DF1C


@dataclasses.dataclass(frozen=True)
class SampledSource(Record):
    """A source whose sequences were sampled."""

    packed: str  # fingerprint of the set that holds them
    n_sequences: int


@dataclasses.dataclass(frozen=True)
class SampleCounts(Record):
    """Manifest.counts of the stage."""

    seq_len: int
    n_samples: int  # per position
    vocab_size: int  # the teacher's
    temperature: float
    document_mask: bool  # whether the teacher saw a token's own document alone
    sources: dict[str, SampledSource]

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """The smallest integers that hold the ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def row_bytes(self) -> int:
        """Bytes of a sequence's row."""
        return self.seq_len * (self.n_samples * self.id_dtype.itemsize + 4) + 4

    @property
    def rows_per_file(self) -> int:
        """Rows of every file of a source but the last."""
        return max(1, FILE_BYTES // self.row_bytes)

    def locate_row(self, name: str, i: int) -> ByteRange:
        """Return where the row of a source's i-th sequence lies."""
        number, place = divmod(i, self.rows_per_file)
        start = place * self.row_bytes
        return ByteRange(file_name(name, number), start, self.row_bytes, CRC_RESIDUE)

    def list_files(self) -> dict[str, tuple[str, range]]:
        """Return file -> the source and the sequences that it is of."""
        files = {}
        for name, source in self.sources.items():
            starts = range(0, source.n_sequences, self.rows_per_file)
            for number, start in enumerate(starts):
                stop = min(start + self.rows_per_file, source.n_sequences)
                files[file_name(name, number)] = (name, range(start, stop))
        return files


def file_name(source: str, number: int) -> str:
    """Return the name of a source's file below the directory."""
    return f"train/{source}/samples-{number:05d}.bin"


def write_rows(file: pathlib.Path, counts: SampleCounts, samples: Iterable[TeacherSamples]) -> None:
    """Write the samples of consecutive sequences, [T, K] and [T] each."""
    with io.open_write(file) as out:
        for ids, mean_log_prob in samples:
            row = np.asarray(ids).astype(counts.id_dtype).tobytes()
            row += np.asarray(mean_log_prob, "<f4").tobytes()
            out.write(row + zlib.crc32(row).to_bytes(4, "little"))


class SampleReader:
    """Reads the samples of sequences.

    Attributes:
        counts: what was sampled, and how.
        fingerprint: of the directory.
    """

    def __init__(self, where: io.Path | str):
        """Open a directory. Raise UserError if files are missing or have another size."""
        self.storage = open_storage(where)
        manifest = self.storage.manifest
        self.fingerprint = manifest.fingerprint
        self.counts = SampleCounts.from_json(manifest.counts, str(where))
        for file, (_, rows) in self.counts.list_files().items():
            expected, size = len(rows) * self.counts.row_bytes, self.storage.sizes.get(file)
            if size != expected:
                found = "missing" if size is None else f"{size:,} bytes, expected {expected:,}"
                raise UserError(
                    f"{self.storage.where}/{file}: {found}. Copy it from where the rest came from, "
                    f"or run jaxpt {STAGE} with --replace."
                )

    def read_sequence(self, name: str, i: int) -> TeacherSamples:
        """Return a sequence's samples, int32 [T, K] and float32 [T].

        Raises:
            UserError: its row is damaged.
        """
        place = self.counts.locate_row(name, i)
        row = bytes(self.storage.read_range(place))
        if len(row) != place.n_bytes or zlib.crc32(row) != CRC_RESIDUE:
            raise UserError(
                f"{self.storage.where}/{place.name}: damaged bytes from {place.start:,} on. Copy "
                f"it again, or run jaxpt {STAGE} with --replace."
            )
        T, K, dtype = self.counts.seq_len, self.counts.n_samples, self.counts.id_dtype
        ids = np.frombuffer(row, dtype, T * K).reshape(T, K)
        mean_log_prob = np.frombuffer(row, "<f4", T, ids.nbytes)
        return TeacherSamples(ids.astype(np.int32), mean_log_prob.astype(np.float32))

    def read_batch(self, places: Sequence[tuple[str, int]]) -> TeacherSamples:
        """Return the samples of sequences (source, index), [B, T, K] and [B, T]."""
        rows = [self.read_sequence(name, i) for name, i in places]
        ids, mean_log_probs = zip(*rows, strict=True)
        return TeacherSamples(np.stack(ids), np.stack(mean_log_probs))

    def prefetch(self, places: Sequence[tuple[str, int]]) -> None:
        """Begin to fetch what lies in a bucket."""
        if isinstance(self.storage, BucketStorage):
            for name, i in places:
                self.storage.prefetch(self.counts.locate_row(name, i))

    def check_sequences(self, packed: dict[str, str], document_mask: bool) -> None:
        """Raise UserError unless the samples are of these sequences, seen as a run sees them.

        Args:
            packed: source that is read -> fingerprint of the set that holds it.
            document_mask: mixture.document_mask of the run.
        """
        where, counts = self.storage.where, self.counts
        again = f"Run jaxpt {STAGE} with this recipe and another --to"
        other = []
        for name, fingerprint in packed.items():
            if name not in counts.sources or counts.sources[name].packed != fingerprint:
                other.append(name)
        if other:
            raise UserError(
                f"distill.teacher: {where} has no samples of the sequences that are read of "
                f"{name_some(other)}: they were packed again, or are of another set. {again}."
            )
        if counts.document_mask != document_mask:
            raise UserError(
                f"distill.teacher: {where} was sampled with mixture.document_mask = "
                f"{counts.document_mask}, and the run has {document_mask}. {again}."
            )
