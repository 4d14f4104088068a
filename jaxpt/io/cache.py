"""Give libraries that open files themselves a local path of what lies in a bucket.

A copy is fetched once per version of the object and kept in this user's cache directory. A process
holds a shared flock on what it uses, so cleaning up takes only what nobody uses; the kernel drops
the lock of a process that was killed.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
from typing import IO

from jaxpt.io import bucket, files
from jaxpt.io.errors import FileError, MissingFileError, explain, printable
from jaxpt.io.paths import BucketPath, Path

CACHE_BYTES = 16e9  # of copies on the local disk; half of what is free there at most
N_DOWNLOADS = 8  # files that are fetched at a time
IN_USE = ".in_use"

held: dict[pathlib.Path, IO[bytes]] = {}  # directories that this process uses


def local_copy(path: Path) -> pathlib.Path:
    """Return a local path of a file or directory, with the same name and suffix.

    What lies on a disk is itself returned. A bucket's objects are fetched, unless the cache has
    this version of each.

    Raises:
        MissingFileError: there is nothing.
    """
    if isinstance(path, pathlib.Path):
        return path
    objects = find_objects(path)
    copies = files.cache_directory() / "copies"
    place = copies / fingerprint_versions(path, objects)
    use(place)
    local = place / path.name
    missing = {}
    for name, found in objects.items():
        if files.size(local / name) != found.size:
            missing[name] = found
    make_room(copies, sum(found.size for found in missing.values()))
    fetch = functools.partial(fetch_object, path, local)
    with concurrent.futures.ThreadPoolExecutor(N_DOWNLOADS) as pool:
        list(pool.map(fetch, missing, missing.values()))
    return local


def find_objects(path: BucketPath) -> dict[str, bucket.StoredObject]:
    """Return name below the path -> object; the name is empty if the path is one itself."""
    found = bucket.look_up(path)
    if found:
        return {"": found}
    objects = bucket.list_objects(path)
    if not objects:
        raise MissingFileError(
            f"{printable(path)}: not found. Check the path, or run the stage that writes it."
        )
    return objects


def fingerprint_versions(path: BucketPath, objects: dict[str, bucket.StoredObject]) -> str:
    """Return a name for the path's objects in these versions."""
    text = repr((str(path), sorted(objects.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fetch_object(
    path: BucketPath, local: pathlib.Path, name: str, found: bucket.StoredObject
) -> None:
    """Fetch an object below a path into its file below `local`, whole or not at all."""
    source = path / name
    with files.writing(local / name) as temporary:
        bucket.download(source, temporary)
        n_bytes = temporary.stat().st_size
        if n_bytes != found.size or not has_md5(temporary, found.md5):
            raise FileError(
                f"{printable(source)}: {n_bytes:,} bytes arrived, expected {found.size:,}, or "
                "others than were stored: it was changed meanwhile, or the network failed. "
                "Run the same command again."
            )


def has_md5(file: pathlib.Path, md5: str | None) -> bool:
    """Return whether a file has the MD5, in base64, that the bucket states; True if it has none."""
    if md5 is None:
        return True
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "md5").digest()
    return base64.b64encode(digest).decode() == md5


def use(place: pathlib.Path) -> None:
    """Lock a directory of the cache for as long as this process lives."""
    if place in held:
        return
    with explain("written", place):
        while True:
            place.mkdir(parents=True, exist_ok=True)
            try:
                file = open(place / IN_USE, "ab")
            except FileNotFoundError:  # removed at this moment by another process
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if is_same(file, place):
                    os.utime(place / IN_USE)
                    held[place] = file
                    return
            file.close()


def is_same(file: IO[bytes], place: pathlib.Path) -> bool:
    """Return whether an open file is still the one of that name."""
    return os.path.samestat(os.fstat(file.fileno()), os.stat(place / IN_USE))


def make_room(copies: pathlib.Path, n_bytes: int) -> None:
    """Remove the copies that were not used for longest until n_bytes more fit."""
    with explain("cleaned", copies):
        limit = min(CACHE_BYTES, shutil.disk_usage(copies).free / 2)
        places = sorted(copies.iterdir(), key=last_use)
        sizes = {place: sum(files.list_files(place).values()) for place in places}
        total = sum(sizes.values()) + n_bytes
        for place, size in sizes.items():
            if total > limit and place not in held:
                total -= size * remove_unused(place)


def last_use(place: pathlib.Path) -> float:
    """Return when a copy was last used; 0 if that is not known."""
    with contextlib.suppress(OSError):
        return (place / IN_USE).stat().st_mtime
    return 0


def remove_unused(place: pathlib.Path) -> bool:
    """Remove a copy that no process uses. Return whether it was removed."""
    try:
        with open(place / IN_USE, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place)
    except OSError:
        return False
    return True
