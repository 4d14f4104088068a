"""Files on disks and in object stores: found, opened, decompressed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import glob
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from jaxpt.spec import UserError

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")


def glob_files(pattern: str) -> set[str]:
    """Return the files that match. Raise UserError if an object store does not answer."""
    if not is_remote(pattern):
        paths = [pathlib.Path(found) for found in glob.glob(pattern, recursive=True)]
        return {path.as_posix() for path in paths if path.is_file()}
    from fsspec.implementations.arrow import ArrowFSWrapper

    scheme = pattern.partition("://")[0]
    store, path = open_filesystem(pattern)
    try:
        found: Any = ArrowFSWrapper(store).glob(path, detail=True)  # name -> details
    except OSError as error:
        raise explain_unreachable(pattern, error) from None
    return {f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file"}


@contextlib.contextmanager
def open_text_file(file: str) -> Iterator[io.BufferedIOBase]:
    """Open a file's bytes, decompressed if its name ends in .gz or .zst.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open_raw(file) as found, decompress(file, found) as stream:
            yield stream
    # of a truncated file gzip raises EOFError, the others OSError
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({first_error_line(error)}). Copy it again or leave it out."
        ) from None


def open_raw(file: str) -> Any:
    """Open a file's bytes: a Python file, or a pyarrow.NativeFile in an object store."""
    if not is_remote(file):
        return open(file, "rb")
    store, path = open_filesystem(file)
    return store.open_input_file(path)


def decompress(file: str, found: Any) -> io.BufferedIOBase:
    """Return a stream of the decompressed bytes of what `open_raw` opened."""
    if file.endswith(".zst"):
        import pyarrow as pa

        compressed: Any = pa.CompressedInputStream(found, "zstd")
        return io.BufferedReader(compressed)
    if file.endswith(".gz"):
        return gzip.open(found)
    return io.BufferedReader(found) if is_remote(file) else found


def is_remote(file: str) -> bool:
    """Return whether a file is in an object store."""
    return "://" in file


@functools.cache
def open_filesystem(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the object store of an address, and the path in it.

    Credentials, region and endpoint are the store's own, as in data/storage.py.
    """
    import pyarrow as pa
    import pyarrow.fs

    scheme, _, path = address.partition("://")
    bucket = f"{scheme}://{path.split('/')[0]}"  # which is an address, as a pattern is not
    if scheme in ("gs", "gcs"):
        # Google's client retries for a quarter of an hour without a network or credentials
        bucket += "?retry_limit_seconds=30"
    try:
        store, _ = pyarrow.fs.FileSystem.from_uri(bucket)
    except (OSError, pa.ArrowException) as error:
        raise explain_unreachable(address, error) from None
    return store, path


def explain_unreachable(address: str, error: BaseException) -> UserError:
    """Return the error for a store that cannot be reached."""
    return UserError(
        f"{address}: cannot be reached ({first_error_line(error)}). Check the address, the "
        "credentials and the endpoint."
    )


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error, or the name of its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


def map_in_threads(function: Callable[[str], T], files: Iterable[str]) -> list[T]:
    """Return function(file) of each file, 16 at a time: an object store takes long to answer."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, files))


def get_file_size(file: str) -> int:
    """Return the size of a file in bytes."""
    if not is_remote(file):
        return pathlib.Path(file).stat().st_size
    store, path = open_filesystem(file)
    info: Any = store.get_file_info(path)  # of one path, not of several
    return info.size


def get_object_tag(file: str) -> str:
    """Return a text that changes with an object's content, as its store reports it."""
    store, path = open_filesystem(file)
    try:
        with store.open_input_file(path) as stream:
            headers = {}
            for key, value in (stream.metadata() or {}).items():
                headers[key.lower()] = value.decode() if isinstance(value, bytes) else value
            info: Any = store.get_file_info(path)
            return f"{stream.size()} bytes, {headers.get('etag') or info.mtime}"
    except OSError as error:
        raise explain_unreachable(file, error) from None
