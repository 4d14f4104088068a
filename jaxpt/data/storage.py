"""Where packed rows lie: on a disk, mapped into memory, or in an object store, read by ranges and kept on a disk for a while."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import mmap
import os
import pathlib
import shutil
import threading
import zlib
from typing import NamedTuple

import pyarrow.fs

from jaxpt import stage
from jaxpt.spec import Manifest, UserError

MAX_OPEN_FILES = 128  # at a time, of a set's shards
N_FETCH_THREADS = 16  # ranges asked of an object store at a time
MAX_PREFETCH = 256  # ranges that were asked for ahead of time and are not used yet
CACHE_BYTES = 16e9  # of the local disk that keep what was read from an object store; half of what is free there at most


class ByteRange(NamedTuple):
    """A record batch in a file of a packed set."""

    name: str  # of the file, below the set's directory
    start: int  # its first byte
    n_bytes: int
    crc: int  # CRC-32 of its bytes


def open_storage(where: pathlib.Path | str) -> LocalStorage | BucketStorage:
    """A packed directory, or its address in an object store: s3://BUCKET/PATH or gs://BUCKET/PATH. Raises UserError where none is there."""
    return (
        BucketStorage(str(where)) if "://" in str(where) else LocalStorage(stage.local_path(where))
    )


class LocalStorage:
    """A packed directory on a disk. Memory that reading took is given back by `forget`."""

    is_remote = False

    def __init__(self, root: pathlib.Path):
        self.where, self.root, self.manifest = str(root), root, Manifest.load(root)
        self.mapped = functools.lru_cache(maxsize=MAX_OPEN_FILES)(self.map_range)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where it is missing."""
        with contextlib.suppress(OSError):
            return (self.root / name).stat().st_size

    def read_file_bytes(self, name: str) -> bytes:
        """All of a small file."""
        return (self.root / name).read_bytes()

    def copy_to_local(self, name: str, to: pathlib.Path) -> bool:
        """Copy a directory that stands beside this one, if there is one."""
        if found := (self.root.parent / name).is_dir():
            shutil.copytree(self.root.parent / name, to, dirs_exist_ok=True)
        return found

    def map_range(self, name: str) -> mmap.mmap:
        with open(self.root / name, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read_range(self, wanted: ByteRange) -> memoryview:
        return memoryview(self.mapped(wanted.name))[wanted.start : wanted.start + wanted.n_bytes]

    def is_whole(self, wanted: ByteRange) -> bool:
        """Whether the bytes are those that were written. Read past the mapping, so that they take up no memory of this process."""
        with open(self.root / wanted.name, "rb") as file:
            file.seek(wanted.start)
            return zlib.crc32(file.read(wanted.n_bytes)) == wanted.crc

    def close(self, wanted: ByteRange) -> None:
        """Let go of the memory that a range was mapped into; who still reads from it finds it again on the disk."""
        first = -(-wanted.start // mmap.PAGESIZE) * mmap.PAGESIZE
        if (n_bytes := wanted.start + wanted.n_bytes - first) > 0:
            self.mapped(wanted.name).madvise(mmap.MADV_DONTNEED, first, n_bytes)


class BucketStorage:
    """A packed directory in an object store. A range is fetched ahead of its use where that is known, and kept on the local disk.

    Credentials, region and endpoint are the store's own: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS.
    """

    is_remote = True

    def __init__(self, address: str):
        self.where = address
        try:
            self.files, self.root = pyarrow.fs.FileSystem.from_uri(address)
            self.manifest = Manifest.parse(
                self.read_file_bytes("manifest.json"), f"{address}/manifest.json"
            )
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{address}: cannot be opened ({first_storage_error_line(error)}). Check the address, the credentials and the endpoint."
            ) from None
        self.listed = functools.cache(self.list_objects)
        self.opened = functools.lru_cache(maxsize=MAX_OPEN_FILES)(
            lambda name: self.files.open_input_file(f"{self.root}/{name}")
        )
        self.pool = concurrent.futures.ThreadPoolExecutor(
            N_FETCH_THREADS, thread_name_prefix="fetch"
        )
        self.asked: dict[ByteRange, concurrent.futures.Future] = {}
        self.lock = threading.Lock()
        directory = cache_directory() / self.manifest.fingerprint
        directory.mkdir(parents=True, exist_ok=True)
        self.cache = RangeCache(directory, min(CACHE_BYTES, shutil.disk_usage(directory).free / 2))

    def size(self, name: str) -> int | None:
        directory, _, file = name.rpartition("/")
        return self.listed(directory).get(file)

    def list_objects(self, directory: str) -> dict[str, int]:
        """{file: bytes}, in one request for a thousand of them."""
        selector = pyarrow.fs.FileSelector(f"{self.root}/{directory}", allow_not_found=True)
        return {
            each.base_name: each.size for each in self.files.get_file_info(selector) if each.is_file
        }

    def read_file_bytes(self, name: str) -> bytes:
        return self.fetch_object(f"{self.root}/{name}")

    def fetch_object(self, path: str) -> bytes:
        with self.files.open_input_stream(path) as stream:
            return stream.read()

    def copy_to_local(self, name: str, to: pathlib.Path) -> bool:
        """Copy a directory that stands beside this one, if there is one."""
        source = f"{self.root.rpartition('/')[0]}/{name}"
        files = self.files.get_file_info(pyarrow.fs.FileSelector(source, allow_not_found=True))
        for file in (each for each in files if each.is_file):
            to.mkdir(exist_ok=True)
            (to / file.base_name).write_bytes(self.fetch_object(file.path))
        return bool(files)

    def prefetch(self, wanted: ByteRange) -> None:
        """Begin to fetch a range that will be read soon, unless AHEAD are on their way."""
        if len(self.asked) < MAX_PREFETCH:
            self.submit_fetch(wanted)

    def submit_fetch(self, wanted: ByteRange) -> concurrent.futures.Future:
        with self.lock:
            if wanted not in self.asked:
                self.asked[wanted] = self.pool.submit(self.fetch_range, wanted)
            return self.asked[wanted]

    def start_fetch(self) -> None:
        """What was asked for ahead of time will not be read: another order begins."""
        with self.lock:
            self.asked.clear()

    def read_range(self, wanted: ByteRange) -> memoryview:
        found = self.submit_fetch(wanted).result()  # of one request, however many threads want it
        with self.lock:
            self.asked.pop(wanted, None)
        return memoryview(found)

    def fetch_range(self, wanted: ByteRange) -> bytes:
        if (kept := self.cache.load_range(wanted)) is not None:
            return kept
        try:
            found = self.opened(wanted.name).read_at(wanted.n_bytes, wanted.start)
        except OSError as error:
            raise UserError(
                f"{self.where}/{wanted.name}: could not be read ({first_storage_error_line(error)}). Check the network and the credentials; the same command goes on."
            ) from None
        if zlib.crc32(found) == wanted.crc:
            self.cache.store_range(wanted, found)
        return found

    def close(self, wanted: ByteRange) -> None:
        """Nothing: the bytes go with their last reader."""


class RangeCache:
    """Ranges kept as files, together limit_bytes at most; the oldest make room."""

    def __init__(self, directory: pathlib.Path, limit_bytes: float):
        self.directory, self.limit_bytes, self.lock = directory, limit_bytes, threading.Lock()
        files = sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime)
        self.sizes = {file.name: file.stat().st_size for file in files}  # oldest first
        self.n_bytes = sum(self.sizes.values())

    def cache_path(self, wanted: ByteRange) -> pathlib.Path:
        return self.directory / f"{wanted.name.replace('/', '+')}+{wanted.start}"

    def load_range(self, wanted: ByteRange) -> bytes | None:
        """What was put there; None where nothing was, or where it is damaged."""
        with contextlib.suppress(OSError):
            found = self.cache_path(wanted).read_bytes()
            return found if zlib.crc32(found) == wanted.crc else None

    def store_range(self, wanted: ByteRange, found: bytes) -> None:
        file = self.cache_path(wanted)
        with self.lock:
            old = [] if file.name in self.sizes else list(self.evict(len(found)))
            if self.n_bytes + len(found) > self.limit_bytes:
                return
            self.sizes[file.name] = len(found)
            self.n_bytes += len(found)
        for name in old:
            (self.directory / name).unlink(missing_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_bytes(found)
        temporary.rename(file)

    def evict(self, n_bytes: int):
        """Names of the oldest files, taken from the account until n_bytes more fit."""
        while self.sizes and self.n_bytes + n_bytes > self.limit_bytes:
            name = next(iter(self.sizes))
            self.n_bytes -= self.sizes.pop(name)
            yield name


def cache_directory() -> pathlib.Path:
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        / "jaxpt"
        / "packed"
    )


def first_storage_error_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
