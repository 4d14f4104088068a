"""The rows of documents between the passes: what a file of them holds, written and read.

Files are Arrow's. A pass writes columns beside those of the pass before, row beside row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from jaxpt import io

STRING = pa.string()
INT32 = pa.int32()
INT64 = pa.int64()
CORPUS_FIELDS = {"id": STRING, "source": STRING, "text": STRING}
CORPUS_FIELDS |= {"prompt_chars": INT32, "meta": STRING}
CORPUS_SCHEMA = pa.schema(CORPUS_FIELDS)  # of the shards
READ_FIELDS = {"id": STRING, "text": STRING, "prompt_chars": INT32, "meta": STRING}
READ_FIELDS |= {"digest": pa.binary(32), "chars": INT64, "bytes": INT64}
READ_SCHEMA = pa.schema(READ_FIELDS)
COMPRESSION = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)

FilePart = tuple[str, str, int]  # file as read, file as judged, first row


@dataclasses.dataclass(frozen=True)
class DocumentTable:
    """n documents in canonical order, in files: as read and as judged, row beside row."""

    names: list[str]  # of the sources
    files: list[ReadFile]
    judged: list[pathlib.Path]
    starts: np.ndarray  # [files + 1] the first row of each file, and n
    heldout: int  # documents whose split number is below it are held out

    @property
    def n(self) -> int:
        """Number of documents."""
        return int(self.starts[-1])

    def iterate_files(self, *columns: str) -> Iterator[tuple]:
        """Yield for each file the slice of its rows, its source and the columns."""
        for k, file in enumerate(self.files):
            values = []
            for name in columns:
                path = self.judged[k]
                if name in READ_SCHEMA.names:
                    path = file.path
                column = read_column(path, name)
                values.append(column)
            rows = slice(*self.starts[k : k + 2])
            yield rows, file.source, *values

    def read_all(self, column: str) -> np.ndarray:
        """Return a column, [n]."""
        parts = [values for _, _, values in self.iterate_files(column)]
        return np.concatenate(parts)

    def locate(self, first: int, stop: int) -> list[FilePart]:
        """Return the files that hold rows from `first` up to `stop`."""
        i = np.searchsorted(self.starts, first, "right") - 1
        j = np.searchsorted(self.starts, stop)
        parts = []
        for k in range(i, j):
            path = str(self.files[k].path)
            judged = str(self.judged[k])
            start = int(self.starts[k])
            parts.append((path, judged, start))
        return parts


class ReadFile(NamedTuple):
    """A file of rows, in canonical order."""

    path: pathlib.Path
    source: int
    n: int
    hash_threshold: int  # of the sampling number: documents from it on are left out


@contextlib.contextmanager
def open_arrow_writer(file: pathlib.Path, schema: pa.Schema) -> Iterator[Any]:
    """Open an Arrow file for record batches. It gets its name when it is complete."""
    with (
        io.writing(file) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=COMPRESSION) as out,
    ):
        yield out


def read_column(path: pathlib.Path, name: str) -> Any:
    """Return a column of a file; nothing else of the file is read.

    Returns:
        Numbers as an array, digests as [n, bytes / 8] uint64, bytes as Arrow has them.
    """
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        reader = open_one_column(file, schema.get_field_index(name))
        table = reader.read_all()
        column = table.column(0).combine_chunks()
    if pa.types.is_binary(column.type):
        return column
    if pa.types.is_fixed_size_binary(column.type):
        return number_texts(column)
    return column.to_numpy()


def number_texts(digests: pa.FixedSizeBinaryArray) -> np.ndarray:
    """Return n digests as [n, bytes / 8] uint64."""
    n_bytes = digests.type.byte_width
    width = n_bytes // 8
    _, buffer = digests.buffers()
    start = digests.offset * n_bytes
    n_numbers = len(digests) * width
    numbers = np.frombuffer(buffer, ">u8", n_numbers, start)
    rows = numbers.reshape(-1, width)
    return rows.astype(np.uint64)


def iterate_batches_of_file(
    path: str | pathlib.Path, first: int = 0, stop: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file from `first` up to `stop`, a few at a time."""
    with pa.OSFile(str(path)) as file:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        reader = pa.ipc.open_file(file, options=options)
        start = 0
        for i, n_rows in enumerate(count_batch_rows(path)):
            end = start + n_rows
            if stop is not None and start >= stop:
                return
            if end > first:
                skipped = max(first - start, 0)
                batch = reader.get_batch(i).slice(skipped)
                if stop is not None:
                    n_left = stop - start - skipped
                    batch = batch.slice(0, n_left)
                yield batch
            start = end


def count_batch_rows(path: str | pathlib.Path) -> list[int]:
    """Return the rows of each batch of a file, from its smallest column."""
    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
        is_integer = [pa.types.is_integer(field.type) for field in schema]
        smallest = is_integer.index(True)
        reader = open_one_column(file, smallest)
        batch_numbers = range(reader.num_record_batches)
        batches = map(reader.get_batch, batch_numbers)
        return [batch.num_rows for batch in batches]


def open_one_column(file: pa.OSFile, index: int) -> Any:
    """Return the reader of a single column of an Arrow file."""
    options = pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False)
    return pa.ipc.open_file(file, options=options)


def count_file_bytes(files: list[ReadFile]) -> int:
    """Return the bytes of the files on disk."""
    return sum(io.size(file.path) or 0 for file in files)
