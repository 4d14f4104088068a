"""Read, write and list the objects of a bucket, through gcsfs and s3fs.

Credentials, region and endpoint are the libraries' own: GOOGLE_APPLICATION_CREDENTIALS,
STORAGE_EMULATOR_HOST, AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL. Both libraries repeat a
request that the store answers by 429 or 5xx. An object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pathlib
import time
from typing import Any, NamedTuple

from jaxpt.io.errors import MissingFileError, explain
from jaxpt.io.paths import BucketPath
from jaxpt.spec import UserError

CREATE_ATTEMPTS = 3  # of a request that is refused though nothing is there
CREATE_PAUSE = 0.05  # seconds
PACKAGES = {"gs": ("gcsfs", "requirements-gcs.txt"), "s3": ("s3fs", "requirements-s3.txt")}


class StoredObject(NamedTuple):
    """What a listing says of an object."""

    size: int  # bytes
    version: str  # the generation (gs) or ETag (s3): another one for other bytes
    md5: str | None  # of its bytes in base64, where the store states it
    checksum: str  # the store's own: "crc32c:..." (gs) or "etag:..." (s3)


def open_bucket(path: BucketPath) -> Any:
    """Return fsspec's file system of a bucket. Raise UserError if its package is missing.

    fsspec itself keeps one of each kind per process, also after a fork.
    """
    import_package(path.scheme)
    import fsspec

    return fsspec.filesystem(path.scheme)


@functools.cache
def import_package(scheme: str) -> None:
    """Import the package of a scheme."""
    package, requirements = PACKAGES[scheme]
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        # otherwise gcsfs waits a minute for the emulator to say by gRPC what kind a bucket is,
        # and looks for credentials before each request
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        os.environ.setdefault("FSSPEC_GS_TOKEN", "anon")
    try:
        importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"{scheme}://: the package {package} is not installed. pip install -r {requirements}"
        ) from None
    from fsspec.config import conf

    # no listing is remembered, also by Orbax's own file system: others write there too
    conf.setdefault(scheme, {})["use_listings_cache"] = False
    # it logs a traceback for every error that it raises
    logging.getLogger(package).setLevel(logging.CRITICAL)


def read(path: BucketPath, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the bytes of an object, or a range of them."""
    with explain("read", path):
        return open_bucket(path).cat_file(path.address, start=start, end=stop)


def write(path: BucketPath, data: bytes) -> None:
    """Write an object by one request."""
    with explain("written", path):
        open_bucket(path).pipe_file(path.address, data)


def create(path: BucketPath, data: bytes) -> bool:
    """Write an object unless there is one. Return whether this call wrote it.

    It asks the store by a precondition, if-generation-match 0 or if-none-match *, never by looking
    first. A request that is repeated because its answer was lost meets its own object: so the data
    of two callers must differ. A store that refuses where there is nothing, as S3 may (409) while
    another request is under way, is asked again.
    """
    with explain("written", path):
        for _ in range(CREATE_ATTEMPTS):
            try:
                open_bucket(path).pipe_file(path.address, data, mode="create")
                return True
            except OSError as error:
                if not is_refused(error):
                    raise
            with contextlib.suppress(MissingFileError):  # nothing there, or removed since
                return read(path) == data
            time.sleep(CREATE_PAUSE)
    return False


def is_refused(error: OSError) -> bool:
    """Return whether a precondition failed, or lost against another request at the same time.

    s3fs makes a FileExistsError of 412 only where the answer names the condition, as AWS does.
    """
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileExistsError) or status in (409, 412)


def list_objects(path: BucketPath) -> dict[str, StoredObject]:
    """Return name below the path -> what the listing says, for all objects below it."""
    found = {}
    with explain("listed", path):
        listing = open_bucket(path).find(path.address, detail=True)
    for address, info in listing.items():
        name = address.removeprefix(path.address).lstrip("/")
        if name and info["type"] == "file":
            found[name] = stored_object(info)
    return found


def list_names(path: BucketPath) -> list[str]:
    """Return the first names below a path, sorted."""
    with explain("listed", path):
        try:
            listing = open_bucket(path).ls(path.address, detail=False)
        except FileNotFoundError:
            return []
    names = {address.rstrip("/").rpartition("/")[2] for address in listing}
    return sorted(names - {path.name})


def look_up(path: BucketPath) -> StoredObject | None:
    """Return what the store says of one object; None if there is none."""
    with explain("found", path):
        try:
            info = open_bucket(path).info(path.address)
        except FileNotFoundError:
            return None
    return stored_object(info) if info["type"] == "file" else None


def stored_object(info: dict[str, Any]) -> StoredObject:
    """Return what fsspec's record of an object says."""
    etag = info.get("ETag", "").strip('"')
    version = str(info.get("generation", etag))
    checksum = f"etag:{etag}"
    if "crc32c" in info:
        checksum = f"crc32c:{info['crc32c']}"
    return StoredObject(info["size"], version, info.get("md5Hash"), checksum)


def remove(path: BucketPath) -> None:
    """Remove an object, if it is there."""
    with explain("removed", path):
        try:
            open_bucket(path).rm_file(path.address)
        except FileNotFoundError:
            return


def upload(file: pathlib.Path, path: BucketPath) -> None:
    """Write a local file as an object."""
    with explain("written", path):
        open_bucket(path).put_file(str(file), path.address)


def download(path: BucketPath, file: pathlib.Path) -> None:
    """Write an object to a local file."""
    with explain("read", path):
        open_bucket(path).get_file(path.address, str(file))
