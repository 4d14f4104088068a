"""Files on disks and in buckets: opened, decompressed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase, BufferedReader
from typing import Any, TypeVar

from jaxpt import io
from jaxpt.spec import UserError

T = TypeVar("T")


@contextlib.contextmanager
def open_text_file(file: str) -> Iterator[BufferedIOBase]:
    """Open a file's bytes, decompressed if its name ends in .gz or .zst.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open_raw(file) as found, decompress(file, found) as stream:
            yield stream
    # of a truncated file gzip raises EOFError, the others OSError
    except (EOFError, zlib.error, OSError, *io.bucket_errors()) as error:
        raise UserError(
            f"{file}: cannot be read ({first_error_line(error)}). Copy it again or leave it out."
        ) from None


def open_raw(file: str) -> BufferedIOBase:
    """Open a file's bytes."""
    return io.open_read(make_path(file))


def make_path(file: str) -> io.Path:
    """Return the path of a found file."""
    return io.path(file) if is_remote(file) else pathlib.Path(file)


def decompress(file: str, found: BufferedIOBase) -> BufferedIOBase:
    """Return a stream of the decompressed bytes of what `open_raw` opened."""
    if file.endswith(".zst"):
        import pyarrow as pa

        compressed: Any = pa.CompressedInputStream(found, "zstd")
        return BufferedReader(compressed)
    if file.endswith(".gz"):
        return gzip.GzipFile(fileobj=found)
    return found


def is_remote(file: str) -> bool:
    """Return whether a file is in a bucket."""
    return "://" in file


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error, or the name of its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def map_in_threads(function: Callable[[str], T], files: Iterable[str]) -> list[T]:
    """Return function(file) of each file, 16 at a time: a bucket takes long to answer."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, files))


def get_file_size(file: str) -> int:
    """Return the size of a file in bytes."""
    return io.size(make_path(file)) or 0


def get_object_tag(file: str) -> str:
    """Return a text that changes with an object's content, as its bucket reports it."""
    return io.version(make_path(file))
