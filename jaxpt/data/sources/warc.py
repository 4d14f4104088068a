"""warc:GLOB: a crawled web page is a document: its main text, url and date in `meta`.

So is the plain text of a WET file, and of a resource record.
"""

from __future__ import annotations

import json
import re
import zlib
from io import BufferedIOBase
from typing import TYPE_CHECKING, BinaryIO, cast

from jaxpt.data.sources.content import peek
from jaxpt.data.sources.files import first_error_line, open_text_file
from jaxpt.data.sources.http import HttpMessage, parse_http, unpack_body
from jaxpt.data.sources.page import decode_page, describe_extractor, extract_main_text
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

# a page as browsers know it without a type; source: mimesniff.spec.whatwg.org, section 7.1
HTML_START = re.compile(
    rb"\s*<(?:!doctype html|html|head|body|title|h1|div|table|!--)", re.IGNORECASE
)

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord


def read_warc(source: TextSource, file: str) -> Reading:
    """Yield the main text of the HTML pages, and the text of records that hold plain text."""
    from fastwarc.warc import ArchiveIterator

    name, n = source.relative_name(file), 0
    with open_text_file(file) as stream:
        first_line, *_ = peek(stream).partition(b"\n")
        has_bare_lines = first_line.startswith(b"WARC/") and not first_line.endswith(b"\r")
        forward = ForwardReader(stream)
        try:
            records = ArchiveIterator(
                cast(BinaryIO, forward), parse_http=False, quirks_mode=has_bare_lines
            )
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
                found = read_record(record, f"{name}:{n}", place)
                if found is not None:
                    yield found
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


def read_record(record: WarcRecord, id: str, place: str) -> Document | Skipped | UserError | None:
    """Return the document of a record, why it has none, or None for a record about others."""
    from fastwarc.warc import WarcRecordType

    kind = record.record_type
    if kind in (
        WarcRecordType.warcinfo,
        WarcRecordType.request,
        WarcRecordType.metadata,
        WarcRecordType.revisit,
    ):
        return None
    block = record.reader.read()
    content_type = record.headers.get("Content-Type") or ""
    is_plain = kind in (WarcRecordType.resource, WarcRecordType.conversion)
    if is_plain:
        message = HttpMessage(200, {"content-type": content_type}, block)
    elif kind == WarcRecordType.response:
        message = parse_http(block)
    else:
        return Skipped(f"is a WARC record of type {record.headers.get('WARC-Type')}", place)
    try:
        body = unpack_body(message)
    except UserError:
        return Skipped("its HTTP message cannot be decoded", place)
    if len(body) > MAX_DOCUMENT_BYTES:
        return too_large_error(place)
    text, reason = extract_text(message, body, is_plain)
    if not text:
        return Skipped(reason, place)
    date = record.record_date.strftime("%Y-%m-%dT%H:%M:%SZ") if record.record_date else ""
    meta = {"url": record.headers.get("WARC-Target-URI") or "", "date": date}
    return Document(id, text, 0, json.dumps(meta, ensure_ascii=False))


def extract_text(message: HttpMessage, body: bytes, is_plain: bool) -> tuple[str, str]:
    """Return (text, "") of a message, or ("", the reason why it has none).

    Args:
        message: the response.
        body: unpacked.
        is_plain: plain text is a document too: in a crawl's own text, but not among web pages.
    """
    content_type = message.content_type
    if not content_type and HTML_START.match(body):
        content_type = "text/html"
    if message.status != 200:
        return "", f"HTTP status {message.status}"
    is_html = "html" in content_type
    if not is_html and not (is_plain and content_type == "text/plain"):
        return "", f"is {content_type or 'of no stated type'}, not HTML"
    if not body.strip():
        return "", "empty body"
    if not is_html:
        return decode_page(body, message.charset or "utf-8").strip(), "empty body"
    try:
        text = extract_main_text(decode_page(body, message.charset))
    except UserError as error:
        return "", str(error)
    return text, "no main text in its HTML"


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


KIND = SourceKind("warc", read_warc, describe_versions=lambda _: describe_extractor())
