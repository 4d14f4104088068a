"""Turn what a disk or a bucket refuses into one sentence: what, where, why, what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from jaxpt.spec import UserError
from jaxpt.text import printable

AGAIN = "Run the same command again; what was finished before is whole."
ADVICE = {
    errno.ENOENT: "Check the path, or run the stage that writes it.",
    errno.EACCES: "Change its permissions, or give a directory of yours.",
    errno.EPERM: "Change its permissions, or give a directory of yours.",
    errno.EROFS: "Mount its disk for writing, or give a directory on another one.",
    errno.ENOSPC: "The disk is full: make room. " + AGAIN,
    errno.EDQUOT: "The quota is used up: make room. " + AGAIN,
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f). " + AGAIN,
    errno.EIO: "The disk fails: see dmesg, and copy what is needed to another one.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n). " + AGAIN,
    errno.ENFILE: "The machine has too many open files: end other programs. " + AGAIN,
    errno.ENOMEM: "Free some memory. " + AGAIN,
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ESTALE: "The network disk was mounted anew, or the file replaced there. " + AGAIN,
    errno.ENOTDIR: "A file stands where a directory is expected: move it, or give another path.",
    errno.EEXIST: "A file stands where a directory is expected: move it, or give another path.",
    errno.EISDIR: "A directory stands where a file is expected: give the file.",
    errno.ELOOP: "Its symbolic links form a circle: mend them.",
}
IN_BUCKET = "Check the path, the bucket's name, the credentials, the endpoint and the network."


class FileError(UserError):
    """A file could not be read or written.

    Attributes:
        errno: the system's number; None where a bucket has none.
    """

    def __init__(self, message: str, number: int | None = None):
        """Keep the number beside the sentence."""
        super().__init__(message)
        self.errno = number


class MissingFileError(FileError):
    """A file is not there."""


@contextlib.contextmanager
def explain(action: str, where: object) -> Iterator[None]:
    """Raise FileError, a sentence, for what the system or a bucket refuses.

    Args:
        action: what could not be done: "read", "written", "listed".
        where: the path.
    """
    try:
        yield
    except (OSError, *bucket_errors()) as error:
        raise file_error(error, action, where) from None


def file_error(error: Exception, action: str, where: object) -> FileError:
    """Return the sentence of an error."""
    number = find_number(error)
    is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
    if number:
        reason = os.strerror(number)
    else:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[0][:300]
    advice = ADVICE.get(number or 0, AGAIN)
    if "://" in str(where):
        advice = IN_BUCKET
    kind = MissingFileError if is_missing else FileError
    sentence = f"{printable(where)}: could not be {action} ({printable(reason)}). {advice}"
    return kind(sentence, number)


def find_number(error: Exception) -> int | None:
    """Return the system's number of an error; of a library's own words, where they hold its."""
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    number = getattr(error, "errno", None) or 0
    if number > 0:  # what cannot be resolved has a number below 0, of another list
        return number
    for known in ADVICE:
        if os.strerror(known) in str(error):
            return known
    return None


def bucket_errors() -> tuple[type[Exception], ...]:
    """Return what the buckets' libraries raise that is no OSError, of those that are loaded."""
    found = []
    for module, name in (
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
