"""Read and write single files, whole or not at all, on disks and in buckets.

What is written here is durable when the function returns: a cut of power leaves the old file or the
new one. ext4 and XFS write a file's bytes up to 30 seconds after its name, so the file is synced
before it gets its name, and its directory afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from io import BufferedIOBase, BufferedReader
from typing import Any, overload

from jaxpt.io import bucket
from jaxpt.io.errors import FileError, MissingFileError, explain, printable
from jaxpt.io.paths import BucketPath, Path
from jaxpt.spec import encode_json

WORKING = ".partial"  # the end of a working directory's name
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}")  # a name before its file is whole
BLOCK_BYTES = 1 << 16  # read at once from the end of a log

# ---- what is there


def size(path: Path) -> int | None:
    """Return the bytes of a file; None if there is none (a directory is none)."""
    if isinstance(path, BucketPath):
        found = bucket.look_up(path)
        return found.size if found else None
    with explain("looked at", path):
        return path.stat().st_size if path.is_file() else None


def version(path: Path) -> str:
    """Return a text that changes with a file's content: of a bucket's object what its store says.

    Raises:
        MissingFileError: there is no such file.
    """
    if isinstance(path, BucketPath):
        found = bucket.look_up(path)
        text = f"{found.size} bytes, {found.version}" if found else None
    else:
        with explain("looked at", path):
            state = path.stat()
            text = f"{state.st_size} bytes, {state.st_mtime_ns}"
    if text is None:
        raise MissingFileError(f"{printable(path)}: not found. Check the path.")
    return text


def exists(path: Path) -> bool:
    """Return whether there is a file, a directory or an object of this name or below it."""
    if isinstance(path, BucketPath):
        return bucket.look_up(path) is not None or bool(bucket.list_names(path))
    with explain("looked at", path):
        return path.exists()


def list_names(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none if it is not there.

    What a killed process left half written is left out, here and in `list_files`.
    """
    if isinstance(directory, BucketPath):
        return bucket.list_names(directory)
    with explain("listed", directory):
        names = os.listdir(directory) if directory.is_dir() else []
    return sorted(name for name in names if not TEMPORARY.fullmatch(name))


def list_files(directory: Path) -> dict[str, int]:
    """Return name below the directory -> bytes, for all files below it; none if it is not there."""
    if isinstance(directory, BucketPath):
        objects = bucket.list_objects(directory)
        return {name: objects[name].size for name in sorted(objects)}
    sizes = {}
    with explain("listed", directory):
        for parent, directories, names in os.walk(directory, onerror=raise_unless_missing):
            directories[:] = [name for name in directories if not TEMPORARY.fullmatch(name)]
            for name in names:
                if TEMPORARY.fullmatch(name):
                    continue
                file = pathlib.Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # removed since, or a link to nothing
                    found = file.stat()
                    if stat.S_ISREG(found.st_mode):  # no pipe, no device
                        sizes[file.relative_to(directory).as_posix()] = found.st_size
    return dict(sorted(sizes.items()))


@overload
def find(directory: pathlib.Path, pattern: str) -> list[pathlib.Path]: ...
@overload
def find(directory: BucketPath, pattern: str) -> list[BucketPath]: ...
def find(directory: Path, pattern: str) -> list[pathlib.Path] | list[BucketPath]:
    """Return the files below a directory that match "*.json" or "*/manifest.json", sorted."""
    if not isinstance(directory, BucketPath):
        with explain("listed", directory):
            return sorted(file for file in directory.glob(pattern) if file.is_file())
    n_parts = pattern.count("/") + 1
    found = []
    for name in list_files(directory):
        path = pathlib.PurePosixPath(name)
        if len(path.parts) == n_parts and path.match(pattern):
            found.append(directory / name)
    return found


def raise_unless_missing(error: OSError) -> None:
    """Let os.walk fail where a directory cannot be listed."""
    if not isinstance(error, FileNotFoundError):
        raise error


# ---- reading


def read_bytes(path: Path) -> bytes:
    """Return all of a file. Raise MissingFileError if it is not there."""
    if isinstance(path, BucketPath):
        return bucket.read(path)
    with explain("read", path), open_file(path) as file:
        return file.read()


def read_range(path: Path, start: int, n_bytes: int) -> bytes:
    """Return bytes of a file from `start` on; fewer where it ends."""
    if isinstance(path, BucketPath):
        return bucket.read(path, start, start + n_bytes)
    with explain("read", path), open_file(path) as file:
        file.seek(start)
        return file.read(n_bytes)


def map_file(path: pathlib.Path) -> mmap.mmap:
    """Map a whole file on a disk into memory, for reading."""
    with explain("read", path), open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def map_part(path: pathlib.Path, start: int, n_bytes: int) -> memoryview:
    """Map bytes of a file on a disk into memory, for reading, until the view is dropped."""
    if not n_bytes:
        return memoryview(b"")
    n_before = start % mmap.ALLOCATIONGRANULARITY
    with explain("read", path), open(path, "rb") as file:
        try:
            mapped = mmap.mmap(
                file.fileno(),
                n_before + n_bytes,
                access=mmap.ACCESS_READ,
                offset=start - n_before,
            )
        except ValueError:
            raise FileError(
                f"{printable(path)}: became shorter while it was read. Run the same command again."
            ) from None
    return memoryview(mapped)[n_before:]


def open_read(path: Path) -> BufferedIOBase:
    """Open a file for reading from its start to its end. What reads it explains its errors."""
    if isinstance(path, BucketPath):
        with explain("read", path):
            return BufferedReader(bucket.open_bucket(path).open(path.address, "rb"))
    with explain("read", path):
        return open_file(path)


def open_file(path: pathlib.Path) -> BufferedReader:
    """Open a file on a disk. A pipe that nobody writes is empty; a device is refused."""
    file = open(path, "rb", opener=open_without_waiting)
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        file.close()
        raise FileError(f"{printable(path)}: is a device. Give a file.")
    os.set_blocking(file.fileno(), True)
    return file


def open_without_waiting(name: str, flags: int) -> int:
    """Open a file; of a pipe, do not wait for who writes it."""
    return os.open(name, flags | os.O_NONBLOCK)


def read_text(path: Path) -> str:
    """Return a UTF-8 file, whatever the locale. Raise FileError if it is none."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{printable(path)}: expected UTF-8, got byte {data[error.start]:#04x} at "
            f"{error.start:,}. Restore the file, or convert it."
        ) from None


def read_text_if_there(path: Path) -> str | None:
    """Return a UTF-8 file; None if it is not there."""
    try:
        return read_text(path)
    except MissingFileError:
        return None


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raise FileError if it holds none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{printable(path)}: expected JSON ({printable(error)}). Restore the file, or delete "
            "it and run what writes it again."
        ) from None


def read_lines(path: Path) -> list[bytes]:
    """Return the whole lines of a log, without a last one that was cut; none without a file."""
    try:
        data = read_bytes(path)
    except MissingFileError:
        return []
    return data.split(b"\n")[:-1]


def read_lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (first byte, line) of the whole lines of a log, the last one first.

    Only what is asked for is read. A last line that was cut is left out.
    """
    start = size(path) or 0
    rest = b""
    is_cut = True
    while start:
        n_bytes = min(start, BLOCK_BYTES)
        start -= n_bytes
        first, *lines = (read_range(path, start, n_bytes) + rest).split(b"\n")
        ends = start + len(first) + 1
        starts = []
        for line in lines:
            starts.append(ends)
            ends += len(line) + 1
        for place, line in zip(reversed(starts), reversed(lines), strict=True):
            if not is_cut:
                yield place, line
            is_cut = False
        rest = first
    if not is_cut:
        yield 0, rest


def cut(path: Path, n_bytes: int) -> None:
    """Keep the first bytes of a log, durably."""
    if isinstance(path, BucketPath):
        bucket.write(path, read_range(path, 0, n_bytes))
        return
    with explain("cut", path):
        os.truncate(path, n_bytes)
        sync(path)


# ---- writing


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, durably: a reader finds the old one or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a record or plain value as JSON, as `write_text` does."""
    text = json.dumps(encode_json(value), indent=1)
    write_text(path, f"{text}\n")


def write_unsynced(path: Path, value: Any) -> None:
    """Write a record or text that a cut of power may lose, such as a sign of life."""
    data = value if isinstance(value, str) else json.dumps(encode_json(value))
    if isinstance(path, BucketPath):
        bucket.write(path, data.encode())
        return
    with explain("written", path):
        path.write_bytes(data.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, as `write_text` does."""
    if isinstance(path, BucketPath):
        bucket.write(path, data)
        return
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[pathlib.Path]:
    """Yield a local name to write to. The file gets its own name, durably, if the block ends well.

    A library that writes a file by its name (numpy, Arrow) gets this one. What lies in a working
    directory is not synced one by one: `seal` does it.
    """
    name = temporary_name(path)
    if isinstance(path, BucketPath):
        temporary = cache_directory() / name
    else:
        make_directory(path.parent)
        temporary = path.with_name(name)
    try:
        with explain("written", path):
            yield temporary
            if isinstance(path, BucketPath):
                bucket.upload(temporary, path)
                return
            if is_working(path):
                os.rename(temporary, path)
                return
            sync(temporary)
            os.rename(temporary, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> str:
    """Return the name of a file beside `path` before it is whole; no two are equal."""
    return f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def open_write(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file for writing, as `writing` does."""
    with writing(path) as temporary, open(temporary, "wb") as file:
        yield file


def create(path: Path, data: bytes) -> bool:
    """Write a file with all its bytes unless there is one. Return whether this call wrote it.

    On a disk a hard link takes the name: link is atomic on NFS too, and no reader sees half of it.
    Where there are no hard links (some FUSE mounts) the file is made by O_EXCL.
    """
    if isinstance(path, BucketPath):
        return bucket.create(path, data)
    make_directory(path.parent)
    with explain("written", path):
        temporary = path.with_name(temporary_name(path))
        try:
            temporary.write_bytes(data)
            sync(temporary)
            os.link(temporary, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then meets its own link
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return create_by_open(path, data)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
        return True


def create_by_open(path: pathlib.Path, data: bytes) -> bool:
    """Write a file unless there is one, without a hard link."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    sync(path)
    sync(path.parent)
    return True


def sync(path: pathlib.Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # some network and FUSE mounts cannot sync a directory
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


class LineLog:
    """Appends lines to a file; on a disk each is durable when `append` returns.

    A cut leaves whole lines and at most one torn one, which `read_lines` and the next LineLog drop.
    A bucket cannot append: there `flush` and `close` write the whole file anew.
    """

    def __init__(self, path: Path):
        """Open the file, made if it is not there."""
        self.path = path
        self.lock = threading.Lock()
        self.data = bytearray()  # of a bucket's file
        if isinstance(path, BucketPath):
            self.data += join_lines(read_lines(path))
            return
        make_directory(path.parent)
        with explain("written", path):
            self.file = open(path, "ab", buffering=0)
            self.n_bytes = 0  # of the lines that are whole
            for start, line in read_lines_from_end(path):
                self.n_bytes = start + len(line) + 1
                break
            self.file.truncate(self.n_bytes)
            sync(path)
            sync(path.parent)

    def append(self, line: str) -> None:
        """Write one line, without its newline."""
        data = f"{line}\n".encode()
        with self.lock, explain("written", self.path):
            if not isinstance(self.path, BucketPath):
                self.append_to_file(data)
                return
            self.data += data

    def append_to_file(self, data: bytes) -> None:
        """Write all bytes, or, where that fails, none."""
        try:
            n_written = 0
            while n_written < len(data):  # a disk that is nearly full takes a part
                n_written += self.file.write(data[n_written:]) or 0
            os.fdatasync(self.file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self.file.truncate(self.n_bytes)
            raise
        self.n_bytes += len(data)

    def flush(self) -> None:
        """Write the file in a bucket anew."""
        if isinstance(self.path, BucketPath):
            with self.lock:
                data = bytes(self.data)
            bucket.write(self.path, data)

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        if not isinstance(self.path, BucketPath):
            self.file.close()


def join_lines(lines: list[bytes]) -> bytes:
    """Return lines as the bytes of a file."""
    return b"".join(line + b"\n" for line in lines)


def append_line(path: Path, line: str) -> None:
    """Append one line to a file that gets few, such as one per start."""
    log = LineLog(path)
    try:
        log.append(line)
    finally:
        log.close()


def copy_file(source: Path, to: Path) -> None:
    """Copy a file, durably."""
    if isinstance(source, pathlib.Path) and isinstance(to, BucketPath):
        bucket.upload(source, to)
        return
    with writing(to) as temporary:
        copy_bytes(source, temporary)


def copy_bytes(source: Path, temporary: pathlib.Path) -> None:
    """Copy a file to a local name."""
    if isinstance(source, BucketPath):
        bucket.download(source, temporary)
        return
    with explain("copied", source):
        shutil.copyfile(source, temporary)


# ---- directories and removal


def make_directory(path: Path) -> None:
    """Make a directory and those above it, durably; a bucket has none."""
    if isinstance(path, BucketPath):
        return
    with explain("made", path):
        missing = [path, *path.parents]
        missing = [directory for directory in missing if not directory.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for directory in missing:
            sync(directory.parent)


def check_writable(directory: Path) -> None:
    """Make a directory and raise FileError if no file can be written there."""
    make_directory(directory)
    if isinstance(directory, pathlib.Path):
        with explain("written", directory), tempfile.TemporaryFile(dir=directory):
            pass


def drop_cached(path: Path) -> None:
    """Have the next reading of a file come from its disk, where the system can be asked to."""
    if isinstance(path, pathlib.Path) and hasattr(os, "posix_fadvise"):
        with explain("read", path), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(path: Path) -> None:
    """Remove one file, if it is there."""
    if isinstance(path, BucketPath):
        bucket.remove(path)
        return
    with explain("removed", path):
        path.unlink(missing_ok=True)


def remove_working(directory: pathlib.Path) -> None:
    """Remove a working directory, or one inside it, if it is there.

    One inside it is whole or gone: it gets a temporary name first, so that the next start does not
    take what is half removed for its own finished work.

    Raises:
        ValueError: no part of the path is a working directory's name: a bug, not a user's mistake.
    """
    if not is_working(directory):
        raise ValueError(f"{directory}: not a working directory")
    with explain("removed", directory):
        if directory.is_symlink() or directory.is_file():
            directory.unlink()
        elif directory.exists():
            if is_working(directory.parent):
                directory = directory.rename(directory.with_name(temporary_name(directory)))
            shutil.rmtree(directory)


@contextlib.contextmanager
def temporary_directory() -> Iterator[pathlib.Path]:
    """Yield a directory on a disk, removed afterwards; what is written there is not synced."""
    with contextlib.ExitStack() as stack:
        with explain("written", "the directory for temporary files (TMPDIR)"):
            temporary = tempfile.TemporaryDirectory(prefix="jaxpt-", suffix=WORKING)
            name = stack.enter_context(temporary)
        yield pathlib.Path(name)


def is_working(path: pathlib.Path) -> bool:
    """Return whether a path is a working directory, what a library made beside it, or in one."""
    return any(f"{WORKING}." in f"{part}." for part in path.absolute().parts)


def cache_directory() -> pathlib.Path:
    """Return the directory of this user's caches, made if it is not there; nobody else reads it."""
    default = pathlib.Path.home() / ".cache"
    directory = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or default) / "jaxpt"
    with explain("made", directory):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory
