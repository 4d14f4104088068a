"""Find files by a pattern, such as raw/*/[a-m]*.jsonl, on disks and in buckets."""

from __future__ import annotations

import collections
import concurrent.futures
import fnmatch
import glob
import os
import pathlib
import re
from collections.abc import Iterator

from jaxpt.io import files
from jaxpt.io.errors import explain
from jaxpt.io.paths import path

N_REQUESTS = 16  # at a time: a bucket takes long to answer


def match_files(pattern: str) -> list[str]:
    """Return the files that match, sorted, and links to nothing.

    Raises:
        FileError: a directory cannot be listed, or a bucket does not answer.
    """
    if "://" in pattern:
        return sorted(match_in_bucket(pattern))
    with explain("listed", pattern):
        return sorted(match_on_disk(pattern))


def match_on_disk(pattern: str) -> set[str]:
    """Return the files and links to nothing that match."""
    *directories, name = pattern.split("/")
    if name == "**":
        directories, name = [*directories, name], "*"
    places = [""]
    for part in directories:
        places = [found for place in places for found in match_directories(place, part)]
    matched = set()
    for place in places:
        candidates = [place + found for found in match_names(place, name)]
        matched.update(file for file in candidates if os.path.isfile(file) or is_dangling(file))
    return matched


def match_directories(place: str, part: str) -> Iterator[str]:
    """Yield the directories in a place that match a part of a glob; each ends in "/"."""
    if part == "**":
        yield from walk_directories(place)
    elif part in ("", ".", ".."):
        yield f"{place}{part}/"
    else:
        for name in match_names(place, part):
            if os.path.isdir(place + name):
                yield f"{place}{name}/"


def match_names(place: str, part: str) -> list[str]:
    """Return the names in a place that match; brackets are letters where a name has them so."""
    if not glob.has_magic(part):
        return [part] if os.path.lexists(place + part) else []
    names = files.list_names(pathlib.Path(place))
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    literal = part.replace("[", "[[]")
    return fnmatch.filter(names, literal) or fnmatch.filter(names, part)


def walk_directories(place: str) -> Iterator[str]:
    """Yield a directory and those below it, once each though links lead to them again."""
    seen = set()
    todo = collections.deque([place])
    links = collections.deque()  # after all else, so that a file has its own name if there is one
    while todo or links:
        directory = (todo or links).popleft()
        real = os.path.realpath(directory)
        if real in seen:
            continue
        seen.add(real)
        yield directory
        for name in match_names(directory, "*"):
            below = directory + name
            if os.path.isdir(below):
                (links if os.path.islink(below) else todo).append(f"{below}/")


def is_dangling(file: str) -> bool:
    """Return whether a name is a link to nothing."""
    return os.path.islink(file) and not os.path.exists(file)


def match_in_bucket(pattern: str) -> set[str]:
    """Return the objects that match."""
    plain, below = split_pattern(pattern)
    literal = below.replace("[", "[[]")  # brackets are letters where a name has them so
    return match_objects(plain, literal) or match_objects(plain, below)


def match_objects(plain: str, below: str) -> set[str]:
    """Return the objects that match below a directory, of one alone by a listing of it alone."""
    from fsspec.utils import glob_translate

    directory = path(plain)
    matches = re.compile(glob_translate(below)).fullmatch
    if "/" in below or "**" in below:
        names = filter(matches, files.list_files(directory))
        return {str(directory / name) for name in names}
    found = [directory / name for name in files.list_names(directory) if matches(name)]
    with concurrent.futures.ThreadPoolExecutor(N_REQUESTS) as pool:
        sizes = list(pool.map(files.size, found))
    return {str(file) for file, size in zip(found, sizes, strict=True) if size is not None}


def split_pattern(pattern: str) -> tuple[str, str]:
    """Return the directory in front of a glob's first pattern, and the rest: a name at least."""
    parts = pattern.split("/")
    n_plain = len(parts) - 1
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            n_plain = i
            break
    return "/".join(parts[:n_plain]), "/".join(parts[n_plain:])
