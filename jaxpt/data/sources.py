"""Where text comes from.

One short string names a source, `[NAME=]KIND:WHERE`, and every source yields Documents.

    text:GLOB              a file is a document                       text:books/*.txt
    jsonl:GLOB#field       a line is a document, text in `field`
    web=jsonl:crawl/*.jsonl.zst#content
    parquet:GLOB#column    a row is a document, text in `column`      parquet:shards/*.parquet#text
    warc:GLOB              a crawled web page is a document: its main text, url and date in `meta`
    warc:crawl/*.warc.gz
    hf:NAME[/CONFIG]:SPLIT#field   Hugging Face data set, streamed
    hf:HuggingFaceFW/fineweb/sample-10BT:train#text
    python:prose           documentation that this Python installation carries, in English
    python:code            the standard library's source files
    python:tasks           a prompt and its completion: what a function of the standard library says
    that it does, and the function

Two fields joined by "+", as in jsonl:tasks.jsonl#question+answer, make a document of a prompt and
its completion: one text, whose prompt
is read but not trained on. A GLOB may be on a disk or in an object store: s3://BUCKET/PATH,
gs://BUCKET/PATH.

Order is canonical: sources as listed, then file names, then record numbers; "first" means first in
this order
everywhere. Ids are NAME/file, or NAME/file:record with records counted from 1, and files relative
to the glob.

What cannot be read stops the reading with one sentence that names file and record, or is counted
and passed over: see Source.documents.
"""

from __future__ import annotations

import ast
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import importlib.metadata
import io
import json
import logging
import pathlib
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from jaxpt import stage
from jaxpt.spec import Record, UserError


class Document(NamedTuple):
    """A text, the first prompt_chars characters of which are a prompt, and what its source says
    about it: a JSON object, such as url and date.
    """

    id: str
    text: str
    prompt_chars: int = 0
    meta: str = "{}"


class Skipped(NamedTuple):
    """A record that is no document and no mistake either, such as a picture among web pages."""

    reason: str  # one of a few, so that they can be counted
    where: str


READ_ERRORS = "cannot be read"
# bytes of a document, or of the record that holds it: what is larger is many documents in one, and
# would fill a process's memory
MAX_DOCUMENT_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class TextSource(Record):
    """A source whose string was understood and whose files were found.

    Nothing of them is read yet.
    """

    name: str  # of its shards, and the `source` column
    kind: str
    pattern: str  # glob, data set and split, or "prose" / "code"
    field: str  # the field or column that holds the text, or two: prompt+completion
    files: tuple[
        str, ...
    ]  # paths or addresses in an object store, in canonical order; empty for hf: and python:

    def iterate_documents(
        self,
        passed: Callable[[str, str], None] = lambda why, sentence: None,
        on_error: str = "stop",
    ) -> Iterator[Document]:
        """In canonical order.

        What cannot be read is a UserError naming file and record. on_error="stop" raises it. "skip"
        tells passed(UNREADABLE, sentence)
        and goes on: behind the record where that is at fault, else with the next file. Records that
        are no documents are reported in either case.
        """
        for file in self.files or ("",):
            found = READERS[self.kind](self, file)
            while True:
                try:
                    each = next(found)
                except StopIteration:
                    break
                except UserError as error:  # of the file
                    each = error
                if isinstance(each, Document):
                    yield each._replace(id=f"{self.name}/{each.id}")
                elif isinstance(each, Skipped):
                    passed(each.reason, f"{each.where}: {each.reason}")
                elif on_error == "skip":
                    passed(READ_ERRORS, str(each))
                else:
                    raise each

    def fingerprint_inputs(self) -> dict[str, pathlib.Path]:
        """What a manifest fingerprints, by name."""
        files = {
            f"{self.name}/{relative_name(self, file)}": pathlib.Path(file)
            for file in self.files
            if not is_remote(file)
        }
        if self.kind == "hf" and (directory := pathlib.Path(parse_hf_source(self)[0])).is_dir():
            files[self.name] = directory
        return files

    def describe_installation(self) -> dict[str, str]:
        """What stands for a content that is not fingerprinted.

        Versions of an installation, size and tag of the objects of a store.
        """
        if self.kind == "warc":
            return {
                "trafilatura": importlib.metadata.version("trafilatura")
            } | self.list_object_tags()
        if self.kind != "python":
            return self.list_object_tags()
        versions = {"python": sys.version.split()[0]}
        if self.pattern == "prose":
            versions["packages"] = stage.fingerprint(
                sorted(
                    (name, metadata["Version"])
                    for name, metadata in get_installed_packages().items()
                )
            )
        return versions

    def list_object_tags(self) -> dict[str, str]:
        """Return the version tags of objects in a store."""
        files = [file for file in self.files if is_remote(file)]
        return {
            relative_name(self, file): tag
            for file, tag in zip(files, map_in_threads(get_object_tag, files), strict=True)
        }

    def list_file_sizes(self) -> list[int]:
        """Bytes of each file as it lies there."""
        return map_in_threads(get_file_size, self.files)


def parse_sources(texts: Iterable[str]) -> list[TextSource]:
    """The sources of a config, in its order.

    Raises UserError when there are none, or two of one name.
    """
    sources = [parse_source(text) for text in texts]
    if not sources:
        raise UserError(
            "prepare.sources: empty, so there is nothing to read. Name at "
            "least one, such as ('python:prose',)."
        )
    for i, source in enumerate(sources):
        if source.name in [other.name for other in sources[:i]]:
            raise UserError(
                f"prepare.sources: two sources are named {source.name!r}. "
                f"Give one another name: NAME={source.kind}:{source.pattern}."
            )
    return sources


def parse_source(text: str) -> TextSource:
    """Understand one source string and find its files.

    Raises UserError for an unknown kind or an empty glob.
    """
    match = re.fullmatch(r"(?:([^=:#/]*)=)?(\w+):(.+)", text, re.DOTALL)
    if not match:
        raise UserError(
            f"prepare.sources: {text!r} is not a source. Write "
            "[NAME=]KIND:WHERE, such as web=jsonl:crawl/*.jsonl#text."
        )
    name, kind, where = match.groups()
    if kind not in READERS:
        near = difflib.get_close_matches(kind, READERS, 1)
        hint = f"did you mean {near[0]}:?" if near else f"there are: {', '.join(READERS)}."
        raise UserError(f"prepare.sources: {text!r}: there is no kind {kind!r}; {hint}")
    field = ""
    if kind in ("jsonl", "parquet", "hf"):
        where, _, field = where.partition("#") if "#" in where else (where, "", "text")
        if field.count("+") > 1 or not all(field.split("+")):
            raise UserError(
                f"prepare.sources: {text!r}: {field!r} is neither a field nor "
                f"two, prompt+completion. Write {kind}:GLOB#prompt+completion."
            )
    files: tuple[str, ...] = ()
    if kind in ("text", "jsonl", "parquet", "warc"):
        where = where if is_remote(where) else str(stage.local_path(where))
        files = tuple(sorted(glob_files(where)))
        if not files:
            if pathlib.Path(where).is_dir():
                raise UserError(
                    f"prepare.sources: {text!r}: {where} is a directory. Name "
                    f"its files, such as {kind}:{where.rstrip('/')}/*."
                )
            hint = (
                "the address and the credentials"
                if is_remote(where)
                else f"the path; a relative one starts from {pathlib.Path.cwd()}"
            )
            raise UserError(f"prepare.sources: {text!r}: no file matches {where}. Check {hint}.")
    elif kind == "python" and where not in PYTHON_READERS:
        raise UserError(
            f"prepare.sources: {text!r}: expected python:prose, python:code or python:tasks."
        )
    elif kind == "hf" and ":" not in where:
        raise UserError(
            f"prepare.sources: {text!r}: the split is missing. Write "
            f"hf:NAME[/CONFIG]:SPLIT#field, such as hf:{where}:train#text."
        )
    name = default_source_name(kind, where) if name is None else name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"prepare.sources: {text!r}: a source cannot be named {name!r}. "
            f"Use letters, digits, '_', '-' and '.': NAME={kind}:..."
        )
    return TextSource(name, kind, where, field, files)


def default_source_name(kind: str, where: str) -> str:
    """python:prose -> prose.

    Books/*.txt -> books; crawl/part.jsonl.gz -> part; HuggingFaceFW/fineweb/sample-10BT:train ->
    fineweb-sample-10BT
    """
    if kind == "python":
        return where
    if kind == "hf":
        name = where.rpartition(":")[0].strip("/")
        word = (
            name.replace("/", "-")
            if name.count("/") == 0
            else name.partition("/")[2].replace("/", "-")
        )
        word = (
            pathlib.PurePath(name).name if pathlib.Path(where.rpartition(":")[0]).is_dir() else word
        )
    else:
        parts = [
            part
            for part in pathlib.PurePath(where).parts
            if not glob.has_magic(part) and part != "/"
        ]
        word = parts[-1] if parts else "files"
        if not glob.has_magic(where):
            word = word.split(".")[0]
    return re.sub(r"[^\w.-]+", "_", word).strip("._-")


def relative_name(source: TextSource, file: str) -> str:
    """A file's name in ids.

    Relative to the part of the glob that is no pattern, so that moving the data changes no id.
    """
    parts = pathlib.PurePath(source.pattern).parts
    n_plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return pathlib.PurePath(file).relative_to(pathlib.PurePath(*parts[:n_plain])).as_posix()


# ---- files, on disks and in object stores


def is_remote(file: str) -> bool:
    """Return whether a file is in an object store."""
    return "://" in file


def glob_files(pattern: str) -> set[str]:
    """The files that match. Raises UserError where an object store does not answer."""
    if not is_remote(pattern):
        return {
            file
            for found in glob.glob(pattern, recursive=True)
            if (path := pathlib.Path(found)).is_file() and (file := path.as_posix())
        }
    from fsspec.implementations.arrow import ArrowFSWrapper

    scheme = pattern.partition("://")[0]
    store, path = open_filesystem(pattern)
    try:
        return {
            f"{scheme}://{name}"
            for name, found in ArrowFSWrapper(store).glob(path, detail=True).items()
            if found["type"] == "file"
        }
    except OSError as error:
        raise explain_unreachable(pattern, error) from None


@functools.cache
def open_filesystem(address: str):
    """(the object store as pyarrow sees it, the path in it).

    Credentials, region and endpoint are the store's own, as in data/storage.py.
    """
    import pyarrow as pa
    import pyarrow.fs

    scheme, _, path = address.partition("://")
    try:
        bucket = f"{scheme}://{path.split('/')[0]}"  # which is an address, as a pattern is not
        # Google's client tries for a quarter of an hour where there is no network or no credentials
        return pyarrow.fs.FileSystem.from_uri(
            bucket + ("?retry_limit_seconds=30" if scheme in ("gs", "gcs") else "")
        )[0], path
    except (OSError, pa.ArrowException) as error:
        raise explain_unreachable(address, error) from None


def explain_unreachable(address: str, error: BaseException) -> UserError:
    """Return the error for a store that cannot be reached."""
    return UserError(
        f"{address}: cannot be reached ({first_error_line(error)}). Check the "
        "address, the credentials and the endpoint."
    )


def map_in_threads(ask: Callable[[str], Any], files: Iterable[str]) -> list[Any]:
    """Ask of each file, 16 at a time: an object store takes a while to answer."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, files))


def get_file_size(file: str) -> int:
    """Return the size of a file in bytes."""
    if not is_remote(file):
        return pathlib.Path(file).stat().st_size
    store, path = open_filesystem(file)
    return store.get_file_info(path).size


def get_object_tag(file: str) -> str:
    """What an object store says that changes with an object's content."""
    store, path = open_filesystem(file)
    try:
        with store.open_input_file(path) as stream:
            headers = {
                key.lower(): value.decode() if isinstance(value, bytes) else value
                for key, value in (stream.metadata() or {}).items()
            }
            return (
                f"{stream.size()} bytes, {headers.get('etag') or store.get_file_info(path).mtime}"
            )
    except OSError as error:
        raise explain_unreachable(file, error) from None


@contextlib.contextmanager
def open_text_file(file: str) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, unpacked where its name ends in .gz or .zst.

    Raises UserError when they cannot be had.
    """
    try:
        with open_raw(file) as found, decompress(file, found) as stream:
            yield stream
    except (
        EOFError,
        zlib.error,
        OSError,
    ) as error:  # gzip says EOFError for a cut file, the others OSError
        raise UserError(
            f"{file}: cannot be read ({first_error_line(error)}). Copy it again or leave it out."
        ) from None


def open_raw(file: str):
    """Open a file's bytes."""
    if not is_remote(file):
        return open(file, "rb")
    store, path = open_filesystem(file)
    return store.open_input_file(path)


def decompress(file: str, found) -> io.BufferedIOBase:
    """Return a stream of decompressed bytes."""
    if file.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(found, "zstd"))
    return (
        gzip.open(found)
        if file.endswith(".gz")
        else io.BufferedReader(found)
        if is_remote(file)
        else found
    )


# ---- the kinds: each gives of one file the documents, the records that are none, and the mistakes
# that end with a record


def read_text(source: TextSource, file: str) -> Iterator[Document]:
    """Yield one document per file."""
    with open_text_file(file) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise too_large_error(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte {error.start} is not UTF-8 ({error.reason}). "
            "Convert the file to UTF-8 or leave it out."
        ) from None
    yield Document(
        relative_name(source, file), text.replace("\r\n", "\n")
    )  # as Python and editors show it; a paragraph ends at "\n\n"


def read_jsonl(source: TextSource, file: str) -> Iterator[Document | UserError]:
    """Yield one document per line."""
    name = relative_name(source, file)
    with open_text_file(file) as stream:
        for n, line in enumerate(iter(lambda: stream.readline(MAX_DOCUMENT_BYTES), b""), 1):
            if not line.strip():
                continue
            try:
                if len(line) == MAX_DOCUMENT_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MAX_DOCUMENT_BYTES)
                    raise too_large_error(f"{file}:{n}")
                yield make_document(
                    f"{name}:{n}",
                    parse_json_line(line, source.field, f"{file}:{n}"),
                    source.field,
                    f"{file}:{n}",
                )
            except UserError as error:
                yield error


def parse_json_line(line: bytes, field: str, place: str) -> dict[str, Any]:
    """Return the JSON object of a line."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} of the line is not UTF-8 "
            f"({error.reason}). Mend or remove the line."
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # besides JSONDecodeError: numbers too long, brackets too deep
        raise UserError(
            f"{place}: not JSON ({first_error_line(error)}). Mend or remove the line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f'{place}: expected an object such as {{"{field}": "..."}}, got '
            f"{type(record).__name__}."
        )
    return record


def read_parquet(source: TextSource, file: str) -> Iterator[Document | UserError]:
    """Yield one document per row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = relative_name(source, file)
    try:
        with open_raw(file) as found, pq.ParquetFile(found) as table:
            names, fields = table.schema_arrow.names, source.field.split("+")
            if missing := [field for field in fields if field not in names]:
                raise UserError(
                    f"{file}: has no column {missing[0]!r}; it has: "
                    f"{', '.join(names)}. Write parquet:GLOB#column."
                )
            n = 0
            for batch in table.iter_batches(1024, columns=fields):
                for record in batch.to_pylist():
                    n += 1
                    try:
                        yield make_document(f"{name}:{n}", record, source.field, f"{file}:{n}")
                    except UserError as error:
                        yield error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({first_error_line(error)}). "
            "Copy it again or leave it out."
        ) from None


def read_warc(source: TextSource, file: str) -> Iterator[Document | Skipped | UserError]:
    """The main text of the HTML pages among the responses, as trafilatura finds it with precision
    before recall, like FineWeb (2406.17557).
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    name, n = relative_name(source, file), 0
    with open_text_file(file) as stream:
        forward = ForwardReader(stream)
        try:
            for n, record in enumerate(ArchiveIterator(forward, parse_http=False), 1):
                place = f"{file}:{n}"
                declared = record.headers.get("Content-Length") or ""
                if not re.fullmatch(r"\d{1,18}", declared, re.ASCII):
                    raise UserError(
                        f"{place}: its header is damaged (Content-Length "
                        f"{declared[:40]!r}). Copy the file again or leave it "
                        "out."
                    )
                n_bytes = int(declared)
                if n_bytes > MAX_DOCUMENT_BYTES:
                    yield too_large_error(place)
                    continue
                record.freeze()
                if forward.error:
                    break
                if (
                    record.content_length != n_bytes
                ):  # of a file cut short the last record looks whole otherwise
                    raise UserError(
                        f"{place}: the record ends after "
                        f"{record.content_length} of {n_bytes} bytes. Copy "
                        "the file again or leave it out."
                    )
                if record.record_type != WarcRecordType.response:
                    continue
                text, why = extract_page_text(record)
                if not text:
                    yield Skipped(why, place)
                    continue
                date = (
                    record.record_date.strftime("%Y-%m-%dT%H:%M:%SZ") if record.record_date else ""
                )
                meta = {"url": record.headers.get("WARC-Target-URI") or "", "date": date}
                yield Document(f"{name}:{n}", text, 0, json.dumps(meta, ensure_ascii=False))
        except OSError as error:
            raise UserError(
                f"{file}:{n + 1}: cannot be read as WARC "
                f"({first_error_line(error)}). Copy the file again or leave "
                "it out."
            ) from None
        if forward.error:
            raise forward.error


class ForwardReader:
    """A stream as fastwarc can take it.

    It asks for the position even where there is none, and an error while it reads would end the
    process.
    """

    def __init__(self, stream: io.BufferedIOBase):
        self.stream, self.n_read, self.error = stream, 0, None

    def read(self, n: int) -> bytes:
        """Read from the stream."""
        try:
            data = self.stream.read1(
                n
            )  # no more than lies ready: an error must not take what was whole before it
        except (EOFError, zlib.error, OSError) as error:
            self.error, data = error, b""
        self.n_read += len(data)
        return data

    def tell(self) -> int:  # the name that fastwarc calls
        """Return the position."""
        return self.n_read


def extract_page_text(record) -> tuple[str, str]:
    """A response's main text, or "" and why there is none."""
    import trafilatura
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it speaks of every odd page
    try:
        record.parse_http(auto_decode="all")
        body = record.reader.read()
    except (OSError, ValueError, zlib.error):
        return "", "its HTTP message cannot be decoded"
    status, kind = (
        record.http_headers and record.http_headers.status_code,
        (record.http_content_type or "").lower(),
    )
    if status != 200:
        return "", f"HTTP status {status}"
    if "html" not in kind:
        return "", f"is {kind or 'of no stated type'}, not HTML"
    if not body.strip():
        return "", "empty body"
    try:
        charset = codecs.lookup(record.http_charset or "").name
    except (
        LookupError
    ):  # none was said, or one that nobody knows: then the page's own word, then its bytes
        charset = detect_encoding(body, from_html_meta=True)
    html = bytes_to_str(body, charset)
    try:
        text = trafilatura.extract(html, include_comments=False, favor_precision=True)
    except Exception:  # lxml and the extractor's own code meet every page that was ever written
        return "", "its HTML cannot be parsed"
    return (text, "") if text else ("", "no main text in its HTML")


def too_large_error(place: str) -> UserError:
    """Return the error for a document that is too large."""
    return UserError(
        f"{place}: one document of more than {MAX_DOCUMENT_BYTES >> 20} MB. "
        "Cut it into documents, such as lines of a .jsonl file, or leave it "
        "out."
    )


def make_document(id: str, record: dict[str, Any], fields: str, place: str) -> Document:
    """The document that a record's field, or its prompt+completion, makes.

    Raises UserError naming the place.
    """
    *prompt, text = (get_text_field(record, field, place) for field in fields.split("+"))
    if prompt and not text:
        raise UserError(
            f"{place}: its completion is empty, so there is nothing to learn "
            "from it. Remove the record."
        )
    return Document(id, "".join(prompt) + text, sum(map(len, prompt)))


def get_text_field(record: dict[str, Any], field: str, place: str) -> str:
    """record[field], which must be a text. Raises UserError naming the place."""
    if field not in record:
        raise UserError(
            f"{place}: has no field {field!r}; it has: {', '.join(record)}. "
            "Name the field that holds the text after '#'."
        )
    if not isinstance(record[field], str):
        raise UserError(
            f"{place}: field {field!r}: expected text, got "
            f"{type(record[field]).__name__}. Name another field or mend the "
            "record."
        )
    try:
        record[field].encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start + 1} is half of a surrogate "
            "pair, which is no text. Mend or remove the record."
        ) from None
    return record[field]


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- Hugging Face


def parse_hf_source(source: TextSource) -> tuple[str, str | None, str]:
    """Where -> (data set or local directory, config or None, split)."""
    name, _, split = source.pattern.rpartition(":")
    parts = name.split("/")
    if len(parts) > 2 and not pathlib.Path(name).is_dir():
        return "/".join(parts[:2]), "/".join(parts[2:]), split
    return name, None, split


def read_hf(source: TextSource, _: str) -> Iterator[Document | UserError]:
    """Yield the documents of a Hugging Face data set."""
    import datasets

    name, config, split = parse_hf_source(source)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for n, record in enumerate(rows, 1):
            try:
                yield make_document(
                    f"{split}:{n}", record, source.field, f"hf:{source.pattern}:{n}"
                )
            except UserError as error:
                yield error
    except (
        Exception
    ) as error:  # datasets and the hub raise dozens of kinds; each means that the set cannot be had
        raise UserError(
            f"hf:{source.pattern}: {type(error).__name__}: "
            f"{first_error_line(error)} Check name, config, split and the "
            "network."
        ) from error


# ---- what every Python installation carries


def read_python(source: TextSource, _: str) -> Iterator[Document]:
    """Yield text of this Python installation."""
    return PYTHON_READERS[source.pattern]()


def read_code() -> Iterator[Document]:
    """Yield the files of the standard library."""
    for file in list_stdlib_files():
        yield Document(
            file.relative_to(stdlib_dir()).as_posix(), file.read_bytes().decode("utf-8", "replace")
        )


def read_prose() -> Iterator[Document]:
    """Docstrings, a document a module.

    The installed packages' README texts; the language reference's topics.
    """
    import pydoc_data.topics

    packages = pathlib.Path(sysconfig.get_path("purelib"))
    modules = {file.relative_to(stdlib_dir()).as_posix(): file for file in list_stdlib_files()}
    modules |= {
        file.relative_to(packages).as_posix(): file
        for name in PROSE_PACKAGES
        for file in list_source_files(packages / name)
    }
    for name, file in sorted(modules.items()):
        if docstrings := [text for text in extract_docstrings(file) if is_prose(text)]:
            yield Document(f"docstrings/{name}", "\n\n".join(dict.fromkeys(docstrings)))
    for name, metadata in sorted(get_installed_packages().items()):
        if readme := (metadata.get_payload() or metadata.get("Description") or "").strip():
            yield Document(f"readme/{name}", readme.encode("utf-8", "replace").decode())
    for name, topic in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topics/{name}", topic.strip())


def read_tasks() -> Iterator[Document]:
    """Short functions that say in a few words what they do.

    The words ask for it, the function without them answers.
    """
    for file in list_stdlib_files():
        code = file.read_bytes().decode("utf-8", "replace")
        lines = code.splitlines(keepends=True)
        for node in parse_module(file).body:
            if (
                isinstance(node, ast.FunctionDef)
                and len(node.body) > 1
                and (docstring := ast.get_docstring(node))
            ):
                says = node.body[0]
                function = "".join(
                    lines[node.lineno - 1 : says.lineno - 1]
                    + lines[says.end_lineno : node.end_lineno]
                )
                words = " ".join(docstring.partition("\n\n")[0].split())
                if 20 <= len(words) <= 120 and len(function) <= 500:
                    prompt = f"Write a Python function. {words}\n\n"
                    yield Document(
                        f"{file.relative_to(stdlib_dir()).as_posix()}:{node.name}",
                        prompt + function,
                        len(prompt),
                    )


def get_installed_packages() -> dict[str, Any]:
    """Metadata of the installed packages by name, but for the remains of an interrupted pip, which
    have no name.
    """
    return {
        name.lower(): each.metadata
        for each in importlib.metadata.distributions()
        if each.metadata and (name := each.metadata["Name"])
    }


# Packages that every installation of jaxpt has, with the most docstrings: they bring prose from 3
# MB to 8 MB
PROSE_PACKAGES = ("flax", "jax", "numpy", "optax")
# Directories that hold tests, data tables, or a program of their own in place of library code
NOT_LIBRARY = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "turtledemo",
}


def stdlib_dir() -> pathlib.Path:
    """Return the directory of the standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


@functools.cache
def list_stdlib_files() -> list[pathlib.Path]:
    """Return the files of the standard library."""
    return [
        file
        for file in list_source_files(stdlib_dir())
        if not file.name.startswith("_sysconfigdata")
    ]  # build settings of this machine


def list_source_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Python files below root, sorted, without tests."""
    files = [
        file
        for file in root.rglob("*.py")
        if not NOT_LIBRARY & set(file.relative_to(root).parts[:-1])
    ]
    return sorted(
        (file for file in files if not re.match(r"test_|.*_test\.py", file.name)),
        key=lambda file: file.as_posix(),
    )


def extract_docstrings(file: pathlib.Path) -> list[str]:
    """Docstrings of a file's module, classes and functions, outermost first, indentation
    removed.
    """
    docstrings, nodes = [], [parse_module(file)]
    # grows while it is read: breadth first, through statements only, which is all that can hold a
    # definition
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            text := ast.get_docstring(node)
        ):
            docstrings.append(text)
        for block in ("body", "orelse", "handlers", "finalbody"):
            nodes += getattr(node, block, ())
    return docstrings


def parse_module(file: pathlib.Path) -> ast.Module:
    """A file's syntax tree; an empty one where the file was written for another Python."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def is_prose(docstring: str) -> bool:
    """Long enough to say something, and mostly words.

    At least 80 characters, three quarters of them letters or spaces.
    """
    return len(docstring) >= 80 and sum(map(str.isalpha, docstring)) + docstring.count(
        " "
    ) >= 0.75 * len(docstring)


PYTHON_READERS = {"prose": read_prose, "code": read_code, "tasks": read_tasks}
READERS = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "warc": read_warc,
    "hf": read_hf,
    "python": read_python,
}
