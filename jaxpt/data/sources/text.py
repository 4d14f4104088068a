"""text:GLOB: a file is a document."""

from __future__ import annotations

from jaxpt.data.sources.files import open_text_file
from jaxpt.data.sources.source import (
    MAX_DOCUMENT_BYTES,
    Document,
    Reading,
    SourceKind,
    TextSource,
    too_large_error,
)
from jaxpt.spec import UserError


def read_text(source: TextSource, file: str) -> Reading:
    """Yield the file as one document."""
    with open_text_file(file) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise too_large_error(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte {error.start} is not UTF-8 ({error.reason}). Convert the file to UTF-8 "
            "or leave it out."
        ) from None
    yield Document(source.relative_name(file), text)


KIND = SourceKind("text", read_text)
