"""HTTP messages as crawls keep them: headers of any form, bodies unpacked as far as they can be."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from io import BytesIO
from typing import NamedTuple

from jaxpt.data.sources.source import MAX_DOCUMENT_BYTES
from jaxpt.spec import UserError

PIECE_BYTES = 1 << 16  # unpacked at a time
PACKED_BYTES = 1 << 10  # that are unpacked at a time
CHECKSUM_BYTES = 8  # at the end of gzip's members; zlib's has 4
HEADER_END = re.compile(rb"\r?\n\r?\n")
STATUS = re.compile(r"HTTP/\S+\s+(\d{3})", re.IGNORECASE)
CHARSET = re.compile(r"""charset\s*=\s*["']?\s*([^\s"';,]+)""", re.IGNORECASE)
CHUNK_HEAD = re.compile(rb"(?:\r?\n)?([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
GZIP_MAGIC = b"\x1f\x8b"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# bytes that no text has, in what browsers look at; source: mimesniff.spec.whatwg.org, section 3
BINARY = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")
SNIFFED_BYTES = 1445


class HttpMessage(NamedTuple):
    """A response.

    Attributes:
        status: such as 200; None of what is no response.
        headers: by name in lower case; of repeated ones the values, joined by commas.
        body: as it was sent.
    """

    status: int | None
    headers: dict[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        """The type in lower case, without parameters."""
        value = self.headers.get("content-type", "")
        return value.partition(";")[0].strip().lower()

    @property
    def charset(self) -> str:
        """The charset that the header names, or ""."""
        return find_charset(self.headers.get("content-type", ""))


def find_charset(content_type: str) -> str:
    """Return the charset that a Content-Type names, or ""."""
    found = CHARSET.search(content_type)
    return found[1] if found else ""


def parse_http(block: bytes) -> HttpMessage:
    """Return the message in a block, whose lines end in CRLF or LF."""
    end = HEADER_END.search(block)
    head, body = block, b""
    if end:
        head = block[: end.start()]
        body = block[end.end() :]
    first, *lines = re.split(r"\r?\n", head.decode("latin-1"))
    status = STATUS.match(first)
    headers: dict[str, str] = {}
    name = ""
    for line in lines:
        if line[:1] in (" ", "\t"):  # the line before goes on
            headers[name] = f"{headers.get(name, '')} {line.strip()}"
            continue
        name, _, value = line.partition(":")
        name = name.strip().lower()
        value = value.strip()
        if name in headers:
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return HttpMessage(int(status[1]) if status else None, headers, body)


def unpack_body(message: HttpMessage) -> bytes:
    """Return the body, of what is larger MAX_DOCUMENT_BYTES + 1 bytes.

    A body that is text though an encoding is announced is taken as it stands, and of a damaged one
    what comes before the damage, as warcio does.

    Raises:
        UserError: nothing can be made of it.
    """
    names = []
    for header in ("content-encoding", "transfer-encoding"):
        values = message.headers.get(header, "").lower()
        names += [name.strip() for name in values.split(",")]
    names = [name for name in names if name not in ("", "identity")]
    body = message.body
    for name in reversed(names):
        body = unpack(name, body)
    if body.startswith(GZIP_MAGIC):  # not announced, or packed twice
        body = unpack("gzip", body)
    is_whole = len(body) <= MAX_DOCUMENT_BYTES
    if names and is_whole and not is_text(body):
        raise UserError(f"nothing can be made of a body packed as {', '.join(names)}")
    return body


def unpack(name: str, packed: bytes) -> bytes:
    """Return what an encoding unpacks to, as `unpack_body` says."""
    if name not in UNPACKERS:
        return packed
    unpacked = bytearray()
    try:
        for piece in UNPACKERS[name](packed):
            unpacked += piece
            if len(unpacked) > MAX_DOCUMENT_BYTES:
                return bytes(unpacked[: MAX_DOCUMENT_BYTES + 1])
    except (ValueError, OSError, zlib.error):
        if not unpacked or is_text(packed):
            return packed
    return bytes(unpacked)


def is_text(data: bytes) -> bool:
    """Return whether bytes may be text: they begin without such as no text has."""
    return data.startswith(UTF16_MARKS) or not BINARY.search(data[:SNIFFED_BYTES])


def unpack_gzip(packed: bytes) -> Iterator[bytes]:
    """Yield what gzip unpacks, of all members."""
    if not packed.startswith(GZIP_MAGIC):
        raise ValueError("no gzip")
    while packed.startswith(GZIP_MAGIC):  # servers append other bytes
        packed = yield from inflate(zlib.decompressobj(31), packed)


def unpack_deflate(packed: bytes) -> Iterator[bytes]:
    """Yield what deflate unpacks, with zlib's header or, as some servers send it, without."""
    try:
        zlib.decompressobj().decompress(packed, 1)
    except zlib.error:
        yield from inflate(zlib.decompressobj(-15), packed)
    else:
        yield from inflate(zlib.decompressobj(), packed)


def inflate(member: zlib._Decompress, packed: bytes) -> Generator[bytes, None, bytes]:
    """Yield what zlib unpacks up to an error or the end. Return the bytes behind it.

    Few bytes are unpacked at once, and the checksum at the end alone: an error loses no more.
    """
    n_sum = max(len(packed) - CHECKSUM_BYTES, 0)
    starts = [*range(0, n_sum, PACKED_BYTES), n_sum, len(packed)]
    for start, stop in itertools.pairwise(starts):
        waiting = packed[start:stop]
        while waiting and not member.eof:
            yield member.decompress(waiting, PIECE_BYTES)
            waiting = member.unconsumed_tail
        if member.eof:
            return member.unused_data + packed[stop:]
    yield member.flush()
    return b""


def unpack_brotli(packed: bytes) -> Iterator[bytes]:
    """Yield what Brotli unpacks."""
    from fastwarc import stream_io

    reader = stream_io.BrotliReader(BytesIO(packed))
    yield from iter(lambda: reader.read(PIECE_BYTES), b"")


def unpack_zstd(packed: bytes) -> Iterator[bytes]:
    """Yield what Zstandard unpacks."""
    from fastwarc import stream_io

    reader = stream_io.ZstdReader(BytesIO(packed))
    yield from iter(lambda: reader.read(PIECE_BYTES), b"")


def unpack_chunks(packed: bytes) -> Iterator[bytes]:
    """Yield the chunks of a body. Raise ValueError where none begins."""
    start = 0
    while head := CHUNK_HEAD.match(packed, start):
        n_bytes = int(head[1], 16)
        start = head.end() + n_bytes
        if not n_bytes:
            return
        yield packed[head.end() : start]
    if start < len(packed):
        raise ValueError("no chunk begins here")


UNPACKERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "br": unpack_brotli,
    "chunked": unpack_chunks,
    "deflate": unpack_deflate,
    "gzip": unpack_gzip,
    "x-gzip": unpack_gzip,
    "zstd": unpack_zstd,
}
