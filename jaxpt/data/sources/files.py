"""Files on disks and in buckets: opened, unpacked."""

from __future__ import annotations

import concurrent.futures
import contextlib
import lzma
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from typing import Any, TypeVar

from jaxpt import io
from jaxpt.data.sources.content import check_pointer, peek, unpack_stream
from jaxpt.spec import UserError

T = TypeVar("T")


class ReadCounter(threading.local):
    """Counts the bytes that this thread has read of sources' files, as they lie on disk."""

    def __init__(self):
        """Start with nothing read."""
        self.file: Any = None
        self.before = 0  # of the files before this one
        self.position = 0

    def begin(self, file: Any) -> None:
        """Count a newly opened file from here on, by its position; None: by `add`."""
        self.before = self.count()
        self.position = 0
        self.file = file

    def add(self, n_bytes: int) -> None:
        """Count bytes of a file that keeps no position."""
        self.position += n_bytes

    def count(self) -> int:
        """Return the bytes so far; of a file that is closed, up to the last call."""
        if self.file and not self.file.closed:
            self.position = self.file.tell()
        return self.before + self.position


bytes_read = ReadCounter()


@contextlib.contextmanager
def open_text_file(file: str) -> Iterator[BufferedIOBase]:
    """Open a file's bytes, unpacked if they are compressed.

    Raises:
        UserError: they cannot be read, or are no text.
    """
    try:
        with open_raw(file) as found, unpack_stream(file, found) as stream:
            yield stream
    # of a truncated file gzip raises EOFError, the others OSError
    except (EOFError, zlib.error, lzma.LZMAError, OSError, *io.bucket_errors()) as error:
        raise UserError(
            f"{file}: cannot be read ({first_error_line(error)}). Copy it again or leave it out."
        ) from None


def open_raw(file: str) -> BufferedIOBase:
    """Open a file's bytes. Raise UserError for what only points to a file."""
    path = make_path(file)
    if isinstance(path, pathlib.Path) and io.is_dangling(file):
        raise UserError(
            f"{file}: is a link to {os.readlink(file)}, which is not there. Mend the link or "
            "leave it out."
        )
    found = io.open_read(path)
    check_pointer(file, peek(found))
    bytes_read.begin(found)
    return found


def make_path(file: str) -> io.Path:
    """Return the path of a found file."""
    return io.path(file) if is_remote(file) else pathlib.Path(file)


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


def get_version(file: str) -> str:
    """Return a text that changes with a file's content; "" if it cannot be read."""
    if io.is_dangling(file):
        return ""
    return io.version(make_path(file))


def escape_name(text: str) -> str:
    """Return a text with those bytes of file names that are not UTF-8 as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
