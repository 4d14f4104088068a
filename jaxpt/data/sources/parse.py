"""Parse source strings, [NAME=]KIND:WHERE, and find their files."""

from __future__ import annotations

import difflib
import glob
import pathlib
import re
from collections.abc import Iterable

from jaxpt import io
from jaxpt.data.sources.files import is_remote
from jaxpt.data.sources.source import TextSource, list_kinds
from jaxpt.spec import UserError


def parse_sources(texts: Iterable[str]) -> list[TextSource]:
    """Parse the sources of a config, in its order.

    Raises:
        UserError: there are none, or two of one name.
    """
    sources = [parse_source(text) for text in texts]
    if not sources:
        raise UserError(
            "prepare.sources: empty, so there is nothing to read. Name at least one, such as "
            "('python:prose',)."
        )
    names = set()
    for source in sources:
        if source.name in names:
            raise UserError(
                f"prepare.sources: two sources are named {source.name!r}. "
                f"Give one another name: NAME={source.kind}:{source.pattern}."
            )
        names.add(source.name)
    return sources


def parse_source(text: str) -> TextSource:
    """Parse one source string and find its files.

    Raises:
        UserError: the string is malformed, its kind unknown, or no file matches.
    """
    match = re.fullmatch(r"(?:([^=:#/]*)=)?(\w+):(.+)", text, re.DOTALL)
    if not match:
        raise UserError(
            f"prepare.sources: {text!r} is not a source. Write [NAME=]KIND:WHERE, such as "
            "web=jsonl:crawl/*.jsonl#text."
        )
    name, kind, where = match.groups()
    kinds = list_kinds()
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, 1)
        hint = f"did you mean {near[0]}:?" if near else f"there are: {', '.join(kinds)}."
        raise UserError(f"prepare.sources: {text!r}: there is no kind {kind!r}; {hint}")
    field = ""
    if kinds[kind].has_field:
        where, _, field = where.partition("#") if "#" in where else (where, "", "text")
        if field.count("+") > 2 or not all(field.split("+")):
            raise UserError(
                f"prepare.sources: {text!r}: {field!r} is neither a field nor two, "
                "prompt+completion, nor three, prompt+chosen+rejected. Write "
                f"{kind}:GLOB#prompt+completion."
            )
    files: tuple[str, ...] = ()
    if kinds[kind].has_files:
        where = str(io.path(where))
        files = find_source_files(text, kind, where)
    kinds[kind].check_where(text, where)
    if name is None:
        make_name = kinds[kind].default_name or name_after_files
        name = make_name(where)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"prepare.sources: {text!r}: a source cannot be named {name!r}. "
            f"Use letters, digits, '_', '-' and '.': NAME={kind}:..."
        )
    return TextSource(name, kind, where, field, files)


def find_source_files(text: str, kind: str, where: str) -> tuple[str, ...]:
    """Return the files that a glob matches, sorted. Raise UserError if there is none."""
    files = tuple(io.match_files(where))
    if files:
        return files
    if pathlib.Path(where).is_dir():
        raise UserError(
            f"prepare.sources: {text!r}: {where} is a directory. "
            f"Name its files, such as {kind}:{where.rstrip('/')}/*."
        )
    if is_remote(where):
        hint = "the address and the credentials"
    else:
        hint = f"the path; a relative one starts from {pathlib.Path.cwd()}"
    raise UserError(f"prepare.sources: {text!r}: no file matches {where}. Check {hint}.")


def name_after_files(where: str) -> str:
    """Return the name of a source of files that was given none.

    books/*.txt -> books; crawl/part.jsonl.gz -> part
    """
    parts = pathlib.PurePath(where).parts
    plain = [part for part in parts if not glob.has_magic(part) and part != "/"]
    word = plain[-1] if plain else "files"
    if not glob.has_magic(where):
        word = word.split(".")[0]
    return clean_name(word)


def clean_name(word: str) -> str:
    """Return the word without what a name cannot hold."""
    return re.sub(r"[^\w.-]+", "_", word).strip("._-")
