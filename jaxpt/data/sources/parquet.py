"""parquet:GLOB#column: a row is a document, its text in `column`.

A document of a corpus that jaxpt prepare wrote keeps its id.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt.data.sources.fields import try_row
from jaxpt.data.sources.files import bytes_read, first_error_line, is_remote, open_raw
from jaxpt.data.sources.source import (
    MAX_DOCUMENT_BYTES,
    Reading,
    SourceKind,
    TextSource,
    too_large_error,
)
from jaxpt.spec import UserError

CORPUS_COLUMNS = ["id", "source", "text", "prompt_chars", "meta"]  # of a corpus's shards
MAX_BATCH_BYTES = 2**28  # of rows that are unpacked at once, unless one alone has more
MAX_BATCH_ROWS = 64
BUFFER_BYTES = 2**20  # read at once, in place of a whole column
MAX_RATIO = 200  # of a chunk unpacked to the same packed; text has 20 at most


def read_parquet(source: TextSource, file: str) -> Reading:
    """Yield a document per row."""
    name = source.relative_name(file)
    fields = source.field.split("+")
    try:
        with open_parquet(file) as table:
            names = table.schema_arrow.names
            missing = [field for field in fields if field not in names]
            if missing:
                raise UserError(
                    f"{file}: has no column {missing[0]!r}; it has: {', '.join(names)}. "
                    "Write parquet:GLOB#column."
                )
            is_corpus = names == CORPUS_COLUMNS
            columns = ["id", *fields] if is_corpus else fields
            for n, row in enumerate(iterate_rows(table, columns, file), 1):
                place = f"{file}:{n}"
                id = f"{name}:{n}"
                if is_corpus:  # the source's name is put before it again
                    id = row["id"][0].as_py().removeprefix(f"{source.name}/")
                if row.nbytes > MAX_DOCUMENT_BYTES:
                    yield too_large_error(place)
                    continue
                yield try_row(id, row, source.field, place)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({first_error_line(error)}). Copy it again or "
            "leave it out."
        ) from None


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator[pq.ParquetFile]:
    """Open a file of which a page is in memory at a time, packed and unpacked."""
    with contextlib.ExitStack() as stack:
        found: Any = stack.enter_context(open_raw(file))
        if not is_remote(file):  # Arrow's own file spares a copy of the packed page
            found = stack.enter_context(pa.OSFile(os.fsencode(file)))
        bytes_read.begin(None)
        pool = pa.default_memory_pool()
        pa.set_memory_pool(pa.system_memory_pool())  # it grows a page in place
        try:
            table = pq.ParquetFile(found, buffer_size=BUFFER_BYTES, pre_buffer=False)
        finally:
            pa.set_memory_pool(pool)
        yield stack.enter_context(table)


def iterate_rows(table: pq.ParquetFile, fields: list[str], file: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows, each as a batch of one, with few unpacked at a time.

    A value has as many bytes as its column chunk at most, but may stand in many rows: a file of 2
    kB can hold 200 rows of 30 MB. A page is unpacked as a whole, so one that no text could fill is
    refused.

    Raises:
        UserError: a row group is packed as no text is.
    """
    for group in range(table.num_row_groups):
        metadata = table.metadata.row_group(group)
        n_bytes = n_packed = 0
        for chunk in map(metadata.column, range(metadata.num_columns)):
            n_packed += chunk.total_compressed_size
            if chunk.path_in_schema not in fields:
                continue
            n_bytes += chunk.total_uncompressed_size
            ratio = chunk.total_uncompressed_size / max(chunk.total_compressed_size, 1)
            if n_bytes > MAX_BATCH_BYTES and ratio > MAX_RATIO:
                raise UserError(
                    f"{file}: row group {group} unpacks to {n_bytes / 1e6:,.0f} MB, {ratio:,.0f} "
                    "times its size, as no text does. Leave the file out."
                )
        n_rows = MAX_BATCH_BYTES // max(n_bytes, 1)
        n_rows = min(max(n_rows, 1), MAX_BATCH_ROWS)
        for batch in table.iter_batches(n_rows, row_groups=[group], columns=fields):
            for i in range(len(batch)):
                yield batch.slice(i, 1)
        bytes_read.add(n_packed)


KIND = SourceKind("parquet", read_parquet, has_field=True)
