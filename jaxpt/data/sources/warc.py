"""warc:GLOB: a crawled web page is a document: its main text, url and date in `meta`."""

from __future__ import annotations

import codecs
import importlib.metadata
import json
import logging
import re
import zlib
from io import BufferedIOBase, BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from jaxpt.data.sources.files import first_error_line, open_text_file
from jaxpt.data.sources.source import (
    MAX_DOCUMENT_BYTES,
    Document,
    Reading,
    Skipped,
    SourceKind,
    TextSource,
    too_large_error,
)
from jaxpt.spec import UserError

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord


def read_warc(source: TextSource, file: str) -> Reading:
    """Yield the main text of the HTML pages among the responses.

    Source: trafilatura with precision before recall, like FineWeb (2406.17557).
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    name, n = source.relative_name(file), 0
    with open_text_file(file) as stream:
        forward = ForwardReader(stream)
        try:
            records = ArchiveIterator(cast(BinaryIO, forward), parse_http=False)
            for n, record in enumerate(records, 1):
                place = f"{file}:{n}"
                n_bytes = get_content_length(record, place)
                if n_bytes > MAX_DOCUMENT_BYTES:
                    yield too_large_error(place)
                    continue
                record.freeze()
                if forward.error:
                    break
                # the last record of a truncated file looks whole otherwise
                if record.content_length != n_bytes:
                    raise UserError(
                        f"{place}: the record ends after {record.content_length} of {n_bytes} "
                        "bytes. Copy the file again or leave it out."
                    )
                if record.record_type == WarcRecordType.response:
                    yield read_response(record, f"{name}:{n}", place)
        except OSError as error:
            raise UserError(
                f"{file}:{n + 1}: cannot be read as WARC ({first_error_line(error)}). Copy the "
                "file again or leave it out."
            ) from None
        if forward.error:
            raise forward.error


def get_content_length(record: WarcRecord, place: str) -> int:
    """Return the bytes that a record declares. Raise UserError if it declares none."""
    declared = record.headers.get("Content-Length") or ""
    if not re.fullmatch(r"\d{1,18}", declared, re.ASCII):
        raise UserError(
            f"{place}: its header is damaged (Content-Length {declared[:40]!r}). Copy the file "
            "again or leave it out."
        )
    return int(declared)


def read_response(record: WarcRecord, id: str, place: str) -> Document | Skipped | UserError:
    """Return the document of a response, or why it has none."""
    try:
        body = decode_body(record)
    except (OSError, ValueError, zlib.error):
        return Skipped("its HTTP message cannot be decoded", place)
    if len(body) > MAX_DOCUMENT_BYTES:
        return too_large_error(place)
    text, reason = extract_page_text(record, body)
    if not text:
        return Skipped(reason, place)
    date = record.record_date.strftime("%Y-%m-%dT%H:%M:%SZ") if record.record_date else ""
    meta = {"url": record.headers.get("WARC-Target-URI") or "", "date": date}
    return Document(id, text, 0, json.dumps(meta, ensure_ascii=False))


class ForwardReader:
    """A stream in the form that fastwarc can take.

    fastwarc asks for the position even of a stream that has none, and an exception while it reads
    would end the process: `error` keeps it.
    """

    def __init__(self, stream: BufferedIOBase):
        """Read the stream from where it is."""
        self.stream = stream
        self.n_read = 0
        self.error: Exception | None = None

    def read(self, n: int) -> bytes:
        """Read at most n bytes."""
        try:
            # no more than is ready: an error must not take what was whole before it
            data = self.stream.read1(n)
        except (EOFError, zlib.error, OSError) as error:
            self.error, data = error, b""
        self.n_read += len(data)
        return data

    def tell(self) -> int:
        """Return the position."""
        return self.n_read


def decode_body(record: WarcRecord) -> bytes:
    """Return the body of an HTTP message, of what is larger MAX_DOCUMENT_BYTES + 1 bytes.

    fastwarc's own `auto_decode` unpacks all of it first: a megabyte may hold gigabytes.

    Raises:
        OSError, zlib.error: it is damaged, or encoded in an unknown way.
    """
    from fastwarc import stream_io

    readers = {
        "br": stream_io.BrotliReader,
        "chunked": stream_io.ChunkedReader,
        "deflate": inflate,
        "gzip": stream_io.GzipReader,
        "zstd": stream_io.ZstdReader,
    }
    record.parse_http(auto_decode="none")
    encodings = []
    for header in ("Content-Encoding", "Transfer-Encoding"):
        value = record.http_headers.get(header) if record.http_headers else None
        encodings += (value or "").lower().split(",")
    body: Any = record.reader
    for name in map(str.strip, reversed(encodings)):
        if name in readers:
            body = readers[name](body)
        elif name not in ("", "identity"):
            raise OSError(f"unknown encoding {name}")
    return body.read(MAX_DOCUMENT_BYTES + 1)


def inflate(stream: Any) -> BytesIO:
    """Return what zlib unpacks of a stream, MAX_DOCUMENT_BYTES + 1 at most."""
    data = zlib.decompressobj().decompress(stream.read(), MAX_DOCUMENT_BYTES + 1)
    return BytesIO(data)


def extract_page_text(record: WarcRecord, body: bytes) -> tuple[str, str]:
    """Return (main text, "") of a response, or ("", the reason why there is none)."""
    import trafilatura
    from resiliparse.parse.encoding import bytes_to_str

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every odd page
    status = record.http_headers and record.http_headers.status_code
    content_type = (record.http_content_type or "").lower()
    if status != 200:
        return "", f"HTTP status {status}"
    if "html" not in content_type:
        return "", f"is {content_type or 'of no stated type'}, not HTML"
    if not body.strip():
        return "", "empty body"
    html = bytes_to_str(body, find_charset(record.http_charset, body))
    try:
        text = trafilatura.extract(html, include_comments=False, favor_precision=True)
    except Exception:  # lxml and the extractor meet every page that was ever written
        return "", "its HTML cannot be parsed"
    return (text, "") if text else ("", "no main text in its HTML")


def find_charset(declared: str | None, body: bytes) -> str:
    """Return the encoding of a page: as HTTP declares it, else the page, else its bytes."""
    from resiliparse.parse.encoding import detect_encoding

    try:
        return codecs.lookup(declared or "").name
    except LookupError:  # none is declared, or an unknown one
        return detect_encoding(body, from_html_meta=True) or "utf-8"


def describe_extractor(_: TextSource) -> dict[str, str]:
    """Return the version of what finds the main text."""
    return {"trafilatura": importlib.metadata.version("trafilatura")}


KIND = SourceKind("warc", read_warc, describe_versions=describe_extractor)
