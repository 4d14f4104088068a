"""What a file holds, by its first bytes: compressed files are unpacked, others named and refused.

The name of a file says nothing: people write .GZ, .zstd or nothing at all.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import struct
from io import BufferedIOBase, BufferedReader, RawIOBase
from typing import Any

from jaxpt.spec import UserError

HEAD_BYTES = 512
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_DICTIONARY = b"\x5d\x2a\x4d\x18"  # a frame that zstd skips; a .warc.zst begins with one
ZSTD_SKIPPED = tuple(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))
ZSTD_PIECE_BYTES = 1 << 10  # unpacked at once: at most 32 MB come of them
MAX_ZSTD_WINDOW = 1 << 31  # bytes; `zstd --long=31`, such as Pushshift's files
MAX_DICTIONARY_BYTES = 1 << 25
BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # the first of a file
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TAR_MAGIC = b"ustar"
TAR_MAGIC_PLACE = 257

# what is no text, by its first bytes: (what it is, what to do)
REFUSED = {
    LFS_POINTER: ("a pointer of Git LFS, not the file", "Get the file: git lfs pull"),
    b"PK\x03\x04": ("a ZIP archive", "Unpack it: unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x"),
    b"Rar!\x1a\x07": ("a RAR archive", "Unpack it: unrar x"),
    b"\x04\x22\x4d\x18": ("packed by lz4", "Unpack it: lz4 -d"),
    b"\x1f\x9d": ("packed by compress", "Unpack it: uncompress"),
    b"\xff\x06\x00\x00sNaPpY": ("packed by snappy", "Unpack it: snzip -d"),
    b"PAR1": ("a parquet file", "Read it as parquet:GLOB#column"),
    b"ARROW1": ("an Arrow file", "Convert it to parquet"),
    codecs.BOM_UTF32_LE: ("UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
}


def unpack_stream(file: str, found: Any) -> BufferedIOBase:
    """Return the bytes of an open file, unpacked if they are compressed.

    Raises:
        UserError: they are no text, such as an archive.
    """
    head = peek(found)
    check_text(file, head)
    unpacked: Any = found
    if head.startswith(b"\x1f\x8b"):
        unpacked = gzip.GzipFile(fileobj=found)
    elif head[:3] == b"BZh" and head[4:10] in BZIP2_BLOCKS:
        unpacked = bz2.BZ2File(found)
    elif head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0\x80\0", b"\x5d\0\0\0\x01")):
        unpacked = lzma.LZMAFile(found)
    elif head.startswith((ZSTD_MAGIC, *ZSTD_SKIPPED)):
        unpacked = BufferedReader(ZstdStream(found))
    if unpacked is not found:
        check_text(file, peek(unpacked))
    return unpacked


def peek(stream: Any) -> bytes:
    """Return the first bytes of a stream, which still yields them."""
    return stream.peek(HEAD_BYTES)[:HEAD_BYTES]


def check_text(file: str, head: bytes) -> None:
    """Raise UserError if a file's first bytes are of something that is no text."""
    for magic, (what, advice) in REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{file}: is {what}. {advice}, or leave it out.")
    if head[TAR_MAGIC_PLACE:].startswith(TAR_MAGIC):
        raise UserError(f"{file}: is a tar archive. Unpack it: tar xf, or leave it out.")


def check_pointer(file: str, head: bytes) -> None:
    """Raise UserError if a file is what Git LFS left in its place."""
    if head.startswith(LFS_POINTER):
        check_text(file, head)


class ZstdStream(RawIOBase):
    """The unpacked bytes of Zstandard frames, with windows of any size and a dictionary.

    Source: of the dictionary, iipc.github.io/warc-specifications/specifications/warc-zstd.
    """

    def __init__(self, found: BufferedIOBase):
        """Read from the start of the packed bytes."""
        import zstandard

        self.found = found
        dictionary = None
        if peek(found).startswith(ZSTD_DICTIONARY):
            dictionary = zstandard.ZstdCompressionDict(read_dictionary(found))
        self.decompressor = zstandard.ZstdDecompressor(dictionary, MAX_ZSTD_WINDOW)
        self.frame: Any = None
        self.packed = b""  # of the next frames
        self.unpacked = memoryview(b"")  # and not read yet

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Return the number of bytes, 0 at the end.

        Raises:
            OSError: the bytes are damaged or end inside a frame.
        """
        while not self.unpacked:
            packed = self.packed or self.found.read(ZSTD_PIECE_BYTES)
            if not packed and self.frame:
                raise OSError("it ends inside a frame")
            if not packed:
                return 0
            self.unpack(packed)
        n = min(len(buffer), len(self.unpacked))
        buffer[:n] = self.unpacked[:n]
        self.unpacked = self.unpacked[n:]
        return n

    def unpack(self, packed: bytes) -> None:
        """Unpack bytes up to the end of a frame, and keep those behind it."""
        import zstandard

        self.frame = self.frame or self.decompressor.decompressobj()
        try:
            self.unpacked = memoryview(self.frame.decompress(packed))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        self.packed = b""
        if self.frame.eof:
            self.packed = self.frame.unused_data
            self.frame = None


def read_dictionary(found: BufferedIOBase) -> bytes:
    """Return the dictionary in front of a .warc.zst, which may be packed itself."""
    import zstandard

    _, n_bytes = struct.unpack("<4sI", found.read(8))
    if n_bytes > MAX_DICTIONARY_BYTES:
        raise OSError(f"its dictionary has {n_bytes:,} bytes")
    data = found.read(n_bytes)
    if not data.startswith(ZSTD_MAGIC):
        return data
    try:
        return zstandard.ZstdDecompressor().decompress(data, MAX_DICTIONARY_BYTES)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from None
