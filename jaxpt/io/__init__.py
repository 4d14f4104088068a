"""Files on disks and in buckets: all of jaxpt's reading, writing, publishing, locking, removing.

    path = io.path("gs://bucket/run")      a name: pathlib.Path on a disk, BucketPath in a bucket
    io.read_text, write_text, writing      single files, durable, whole or not at all
    io.seal, publish, find_damage          directories: data first, then the manifest that names it
    io.local_copy                          a local path for libraries that open files themselves
    io.hold                                one process at a time
    io.remove_published                    only what a manifest of ours names

Every function raises UserError, one sentence, for whatever the system refuses.
"""

from jaxpt.io.cache import local_copy
from jaxpt.io.errors import FileError, MissingFileError, bucket_errors, explain, printable
from jaxpt.io.files import (
    LineLog,
    append_line,
    cache_directory,
    check_writable,
    copy_file,
    create,
    exists,
    find,
    list_files,
    list_names,
    make_directory,
    map_file,
    open_read,
    open_write,
    read_bytes,
    read_json,
    read_lines,
    read_range,
    read_text,
    read_text_if_there,
    remove,
    remove_working,
    size,
    version,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from jaxpt.io.lock import Lock, hold, take
from jaxpt.io.paths import BucketPath, Path, path
from jaxpt.io.published import (
    Damage,
    SealedFile,
    check_output,
    check_published,
    find_damage,
    finish_publishing,
    publish,
    read_sealed,
    remove_published,
    resolve,
    seal,
    sha256,
    working_directory,
)

__all__ = [
    "BucketPath",
    "Damage",
    "FileError",
    "LineLog",
    "Lock",
    "MissingFileError",
    "Path",
    "SealedFile",
    "append_line",
    "bucket_errors",
    "cache_directory",
    "check_output",
    "check_published",
    "copy_file",
    "create",
    "exists",
    "explain",
    "file_error",
    "find",
    "find_damage",
    "finish_publishing",
    "hold",
    "list_files",
    "list_names",
    "local_copy",
    "make_directory",
    "map_file",
    "open_read",
    "open_write",
    "path",
    "printable",
    "publish",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_range",
    "read_sealed",
    "read_text",
    "read_text_if_there",
    "remove",
    "remove_published",
    "remove_working",
    "resolve",
    "seal",
    "sha256",
    "size",
    "take",
    "version",
    "working_directory",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]
