"""jsonl:GLOB#field: a line is a document, its text in `field`."""

from __future__ import annotations

import codecs
import json
from typing import Any

from jaxpt.data.sources.fields import make_document
from jaxpt.data.sources.files import first_error_line, open_text_file
from jaxpt.data.sources.source import (
    MAX_DOCUMENT_BYTES,
    Reading,
    SourceKind,
    TextSource,
    too_large_error,
)
from jaxpt.spec import UserError


def read_jsonl(source: TextSource, file: str) -> Reading:
    """Yield a document per line."""
    name = source.relative_name(file)
    with open_text_file(file) as stream:
        lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES), b"")
        for n, line in enumerate(lines, 1):
            place = f"{file}:{n}"
            mark = codecs.BOM_UTF8 if n == 1 else b""
            if not line.strip():
                continue
            if len(line) == MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_DOCUMENT_BYTES)
                yield too_large_error(place)
                continue
            try:
                record = parse_json_line(line.removeprefix(mark), source.field, place)
                document = make_document(f"{name}:{n}", record, source.field, place)
            except UserError as error:
                yield error
            else:
                yield document


def parse_json_line(line: bytes, field: str, place: str) -> dict[str, Any]:
    """Return the JSON object of a line. Raise UserError if it is none."""
    try:
        record = json.loads(line.decode())  # of bytes the parser would guess an encoding
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} of the line is not UTF-8 ({error.reason}). "
            "Mend or remove the line."
        ) from None
    # besides JSONDecodeError: numbers too long, brackets too deep
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not JSON ({first_error_line(error)}). Mend or remove the line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f'{place}: expected an object such as {{"{field}": "..."}}, got '
            f"{type(record).__name__}."
        )
    return record


KIND = SourceKind("jsonl", read_jsonl, has_field=True)
