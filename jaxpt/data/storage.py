"""Read packed sequences from a disk, mapped into memory, or from an object store, by ranges.

What is read from an object store is cached on the local disk.
"""

from __future__ import annotations

import concurrent.futures
import functools
import mmap
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs

from jaxpt import stage
from jaxpt.spec import UserError

MAX_OPEN_FILES = 128  # shards of a set that are open at a time
N_FETCH_THREADS = 16  # ranges requested of an object store at a time
MAX_PREFETCH = 256  # ranges that were requested ahead of time and are not used yet
CACHE_BYTES = 16e9  # of the local disk for the cache; half of what is free there at most


class ByteRange(NamedTuple):
    """A record batch in a file of a packed set."""

    name: str  # of the file, below the set's directory
    start: int  # its first byte
    n_bytes: int
    crc: int  # CRC-32 of its bytes


def open_storage(where: pathlib.Path | str) -> LocalStorage | BucketStorage:
    """Return the storage of a packed directory.

    Args:
        where: a path, or s3://BUCKET/PATH or gs://BUCKET/PATH.

    Raises:
        UserError: there is no packed set.
    """
    if "://" in str(where):
        return BucketStorage(str(where))
    return LocalStorage(stage.local_path(where))


class LocalStorage:
    """A packed directory on a disk. `close` gives back the memory that reading took."""

    is_remote = False

    def __init__(self, root: pathlib.Path):
        """Read the manifest."""
        self.where, self.root, self.manifest = str(root), root, stage.read_manifest(root)
        self.mapped = functools.lru_cache(maxsize=MAX_OPEN_FILES)(self.map_range)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is missing."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return None

    def read_file_bytes(self, name: str) -> bytes:
        """Return all of a small file."""
        return (self.root / name).read_bytes()

    def copy_to_local(self, name: str, to: pathlib.Path) -> bool:
        """Copy a directory next to this one. Return whether there is one."""
        source = self.root.parent / name
        if not source.is_dir():
            return False
        shutil.copytree(source, to, dirs_exist_ok=True)
        return True

    def map_range(self, name: str) -> mmap.mmap:
        """Map a whole file into memory."""
        with open(self.root / name, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read_range(self, range: ByteRange) -> memoryview:
        """Return the bytes of a range, without a copy."""
        view = memoryview(self.mapped(range.name))
        return view[range.start : range.start + range.n_bytes]

    def is_whole(self, range: ByteRange) -> bool:
        """Return whether the bytes are those that were written.

        They are read past the mapping, so that they take up no memory of this process.
        """
        with open(self.root / range.name, "rb") as file:
            file.seek(range.start)
            return zlib.crc32(file.read(range.n_bytes)) == range.crc

    def close(self, range: ByteRange) -> None:
        """Release the memory of a range; a later reader finds it on the disk again."""
        first = -(-range.start // mmap.PAGESIZE) * mmap.PAGESIZE
        n_bytes = range.start + range.n_bytes - first
        if n_bytes > 0:
            self.mapped(range.name).madvise(mmap.MADV_DONTNEED, first, n_bytes)


class BucketStorage:
    """A packed directory in an object store.

    Ranges are fetched ahead of their use where that is known, and cached on the local disk.
    Credentials, region and endpoint are the store's own: AWS_ACCESS_KEY_ID, AWS_PROFILE,
    AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS.
    """

    is_remote = True

    def __init__(self, address: str):
        """Read the manifest. Raise UserError if the store cannot be read."""
        self.where = address
        manifest = f"{address}/manifest.json"
        try:
            self.files, self.root = pyarrow.fs.FileSystem.from_uri(address)
            self.manifest = stage.parse_manifest(self.read_file_bytes("manifest.json"), manifest)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{address}: cannot be opened ({first_storage_error_line(error)}). "
                "Check the address, the credentials and the endpoint."
            ) from None
        self.listed = functools.cache(self.list_objects)
        self.opened = functools.lru_cache(maxsize=MAX_OPEN_FILES)(self.open_object)
        self.pool = concurrent.futures.ThreadPoolExecutor(N_FETCH_THREADS, "fetch")
        self.requests: dict[ByteRange, concurrent.futures.Future[bytes]] = {}
        self.lock = threading.Lock()
        directory = cache_directory() / self.manifest.fingerprint
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        self.cache = RangeCache(directory, min(CACHE_BYTES, free / 2))

    def open_object(self, name: str) -> pa.NativeFile:
        """Open a file for reading by ranges."""
        return self.files.open_input_file(f"{self.root}/{name}")

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if it is missing."""
        directory, _, file = name.rpartition("/")
        return self.listed(directory).get(file)

    def list_objects(self, directory: str) -> dict[str, int]:
        """Return file -> bytes, with one request per thousand files."""
        selector = pyarrow.fs.FileSelector(f"{self.root}/{directory}", allow_not_found=True)
        infos = self.files.get_file_info(selector)
        return {info.base_name: info.size for info in infos if info.is_file}

    def read_file_bytes(self, name: str) -> bytes:
        """Return all of a small file."""
        return self.fetch_object(f"{self.root}/{name}")

    def fetch_object(self, path: str) -> bytes:
        """Return all of a small object."""
        with self.files.open_input_stream(path) as stream:
            return stream.read()

    def copy_to_local(self, name: str, to: pathlib.Path) -> bool:
        """Copy a directory next to this one. Return whether there is one."""
        source = f"{self.root.rpartition('/')[0]}/{name}"
        selector = pyarrow.fs.FileSelector(source, allow_not_found=True)
        infos = self.files.get_file_info(selector)
        for info in infos:
            if info.is_file:
                to.mkdir(exist_ok=True)
                (to / info.base_name).write_bytes(self.fetch_object(info.path))
        return bool(infos)

    def prefetch(self, range: ByteRange) -> None:
        """Start to fetch a range that will be read soon, unless MAX_PREFETCH are under way."""
        if len(self.requests) < MAX_PREFETCH:
            self.submit_fetch(range)

    def submit_fetch(self, range: ByteRange) -> concurrent.futures.Future[bytes]:
        """Request a range, once."""
        with self.lock:
            if range not in self.requests:
                self.requests[range] = self.pool.submit(self.fetch_range, range)
            return self.requests[range]

    def start_fetch(self) -> None:
        """Forget what was prefetched: another order begins."""
        with self.lock:
            self.requests.clear()

    def read_range(self, range: ByteRange) -> memoryview:
        """Return the bytes of a range, by one request for all threads that read it."""
        data = self.submit_fetch(range).result()
        with self.lock:
            self.requests.pop(range, None)
        return memoryview(data)

    def fetch_range(self, range: ByteRange) -> bytes:
        """Return the bytes of a range from the cache or the store."""
        cached = self.cache.load_range(range)
        if cached is not None:
            return cached
        try:
            data = self.opened(range.name).read_at(range.n_bytes, range.start)
        except OSError as error:
            raise UserError(
                f"{self.where}/{range.name}: could not be read "
                f"({first_storage_error_line(error)}). Check the network and the credentials; "
                "the same command continues."
            ) from None
        if zlib.crc32(data) == range.crc:
            self.cache.store_range(range, data)
        return data

    def close(self, range: ByteRange) -> None:
        """Do nothing: the bytes go with their last reader."""


class RangeCache:
    """Ranges cached as files, limit_bytes in all; the oldest are evicted."""

    def __init__(self, directory: pathlib.Path, limit_bytes: float):
        """List what earlier runs cached."""
        self.directory, self.limit_bytes, self.lock = directory, limit_bytes, threading.Lock()
        files = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime)
        self.sizes = {file.name: file.stat().st_size for file in files}  # oldest first
        self.n_bytes = sum(self.sizes.values())

    def cache_path(self, range: ByteRange) -> pathlib.Path:
        """Return the file of a range."""
        return self.directory / f"{range.name.replace('/', '+')}+{range.start}"

    def load_range(self, range: ByteRange) -> bytes | None:
        """Return a cached range; None if it is missing or damaged."""
        try:
            data = self.cache_path(range).read_bytes()
        except OSError:
            return None
        return data if zlib.crc32(data) == range.crc else None

    def store_range(self, range: ByteRange, data: bytes) -> None:
        """Cache a range, if it fits."""
        file = self.cache_path(range)
        with self.lock:
            old = [] if file.name in self.sizes else list(self.evict(len(data)))
            if self.n_bytes + len(data) > self.limit_bytes:
                return
            self.sizes[file.name] = len(data)
            self.n_bytes += len(data)
        for name in old:
            (self.directory / name).unlink(missing_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_bytes(data)
        temporary.rename(file)

    def evict(self, n_bytes: int) -> Iterator[str]:
        """Yield names of the oldest files, taken off the list until n_bytes more fit."""
        while self.sizes and self.n_bytes + n_bytes > self.limit_bytes:
            name = next(iter(self.sizes))
            self.n_bytes -= self.sizes.pop(name)
            yield name


def cache_directory() -> pathlib.Path:
    """Return the directory of all caches."""
    default = pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", default)) / "jaxpt" / "packed"


def first_storage_error_line(error: BaseException) -> str:
    """Return an error's first line."""
    return (str(error) or type(error).__name__).splitlines()[0]
