"""parquet:GLOB#column: a row is a document, its text in `column`."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from jaxpt.data.sources.fields import try_document
from jaxpt.data.sources.files import first_error_line, open_raw
from jaxpt.data.sources.source import Reading, SourceKind, TextSource
from jaxpt.spec import UserError


def read_parquet(source: TextSource, file: str) -> Reading:
    """Yield a document per row."""
    name = source.relative_name(file)
    fields = source.field.split("+")
    try:
        with open_raw(file) as found, pq.ParquetFile(found) as table:
            names = table.schema_arrow.names
            missing = [field for field in fields if field not in names]
            if missing:
                raise UserError(
                    f"{file}: has no column {missing[0]!r}; it has: {', '.join(names)}. "
                    "Write parquet:GLOB#column."
                )
            n = 0
            for batch in table.iter_batches(1024, columns=fields):
                for record in batch.to_pylist():
                    n += 1
                    yield try_document(f"{name}:{n}", record, source.field, f"{file}:{n}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({first_error_line(error)}). Copy it again or "
            "leave it out."
        ) from None


KIND = SourceKind("parquet", read_parquet, has_field=True)
