"""A source of documents, and what a kind of source is: one file of this package each."""

from __future__ import annotations

import dataclasses
import functools
import glob
import importlib
import pathlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jaxpt import io
from jaxpt.data import sources
from jaxpt.data.sources.files import (
    escape_name,
    get_file_size,
    get_version,
    is_remote,
    make_path,
    map_in_threads,
)
from jaxpt.spec import Record, UserError

READ_ERRORS = "cannot be read"
# Bytes of a document, or of the record that holds it. What is larger is many documents in one, and
# would fill the memory of a process.
MAX_DOCUMENT_BYTES = 2**25


class Document(NamedTuple):
    """A text and what its source says about it.

    Attributes:
        id: unique in its source.
        text: prompt and completion, or all that is trained on.
        prompt_chars: characters at the beginning of the text that are a prompt.
        meta: a JSON object, such as url and date.
    """

    id: str
    text: str
    prompt_chars: int = 0
    meta: str = "{}"


class Skipped(NamedTuple):
    """A record that is neither a document nor an error, such as a picture among web pages.

    Attributes:
        reason: one of a few, so that they can be counted.
        where: file and record.
    """

    reason: str
    where: str


Reading = Iterator[Document | Skipped | UserError]


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """A kind of source, KIND of [NAME=]KIND:WHERE.

    Attributes:
        name: KIND.
        read: source and file -> the documents of the file, the records that are none, and the
            errors that are confined to a record; an error that it raises ends the file. A kind
            without files is called once.
        has_files: WHERE is a glob.
        has_field: WHERE may end in #field, or #prompt+completion.
        is_streamed: it may have no end, so prepare.max_mb takes the first documents.
        check_where: takes the source string and WHERE. Raises UserError for a wrong WHERE.
        default_name: WHERE -> NAME, where none is given; by default from the glob.
        find_inputs: source -> what a manifest fingerprints besides the files.
        describe_versions: source -> versions of what makes its documents.
        pin: WHERE -> the same, with what it is now in place of what may change.
    """

    name: str
    read: Callable[[TextSource, str], Reading]
    has_files: bool = True
    has_field: bool = False
    is_streamed: bool = False
    check_where: Callable[[str, str], None] = lambda text, where: None
    default_name: Callable[[str], str] | None = None
    find_inputs: Callable[[TextSource], dict[str, pathlib.Path]] = lambda source: {}
    describe_versions: Callable[[TextSource], dict[str, str]] = lambda source: {}
    pin: Callable[[str], str] = lambda where: where


@functools.cache
def list_kinds() -> dict[str, SourceKind]:
    """Return every kind of source by name: the KIND of each file of this package that has one."""
    found = {}
    for module in pkgutil.iter_modules(sources.__path__):
        kind = getattr(importlib.import_module(f"{sources.__name__}.{module.name}"), "KIND", None)
        if kind:
            found[kind.name] = kind
    return found


def find_kind(name: str) -> SourceKind:
    """Return the kind of a parsed source."""
    return list_kinds()[name]


def ignore_skipped(reason: str, message: str) -> None:
    """Do nothing about a skipped record."""


@dataclasses.dataclass(frozen=True)
class TextSource(Record):
    """A parsed source string and the files found for it, of which nothing is read yet."""

    name: str  # of its shards, and the `source` column
    kind: str
    pattern: str  # its WHERE, such as a glob
    field: str  # the field or column that holds the text, or two: prompt+completion
    # paths on a disk or in a bucket, in canonical order; empty for a kind without files
    files: tuple[str, ...]

    def iterate_documents(
        self, passed: Callable[[str, str], None] = ignore_skipped, on_error: str = "stop"
    ) -> Iterator[Document]:
        """Yield the documents in canonical order.

        Args:
            passed: called with (reason, message) of each record that is skipped.
            on_error: "stop" raises the error of what cannot be read. "skip" calls
                passed(READ_ERRORS, message) and continues, after the record where that is at
                fault, else with the next file.

        Raises:
            UserError: something cannot be read; it names file and record.
        """
        for file in self.files or ("",):
            for found in self.read_file(file):
                if isinstance(found, Document):
                    yield found
                elif isinstance(found, Skipped):
                    passed(found.reason, escape_name(f"{found.where}: {found.reason}"))
                elif on_error == "skip":
                    passed(READ_ERRORS, escape_name(str(found)))
                else:
                    raise UserError(escape_name(str(found)))

    def read_file(self, file: str) -> Reading:
        """Yield what the kind's reader yields, and an error that ends it as the last.

        A document has its source in its id, one kind of line end, and MAX_DOCUMENT_BYTES at most.
        """
        try:
            for found in find_kind(self.kind).read(self, file):
                if not isinstance(found, Document):
                    yield found
                elif is_too_large(found.text):
                    yield too_large_error(f"{self.name}/{found.id}")
                else:
                    yield normalize_line_ends(found._replace(id=f"{self.name}/{found.id}"))
        except UserError as error:
            yield error

    def pin(self) -> TextSource:
        """Return the source at the version that it has now, for every process that reads it."""
        return dataclasses.replace(self, pattern=find_kind(self.kind).pin(self.pattern))

    def fingerprint_inputs(self) -> dict[str, pathlib.Path]:
        """Return what a manifest fingerprints, by name."""
        inputs = {}
        for file in self.files:
            if not is_remote(file) and not io.is_dangling(file):
                inputs[f"{self.name}/{self.relative_name(file)}"] = pathlib.Path(file)
        return inputs | find_kind(self.kind).find_inputs(self)

    def check_published(self) -> None:
        """Raise UserError for a file, such as a corpus's shard, that its stage wrote otherwise."""
        io.check_published(map(make_path, self.files))

    def describe_installation(self) -> dict[str, str]:
        """Return what identifies content that is not fingerprinted.

        These are the versions of an installation, and the size and version of a bucket's objects.
        """
        return find_kind(self.kind).describe_versions(self) | self.list_object_tags()

    def relative_name(self, file: str) -> str:
        """Return a file's name in ids.

        It is relative to the part of the glob that is no pattern, so that moving the data changes
        no id.
        """
        parts = pathlib.PurePath(self.pattern).parts
        n_plain = len(parts) - 1
        for i, part in enumerate(parts):
            if glob.has_magic(part):
                n_plain = i
                break
        root = pathlib.PurePath(*parts[:n_plain])
        return escape_name(pathlib.PurePath(file).relative_to(root).as_posix())

    def list_object_tags(self) -> dict[str, str]:
        """Return the versions of a bucket's objects, by name."""
        files = [file for file in self.files if is_remote(file)]
        tags = map_in_threads(get_version, files)
        return {self.relative_name(file): tag for file, tag in zip(files, tags, strict=True)}

    def list_versions(self) -> dict[str, str]:
        """Return file -> a text that changes with its content."""
        return dict(zip(self.files, map_in_threads(get_version, self.files), strict=True))

    def list_file_sizes(self) -> list[int]:
        """Return the bytes of each file as stored."""
        return map_in_threads(get_file_size, self.files)


def normalize_line_ends(document: Document) -> Document:
    r"""Return the document with "\n" in place of "\r\n" and "\r", as Python and editors show it."""
    text = document.text
    if "\r" not in text:
        return document
    n = document.prompt_chars
    prompt, completion = (
        part.replace("\r\n", "\n").replace("\r", "\n") for part in (text[:n], text[n:])
    )
    return document._replace(text=prompt + completion, prompt_chars=len(prompt))


def is_too_large(text: str) -> bool:
    """Return whether a text has more than MAX_DOCUMENT_BYTES."""
    if 4 * len(text) <= MAX_DOCUMENT_BYTES:  # quick: a character has four bytes at most
        return False
    return len(text.encode()) > MAX_DOCUMENT_BYTES


def too_large_error(place: str) -> UserError:
    """Return the error for a document that is too large."""
    return UserError(
        f"{place}: one document of more than {MAX_DOCUMENT_BYTES >> 20} MB. Split it into "
        "documents, such as lines of a .jsonl file, or leave it out."
    )
