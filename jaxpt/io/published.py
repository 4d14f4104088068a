"""Publish a directory: its files first, durable, then the manifest that names each of them.

A stage writes into a working directory (`working_directory`). `seal` makes its files durable and
returns their sizes and checksums; `publish` writes the manifest there, which decides: from now on
the new state is whole on the disk. Then each file moves to its final name by a rename of its own,
and the manifest last. No directory is renamed, so a bucket does the same by uploads.

A cut of power leaves the old state, or the new one in one of two places: `finish_publishing`, which
every start of a stage calls, moves what is left.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from jaxpt.io import bucket, files
from jaxpt.io.errors import FileError, MissingFileError, explain, printable
from jaxpt.io.paths import BucketPath, Path
from jaxpt.spec import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

MANIFEST = "manifest.json"
REPLACED = ".replaced.json"  # the manifest of what is being replaced, while it is
UNSYNCED = ".manifest.json"  # the new manifest, before it decides
PUBLISHED_DEPTH = 3  # a manifest names files in directories of directories at most
N_UPLOADS = 8  # files that are written to a bucket at a time


@dataclasses.dataclass(frozen=True)
class SealedFile:
    """A file of a published directory.

    Attributes:
        n_bytes: its size.
        checksum: its sha256, in hex; of what was written straight into a bucket, the store's own,
            such as "crc32c:4waSgw==".
    """

    n_bytes: int
    checksum: str


class Damage(NamedTuple):
    """A file of a published directory that is not as it was written."""

    name: str
    reason: str  # "is missing", "has 3 bytes, expected 7", "was changed (its checksum differs)"


def working_directory(out: Path) -> pathlib.Path:
    """Return the local directory in which what becomes `out` is made: OUT.partial.

    For a bucket it lies in the cache of this machine.
    """
    if isinstance(out, BucketPath):
        place = hashlib.sha256(str(out).encode()).hexdigest()[:16]
        return files.cache_directory() / "work" / f"{out.name}-{place}{files.WORKING}"
    with explain("found", out):
        out = out.resolve()
    return out.with_name(f"{out.name}{files.WORKING}")


def list_working() -> list[pathlib.Path]:
    """Return the working directories of buckets on this machine."""
    work = files.cache_directory() / "work"
    return [work / name for name in files.list_names(work)]


def seal(working: Path, ignore: Iterable[str] = ()) -> dict[str, SealedFile]:
    """Make every file of a directory durable. Return name -> size and checksum.

    What a library wrote straight into a bucket is durable already, and not read again: the store's
    checksums come with the listing.

    Args:
        working: its files have their final bytes.
        ignore: names that are not published.
    """
    if isinstance(working, BucketPath):
        objects = bucket.list_objects(working)
        sealed = {}
        for name, found in sorted(objects.items()):
            if name not in {MANIFEST, *ignore}:
                sealed[name] = SealedFile(found.size, found.checksum)
        return sealed
    sizes = files.list_files(working)
    names = [name for name in sizes if name not in {MANIFEST, REPLACED, UNSYNCED, *ignore}]
    paths = [working / name for name in names]
    with concurrent.futures.ThreadPoolExecutor() as pool, explain("written", working):
        # the disk writes while the processors hash
        synced = pool.map(files.sync, paths)
        checksums = list(pool.map(sha256, paths))
        list(synced)
    sealed = {}
    for name, checksum in zip(names, checksums, strict=True):
        sealed[name] = SealedFile(sizes[name], checksum)
    sync_directories(working, names)
    return sealed


def publish(working: pathlib.Path, out: Path, manifest: dict[str, Any]) -> None:
    """Publish sealed files as `out`, in place of what was published there before.

    Args:
        working: the working directory of `out`.
        out: what it becomes.
        manifest: "outputs", name -> sha256, and "sizes", name -> bytes, as `seal` found them, and
            whatever else the stage records.
    """
    files.remove(working / REPLACED)
    unsynced = working / UNSYNCED
    files.write_json(unsynced, manifest)
    with explain("written", out):
        files.sync(unsynced)
        os.rename(unsynced, working / MANIFEST)
        files.sync(working)
    finish_publishing(out)


def finish_publishing(out: Path) -> bool:
    """Move into place what was decided when a process or machine ended. Return whether it was."""
    working = working_directory(out)
    out = resolve(out)
    if not files.exists(working / MANIFEST):
        return False
    new = read_sealed(working)
    manifest = working / MANIFEST
    set_old_aside(out, working)
    remove_files(out, read_replaced(working).keys() - new.keys())
    if isinstance(out, BucketPath):
        upload_files(working, out, new)
        if not bucket.create(out / MANIFEST, files.read_bytes(manifest)):
            raise UserError(
                f"{printable(out)}: was published by another start meanwhile. "
                "Give another directory, or run the same command again."
            )
    else:
        move_files(working, out, new)
        move_file(manifest, out / MANIFEST)
        with explain("written", out):
            files.sync(out)
    files.remove_working(working)
    return True


def read_replaced(working: pathlib.Path) -> dict[str, SealedFile]:
    """Return what the manifest that was set aside names; nothing without a readable one."""
    with contextlib.suppress(UserError):
        return read_sealed(working, REPLACED)
    return {}


def set_old_aside(out: Path, working: pathlib.Path) -> None:
    """Take an old manifest away, so that no reader meets it beside new files."""
    if not files.exists(out / MANIFEST):
        return
    if isinstance(out, BucketPath):
        files.copy_file(out / MANIFEST, working / REPLACED)
        files.sync(working / REPLACED)
        files.remove(out / MANIFEST)
        return
    with explain("replaced", out):
        move_file(out / MANIFEST, working / REPLACED)
        files.sync(working)
        files.sync(out)


def move_files(working: pathlib.Path, out: pathlib.Path, sealed: dict[str, SealedFile]) -> None:
    """Give files their final names, durably; those that were moved before have them already."""
    files.make_directory(out)
    for name in sealed:
        if files.exists(working / name):
            files.make_directory((out / name).parent)
            move_file(working / name, out / name)
    sync_directories(out, sealed)


def move_file(source: pathlib.Path, to: pathlib.Path) -> None:
    """Rename a file; copy it where `to` is on another disk, such as a mount of its own."""
    with explain("written", to):
        try:
            os.rename(source, to)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            files.copy_file(source, to)
            source.unlink()


def upload_files(working: pathlib.Path, out: BucketPath, sealed: dict[str, SealedFile]) -> None:
    """Write files to a bucket, and look at what has arrived."""

    def upload(name: str) -> None:
        bucket.upload(working / name, out / name)

    map_threads(upload, sealed, N_UPLOADS)
    damage = compare_sizes(out, sealed)
    if damage:
        raise FileError(
            f"{printable(out)}: {printable(damage.name)} {damage.reason} after it was written. "
            "Run the same command again."
        )


def sync_directories(root: pathlib.Path, names: Iterable[str]) -> None:
    """Make the names of files below a directory durable."""
    directories = {root}
    for name in names:
        file = root / name
        directories.update(parent for parent in file.parents if root in parent.parents)
    with explain("written", root):
        for directory in directories:
            files.sync(directory)


# ---- reading what was published


def read_sealed(directory: Path, name: str = MANIFEST) -> dict[str, SealedFile]:
    """Return what a manifest says of its files.

    Raises:
        MissingFileError: there is none.
        UserError: it is not a manifest, or names a file outside its directory.
    """
    text = files.read_text(directory / name)
    try:
        manifest = json.loads(text)
        sizes = manifest["sizes"]
        sealed = {}
        for file, checksum in manifest["outputs"].items():
            sealed[check_name(file)] = SealedFile(int(sizes[file]), str(checksum))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{printable(directory / name)}: not a manifest of a stage. "
            "Move the directory away and run its stage again."
        ) from None
    return sealed


def check_name(name: str) -> str:
    """Return the name of a file below a directory. Raise ValueError if it leads out of it."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts) or "\0" in name:
        raise ValueError(name)
    return name


def find_damage(directory: Path, verify: bool = False) -> Damage | None:
    """Return the first file of a published directory that is not as written; None if all are.

    Args:
        directory: what was published.
        verify: compare checksums too, which reads every byte; sizes take one listing. A store's own
            are compared with what the store says, so not in a copy on a disk.
    """
    sealed = read_sealed(directory)
    damage = compare_sizes(directory, sealed)
    if damage or not verify:
        return damage

    stated = {}
    if isinstance(directory, BucketPath):
        objects = bucket.list_objects(directory)
        stated = {name: found.checksum for name, found in objects.items()}

    def is_whole(name: str) -> bool:
        expected = sealed[name].checksum
        if ":" in expected:
            return stated.get(name, expected) == expected
        return sha256(directory / name) == expected

    for name, whole in zip(sealed, map_threads(is_whole, sealed), strict=True):
        if not whole:
            return Damage(name, "was changed (its checksum differs)")
    return None


def check_published(paths: Iterable[Path]) -> None:
    """Raise FileError if a file has other bytes than the stage that published it wrote.

    The nearest manifest above a file decides. What no manifest names is not checked: raw text, or
    what came from elsewhere.
    """
    known: dict[Path, dict[str, SealedFile]] = {}
    expected: dict[Path, SealedFile] = {}
    for path in paths:
        for depth, directory in enumerate(path.parents[:PUBLISHED_DEPTH], 1):
            if directory not in known:
                known[directory] = read_sealed_if_there(directory)
            name = "/".join(path.parts[-depth:])
            if name in known[directory]:
                expected[path] = known[directory][name]
                break
    map_threads(lambda path: check_bytes(path, expected[path]), expected)


def read_record(path: Path) -> Any:
    """Return the JSON of a small file. Raise FileError if it is none, or was changed since."""
    check_published([path])
    return files.read_json(path)


def read_sealed_if_there(directory: Path) -> dict[str, SealedFile]:
    """Return what the manifest of a directory says of its files; nothing without a readable one."""
    with contextlib.suppress(UserError):
        return read_sealed(directory)
    return {}


def check_bytes(path: Path, expected: SealedFile) -> None:
    """Raise FileError if a file has not the sha256 that is expected of it."""
    is_sha256 = ":" not in expected.checksum  # else it is a store's own
    if is_sha256 and sha256(path) != expected.checksum:
        raise FileError(
            f"{printable(path)}: was changed since it was written (its checksum is not its "
            "manifest's). Get it again from where it came, or run its stage again with --replace; "
            "if the change was meant, remove manifest.json."
        )


def compare_sizes(directory: Path, sealed: dict[str, SealedFile]) -> Damage | None:
    """Return the first file that is missing or has another size."""
    sizes = files.list_files(directory)
    for name, file in sealed.items():
        if name not in sizes:
            return Damage(name, "is missing")
        if sizes[name] != file.n_bytes:
            return Damage(name, f"has {sizes[name]:,} bytes, expected {file.n_bytes:,}")
    return None


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with explain("read", path), files.open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def map_threads(function: Callable[[T], Any], items: Iterable[T], n: int = 0) -> list[Any]:
    """Return the function of each item, in their order. Hashing and waiting free the GIL."""
    with concurrent.futures.ThreadPoolExecutor(n or os.cpu_count()) as pool:
        return list(pool.map(function, items))


# ---- removing what was published


def check_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError if an output is an input of its stage, or holds one."""
    there = resolve(out)
    for path in inputs:
        source = resolve(path)
        if source == there:
            raise UserError(f"{printable(out)}: is read by this command. Give another output.")
        if there in source.parents:
            raise UserError(
                f"{printable(out)}: holds {printable(path)}, which this command reads. "
                "Give another output."
            )


def resolve(path: Path) -> Path:
    """Return a path without symbolic links and ".."."""
    if isinstance(path, BucketPath):
        return path
    with explain("found", path):
        return path.resolve()


def remove_published(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Remove the files that the manifest of `out` names, and the directories that this empties.

    The manifest goes first, so that what is half removed is not taken for whole.

    Raises:
        UserError: no stage published there, or `out` is or holds an input.
    """
    check_output(out, inputs)
    try:
        sealed = read_sealed(out)
    except MissingFileError:
        raise UserError(
            f"{printable(out)}: no stage has published there (no {MANIFEST}), so nothing was "
            "removed. Move it away, or give another path."
        ) from None
    files.remove(out / MANIFEST)
    if not isinstance(out, BucketPath):
        with explain("removed", out):
            files.sync(out)
    remove_files(out, sealed)
    n_bytes = sum(file.n_bytes for file in sealed.values())
    log.debug(f"removed {len(sealed):,} files ({n_bytes / 1e6:,.1f} MB) of {printable(out)}")
    left = files.list_files(out)
    if left:
        log.info(f"{printable(out)}: left {len(left):,} files that its stage did not write")
    elif not isinstance(out, BucketPath):
        with contextlib.suppress(OSError):  # it has empty directories of somebody else's
            out.rmdir()


def remove_unpublished(directory: BucketPath) -> None:
    """Remove all objects below a name at which nothing was published.

    Raises:
        ValueError: there is a manifest: a bug, not a user's mistake.
    """
    names = files.list_files(directory)
    if MANIFEST in names:
        raise ValueError(f"{directory}: was published")
    remove_files(directory, names)


def remove_files(out: Path, names: Iterable[str]) -> None:
    """Remove files below a directory, and the directories that are empty then."""
    if isinstance(out, BucketPath):
        map_threads(lambda name: bucket.remove(out / name), names, N_UPLOADS)
        return
    root = resolve(out)
    for name in names:
        file = out / name
        # a link in the way may lead anywhere
        if root in (file.parent.resolve() / file.name).parents:
            files.remove(file)
            remove_empty(file.parent, out)


def remove_empty(directory: pathlib.Path, root: pathlib.Path) -> None:
    """Remove a directory below a root and those above it, as far as they are empty."""
    with contextlib.suppress(OSError):
        while directory != root:
            directory.rmdir()
            directory = directory.parent
