"""Find files by a pattern, such as raw/*/[a-m]*.jsonl, on disks and in buckets."""

from __future__ import annotations

import concurrent.futures
import glob
import pathlib
import re

from jaxpt.io import files
from jaxpt.io.errors import explain
from jaxpt.io.paths import path

N_REQUESTS = 16  # at a time: a bucket takes long to answer


def match_files(pattern: str) -> list[str]:
    """Return the files that match, sorted. Raise FileError if a bucket does not answer."""
    if "://" in pattern:
        return sorted(match_objects(pattern))
    with explain("listed", pattern):
        found = [pathlib.Path(name) for name in glob.glob(pattern, recursive=True)]
        return sorted({file.as_posix() for file in found if file.is_file()})


def match_objects(pattern: str) -> list[str]:
    """Return the objects that match, of one directory by a listing of it alone."""
    from fsspec.utils import glob_translate

    plain, pattern_below = split_pattern(pattern)
    directory = path(plain)
    matches = re.compile(glob_translate(pattern_below)).fullmatch
    if "/" in pattern_below or "**" in pattern_below:
        names = filter(matches, files.list_files(directory))
        return [str(directory / name) for name in names]
    found = [directory / name for name in files.list_names(directory) if matches(name)]
    with concurrent.futures.ThreadPoolExecutor(N_REQUESTS) as pool:
        sizes = list(pool.map(files.size, found))
    return [str(file) for file, size in zip(found, sizes, strict=True) if size is not None]


def split_pattern(pattern: str) -> tuple[str, str]:
    """Return the directory in front of the first wildcard, and the rest: a name at least."""
    parts = pattern.split("/")
    n_plain = len(parts) - 1
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            n_plain = i
            break
    return "/".join(parts[:n_plain]), "/".join(parts[n_plain:])
