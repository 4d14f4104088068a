"""Name files on disks and in buckets: `path` reads a name once, where it enters.

A name on a disk is a pathlib.Path. A name in a bucket is a BucketPath, which no library takes for a
file name: etils.epath's own class becomes the folder /gs/BUCKET when it is given to pathlib, and
universal_pathlib raises its own errors for gs:/BUCKET and unknown schemes.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import TypeAlias

from jaxpt.io.errors import printable
from jaxpt.spec import UserError

SCHEMES = ("gs", "s3")
OTHER_NAMES = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}  # what other programs call them


@dataclasses.dataclass(frozen=True, order=True)
class BucketPath:
    """The name of an object, or of all objects below a prefix.

    It has pathlib's names for what a path says of itself. It is no os.PathLike, so that giving it
    to `open` or pathlib.Path is a TypeError and never a local folder "gs:".

    Attributes:
        scheme: gs or s3.
        bucket: its name.
        key: names joined by "/"; empty for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"

    def __truediv__(self, name: str) -> BucketPath:
        parts = [*self.parts, *clean_parts(f"{self}/{name}", name)]
        return dataclasses.replace(self, key="/".join(parts))

    @property
    def address(self) -> str:
        """The bucket and key, as fsspec names them."""
        return "/".join([self.bucket, *self.parts])

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the key."""
        return tuple(self.key.split("/")) if self.key else ()

    @property
    def name(self) -> str:
        """The last name; empty for a bucket."""
        return self.parts[-1] if self.key else ""

    @property
    def suffix(self) -> str:
        """The last name's suffix, with its dot."""
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The last name without its suffix."""
        return pathlib.PurePosixPath(self.name).stem

    @property
    def parent(self) -> BucketPath:
        """The path without its last name; a bucket is its own parent."""
        return dataclasses.replace(self, key="/".join(self.parts[:-1]))

    @property
    def parents(self) -> tuple[BucketPath, ...]:
        """All paths above, the nearest first."""
        above = [self.parts[:n] for n in reversed(range(len(self.parts)))]
        return tuple(dataclasses.replace(self, key="/".join(parts)) for parts in above)

    def with_name(self, name: str) -> BucketPath:
        """Return the neighbor of this name."""
        return self.parent / name

    def relative_to(self, other: BucketPath) -> pathlib.PurePosixPath:
        """Return the names below another path. Raise ValueError if this is not below it."""
        return pathlib.PurePosixPath(self.address).relative_to(other.address)


Path: TypeAlias = pathlib.Path | BucketPath


def path(text: str | Path) -> Path:
    """Return the path of a name as a user gives it.

    Args:
        text: a name on a disk or mount, gs://BUCKET/NAME or s3://BUCKET/NAME.

    Raises:
        UserError: the name is of neither kind, or cannot be a name.
    """
    if isinstance(text, BucketPath):
        return text
    text = str(text)
    if not text or "\0" in text:
        raise UserError(f"{printable(text)!r}: expected the name of a file or directory.")
    scheme, has_scheme, rest = text.partition("://")
    if has_scheme:
        return parse_bucket_path(text, scheme, rest)
    if re.match(r"(gs|s3):", text):  # such as what pathlib makes of gs://
        raise UserError(
            f"{printable(text)}: expected gs://BUCKET/NAME or s3://BUCKET/NAME, with two slashes."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0]
        raise UserError(
            f"{printable(text)}: {printable(user)} has no home directory here. Write the path out."
        ) from None


def parse_bucket_path(text: str, scheme: str, rest: str) -> BucketPath:
    """Return the path of gs://BUCKET/NAME or s3://BUCKET/NAME. Raise UserError for another."""
    shown = printable(text)
    if scheme not in SCHEMES:
        known = OTHER_NAMES.get(scheme.lower(), scheme.lower())
        hint = "a path without scheme"
        if known in SCHEMES:
            hint = f"{known}://{printable(rest)}"
        raise UserError(
            f"{shown}: expected a path, gs://BUCKET/NAME or s3://BUCKET/NAME, got "
            f"{printable(scheme)}://. Write {hint}."
        )
    bucket, _, key = rest.partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", bucket):
        raise UserError(f"{shown}: expected a bucket's name after {scheme}://, got {bucket!r}.")
    return BucketPath(scheme, bucket, "/".join(clean_parts(text, key)))


def clean_parts(text: str, key: str) -> list[str]:
    """Return the names of a key. Raise UserError for "..", which is no parent in a bucket."""
    parts = [part for part in key.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f'{printable(text)}: ".." has no meaning in a bucket. Write the path out.')
    return parts
