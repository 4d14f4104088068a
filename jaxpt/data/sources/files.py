"""Files on disks and in buckets: found and opened."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fnmatch
import glob
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from typing import TypeVar

from jaxpt import io
from jaxpt.data.sources.content import check_pointer, peek, unpack_stream
from jaxpt.spec import UserError

T = TypeVar("T")


def glob_files(pattern: str) -> set[str]:
    """Return the files that match. Raise UserError if a bucket does not answer."""
    if is_remote(pattern):
        return glob_bucket(pattern)
    *directories, name = pattern.split("/")
    if name == "**":
        directories, name = [*directories, name], "*"
    places = [""]
    for part in directories:
        places = [found for place in places for found in match_directories(place, part)]
    files = set()
    for place in places:
        paths = [place + found for found in match_names(place, name)]
        files.update(path for path in paths if os.path.isfile(path) or is_dangling(path))
    return files


def match_directories(place: str, part: str) -> Iterator[str]:
    """Yield the directories in a place that match a part of a glob; each ends in "/"."""
    if part == "**":
        yield from walk_directories(place)
    elif part in ("", ".", ".."):
        yield f"{place}{part}/"
    else:
        for name in match_names(place, part):
            if os.path.isdir(place + name):
                yield f"{place}{name}/"


def match_names(place: str, part: str) -> list[str]:
    """Return the names in a place that match; brackets are letters where a name has them so."""
    if not glob.has_magic(part):
        return [part] if os.path.lexists(place + part) else []
    names = io.list_names(pathlib.Path(place))
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    literal = part.replace("[", "[[]")
    return fnmatch.filter(names, literal) or fnmatch.filter(names, part)


def walk_directories(place: str) -> Iterator[str]:
    """Yield a directory and those below it, once each though links lead to them again."""
    seen = set()
    todo = collections.deque([place])
    links = collections.deque()  # after all else, so that a file has its own name if there is one
    while todo or links:
        directory = (todo or links).popleft()
        real = os.path.realpath(directory)
        if real in seen:
            continue
        seen.add(real)
        yield directory
        for name in match_names(directory, "*"):
            path = directory + name
            if os.path.isdir(path):
                (links if os.path.islink(path) else todo).append(f"{path}/")


def is_dangling(path: str) -> bool:
    """Return whether a path is a link to nothing."""
    return os.path.islink(path) and not os.path.exists(path)


def glob_bucket(pattern: str) -> set[str]:
    """Return the objects that match."""
    plain, below = split_glob(pattern)
    literal = below.replace("[", "[[]")  # brackets are letters where a name has them so
    return match_objects(plain, literal) or match_objects(plain, below)


def match_objects(plain: str, below: str) -> set[str]:
    """Return the objects that match below a directory, of one alone by a listing of it alone."""
    from fsspec.utils import glob_translate

    directory = io.path(plain)
    matches = re.compile(glob_translate(below)).fullmatch
    if "/" in below or "**" in below:
        names = filter(matches, io.list_files(directory))
        return {str(directory / name) for name in names}
    found = [str(directory / name) for name in io.list_names(directory) if matches(name)]
    sizes = map_in_threads(lambda file: io.size(io.path(file)), found)
    return {file for file, size in zip(found, sizes, strict=True) if size is not None}


def split_glob(pattern: str) -> tuple[str, str]:
    """Return the directory in front of a glob's first pattern, and the rest: a name at least."""
    parts = pattern.split("/")
    n_plain = len(parts) - 1
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            n_plain = i
            break
    return "/".join(parts[:n_plain]), "/".join(parts[n_plain:])


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
    if isinstance(path, pathlib.Path) and is_dangling(file):
        raise UserError(
            f"{file}: is a link to {os.readlink(file)}, which is not there. Mend the link or "
            "leave it out."
        )
    found = io.open_read(path)
    check_pointer(file, peek(found))
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
    if is_dangling(file):
        return ""
    return io.version(make_path(file))


def escape_name(text: str) -> str:
    """Return a text with those bytes of file names that are not UTF-8 as escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
