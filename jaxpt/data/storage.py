"""Read packed sequences from a disk, mapped into memory, or from a bucket, by ranges.

What is read from a bucket is cached on the local disk.
"""

from __future__ import annotations

import concurrent.futures
import functools
import mmap
import pathlib
import shutil
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxpt import io, stage

MAX_OPEN_FILES = 128  # shards of a set that are open at a time
# smaller ranges are copied: a mapping costs an open file, of which there may be 1,024, and a set of
# many small sources would open and close one per sequence
MIN_MAPPED_BYTES = 512_000
N_FETCH_THREADS = 16  # ranges requested of a bucket at a time
MAX_PREFETCH = 256  # ranges that were requested ahead of time and are not used yet
CACHE_BYTES = 16e9  # of the local disk for the cache; half of what is free there at most


class ByteRange(NamedTuple):
    """A record batch in a file of a packed set."""

    name: str  # of the file, below the set's directory
    start: int  # its first byte
    n_bytes: int
    crc: int  # CRC-32 of its bytes


def open_storage(where: io.Path | str) -> LocalStorage | BucketStorage:
    """Return the storage of a packed directory. Raise UserError if there is no packed set."""
    root = io.path(where)
    if isinstance(root, io.BucketPath):
        return BucketStorage(root)
    return LocalStorage(root)


class Storage:
    """A packed directory.

    Attributes:
        where: its name.
        manifest: of the stage that wrote it.
        sizes: file below it -> bytes.
    """

    def __init__(self, root: io.Path):
        """Read the manifest, and list the files."""
        self.root = root
        self.where = str(root)
        self.manifest = stage.read_manifest(root)
        self.sizes = io.list_files(root)

    def read_file_bytes(self, name: str) -> bytes:
        """Return all of a small file."""
        return io.read_bytes(self.root / name)


class LocalStorage(Storage):
    """A packed directory on a disk. `close` gives back the memory that reading took."""

    def __init__(self, root: pathlib.Path):
        """Read the manifest."""
        super().__init__(root)
        self.directory = root
        self.mapped = functools.lru_cache(maxsize=MAX_OPEN_FILES)(self.map_range)

    def map_range(self, name: str) -> mmap.mmap:
        """Map a whole file into memory."""
        return io.map_file(self.directory / name)

    def read_range(self, range: ByteRange) -> memoryview:
        """Return the bytes of a range, without a copy unless they are few."""
        if range.n_bytes < MIN_MAPPED_BYTES:
            return memoryview(self.copy_range(range))
        view = memoryview(self.mapped(range.name))
        return view[range.start : range.start + range.n_bytes]

    def is_whole(self, range: ByteRange) -> bool:
        """Return whether the bytes are those that were written.

        They are read past the mapping, so that they take up no memory of this process.
        """
        return zlib.crc32(self.copy_range(range)) == range.crc

    def copy_range(self, range: ByteRange) -> bytes:
        """Return a copy of the bytes of a range."""
        return io.read_range(self.root / range.name, range.start, range.n_bytes)

    def close(self, range: ByteRange) -> None:
        """Release the memory of a range; a later reader finds it on the disk again."""
        if range.n_bytes < MIN_MAPPED_BYTES:
            return
        first = -(-range.start // mmap.PAGESIZE) * mmap.PAGESIZE
        n_bytes = range.start + range.n_bytes - first
        if n_bytes > 0:
            self.mapped(range.name).madvise(mmap.MADV_DONTNEED, first, n_bytes)


class BucketStorage(Storage):
    """A packed directory in a bucket.

    Ranges are fetched ahead of their use where that is known, and cached on the local disk.
    """

    def __init__(self, root: io.BucketPath):
        """Read the manifest. Raise UserError if the bucket cannot be read."""
        super().__init__(root)
        self.pool = concurrent.futures.ThreadPoolExecutor(N_FETCH_THREADS, "fetch")
        self.requests: dict[ByteRange, concurrent.futures.Future[bytes]] = {}
        self.lock = threading.Lock()
        directory = cache_directory() / self.manifest.fingerprint
        io.make_directory(directory)
        free = shutil.disk_usage(directory).free
        self.cache = RangeCache(directory, min(CACHE_BYTES, free / 2))

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
        data = io.read_range(self.root / range.name, range.start, range.n_bytes)
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
        files = io.find(directory, "*")
        files.sort(key=lambda file: file.stat().st_mtime)
        self.sizes = {file.name: file.stat().st_size for file in files}  # oldest first
        self.n_bytes = sum(self.sizes.values())

    def cache_path(self, range: ByteRange) -> pathlib.Path:
        """Return the file of a range."""
        return self.directory / f"{range.name.replace('/', '+')}+{range.start}"

    def load_range(self, range: ByteRange) -> bytes | None:
        """Return a cached range; None if it is missing or damaged."""
        try:
            data = io.read_bytes(self.cache_path(range))
        except io.FileError:
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
            io.remove(self.directory / name)
        io.write_bytes(file, data)

    def evict(self, n_bytes: int) -> Iterator[str]:
        """Yield names of the oldest files, taken off the list until n_bytes more fit."""
        while self.sizes and self.n_bytes + n_bytes > self.limit_bytes:
            name = next(iter(self.sizes))
            self.n_bytes -= self.sizes.pop(name)
            yield name


def cache_directory() -> pathlib.Path:
    """Return the directory of all caches of packed sets."""
    return io.cache_directory() / "packed"
