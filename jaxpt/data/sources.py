"""Read text: one string names a source, `[NAME=]KIND:WHERE`, and every source yields Documents.

    text:GLOB              a file is a document                       text:books/*.txt
    jsonl:GLOB#field       a line is a document, text in `field`
                           web=jsonl:crawl/*.jsonl.zst#content
    parquet:GLOB#column    a row is a document, text in `column`      parquet:shards/*.parquet#text
    warc:GLOB              a crawled web page is a document: its main text, url and date in `meta`
                           warc:crawl/*.warc.gz
    hf:NAME[/CONFIG]:SPLIT#field   Hugging Face data set, streamed
                           hf:HuggingFaceFW/fineweb/sample-10BT:train#text
    python:prose           documentation that this Python installation contains, in English
    python:code            the standard library's source files
    python:tasks           a prompt and its completion: the summary of a function of the standard
                           library, and the function

Two fields joined by "+", as in jsonl:tasks.jsonl#question+answer, make a document of a prompt and
its completion: one text, whose prompt is read but not trained on. A GLOB may be on a disk or in an
object store: s3://BUCKET/PATH, gs://BUCKET/PATH.

Order is canonical: sources as listed, then file names, then record numbers; "first" means first in
this order everywhere. Ids are NAME/file, or NAME/file:record with records counted from 1, and files
relative to the glob.

What cannot be read stops the reading with an error that names file and record, or is counted and
skipped: see TextSource.iterate_documents.
"""

from __future__ import annotations

import ast
import codecs
import concurrent.futures
import contextlib
import dataclasses
import difflib
import email.message
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
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast

from jaxpt import stage
from jaxpt.spec import Record, UserError

if TYPE_CHECKING:
    import pyarrow.fs
    from fastwarc.warc import WarcRecord

T = TypeVar("T")


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

READ_ERRORS = "cannot be read"
# Bytes of a document, or of the record that holds it. What is larger is many documents in one, and
# would fill the memory of a process.
MAX_DOCUMENT_BYTES = 2**25
FILE_KINDS = ("text", "jsonl", "parquet", "warc")
FIELD_KINDS = ("jsonl", "parquet", "hf")


def ignore_skipped(reason: str, message: str) -> None:
    """Do nothing about a skipped record."""


@dataclasses.dataclass(frozen=True)
class TextSource(Record):
    """A parsed source string and the files found for it, of which nothing is read yet."""

    name: str  # of its shards, and the `source` column
    kind: str
    pattern: str  # glob, data set and split, or "prose" / "code"
    field: str  # the field or column that holds the text, or two: prompt+completion
    # paths or addresses in an object store, in canonical order; empty for hf: and python:
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
            for found in read_file(self, file):
                if isinstance(found, Document):
                    yield found._replace(id=f"{self.name}/{found.id}")
                elif isinstance(found, Skipped):
                    passed(found.reason, f"{found.where}: {found.reason}")
                elif on_error == "skip":
                    passed(READ_ERRORS, str(found))
                else:
                    raise found

    def fingerprint_inputs(self) -> dict[str, pathlib.Path]:
        """Return what a manifest fingerprints, by name."""
        inputs = {}
        for file in self.files:
            if not is_remote(file):
                inputs[f"{self.name}/{relative_name(self, file)}"] = pathlib.Path(file)
        if self.kind == "hf":
            directory = pathlib.Path(parse_hf_source(self).name)
            if directory.is_dir():
                inputs[self.name] = directory
        return inputs

    def describe_installation(self) -> dict[str, str]:
        """Return what identifies content that is not fingerprinted.

        These are the versions of an installation, and the size and tag of objects in a store.
        """
        if self.kind == "warc":
            extractor = {"trafilatura": importlib.metadata.version("trafilatura")}
            return extractor | self.list_object_tags()
        if self.kind != "python":
            return self.list_object_tags()
        versions = {"python": sys.version.split()[0]}
        if self.pattern == "prose":
            packages = get_installed_packages().items()
            installed = sorted((name, metadata["Version"]) for name, metadata in packages)
            versions["packages"] = stage.fingerprint(installed)
        return versions

    def list_object_tags(self) -> dict[str, str]:
        """Return the version tags of objects in a store, by name."""
        files = [file for file in self.files if is_remote(file)]
        tags = map_in_threads(get_object_tag, files)
        return {relative_name(self, file): tag for file, tag in zip(files, tags, strict=True)}

    def list_file_sizes(self) -> list[int]:
        """Return the bytes of each file as stored."""
        return map_in_threads(get_file_size, self.files)


def read_file(source: TextSource, file: str) -> Reading:
    """Yield what the file's reader yields, and an error that ends it as the last."""
    try:
        yield from READERS[source.kind](source, file)
    except UserError as error:
        yield error


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
    if kind not in READERS:
        near = difflib.get_close_matches(kind, READERS, 1)
        hint = f"did you mean {near[0]}:?" if near else f"there are: {', '.join(READERS)}."
        raise UserError(f"prepare.sources: {text!r}: there is no kind {kind!r}; {hint}")
    field = ""
    if kind in FIELD_KINDS:
        where, _, field = where.partition("#") if "#" in where else (where, "", "text")
        if field.count("+") > 1 or not all(field.split("+")):
            raise UserError(
                f"prepare.sources: {text!r}: {field!r} is neither a field nor two, "
                f"prompt+completion. Write {kind}:GLOB#prompt+completion."
            )
    files: tuple[str, ...] = ()
    if kind in FILE_KINDS:
        where = where if is_remote(where) else str(stage.local_path(where))
        files = find_source_files(text, kind, where)
    elif kind == "python" and where not in PYTHON_READERS:
        raise UserError(
            f"prepare.sources: {text!r}: expected python:prose, python:code or python:tasks."
        )
    elif kind == "hf" and ":" not in where:
        raise UserError(
            f"prepare.sources: {text!r}: the split is missing. Write hf:NAME[/CONFIG]:SPLIT#field, "
            f"such as hf:{where}:train#text."
        )
    if name is None:
        name = default_source_name(kind, where)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"prepare.sources: {text!r}: a source cannot be named {name!r}. "
            f"Use letters, digits, '_', '-' and '.': NAME={kind}:..."
        )
    return TextSource(name, kind, where, field, files)


def find_source_files(text: str, kind: str, where: str) -> tuple[str, ...]:
    """Return the files that a glob matches, sorted. Raise UserError if there is none."""
    files = tuple(sorted(glob_files(where)))
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


def default_source_name(kind: str, where: str) -> str:
    """Return the name of a source that was given none.

    python:prose -> prose; books/*.txt -> books; crawl/part.jsonl.gz -> part;
    HuggingFaceFW/fineweb/sample-10BT:train -> fineweb-sample-10BT
    """
    if kind == "python":
        return where
    if kind == "hf":
        path = where.rpartition(":")[0]
        parts = path.strip("/").split("/")
        if pathlib.Path(path).is_dir():
            word = parts[-1]
        else:
            word = "-".join(parts[1:] or parts)
    else:
        parts = pathlib.PurePath(where).parts
        plain = [part for part in parts if not glob.has_magic(part) and part != "/"]
        word = plain[-1] if plain else "files"
        if not glob.has_magic(where):
            word = word.split(".")[0]
    return re.sub(r"[^\w.-]+", "_", word).strip("._-")


def relative_name(source: TextSource, file: str) -> str:
    """Return a file's name in ids.

    It is relative to the part of the glob that is no pattern, so that moving the data changes no
    id.
    """
    parts = pathlib.PurePath(source.pattern).parts
    n_plain = len(parts) - 1
    for i, part in enumerate(parts):
        if glob.has_magic(part):
            n_plain = i
            break
    root = pathlib.PurePath(*parts[:n_plain])
    return pathlib.PurePath(file).relative_to(root).as_posix()


# ---- files, on disks and in object stores


def is_remote(file: str) -> bool:
    """Return whether a file is in an object store."""
    return "://" in file


def glob_files(pattern: str) -> set[str]:
    """Return the files that match. Raise UserError if an object store does not answer."""
    if not is_remote(pattern):
        paths = [pathlib.Path(found) for found in glob.glob(pattern, recursive=True)]
        return {path.as_posix() for path in paths if path.is_file()}
    from fsspec.implementations.arrow import ArrowFSWrapper

    scheme = pattern.partition("://")[0]
    store, path = open_filesystem(pattern)
    try:
        found: Any = ArrowFSWrapper(store).glob(path, detail=True)  # name -> details
    except OSError as error:
        raise explain_unreachable(pattern, error) from None
    return {f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file"}


@functools.cache
def open_filesystem(address: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the object store of an address, and the path in it.

    Credentials, region and endpoint are the store's own, as in data/storage.py.
    """
    import pyarrow as pa
    import pyarrow.fs

    scheme, _, path = address.partition("://")
    bucket = f"{scheme}://{path.split('/')[0]}"  # which is an address, as a pattern is not
    if scheme in ("gs", "gcs"):
        # Google's client retries for a quarter of an hour without a network or credentials
        bucket += "?retry_limit_seconds=30"
    try:
        store, _ = pyarrow.fs.FileSystem.from_uri(bucket)
    except (OSError, pa.ArrowException) as error:
        raise explain_unreachable(address, error) from None
    return store, path


def explain_unreachable(address: str, error: BaseException) -> UserError:
    """Return the error for a store that cannot be reached."""
    return UserError(
        f"{address}: cannot be reached ({first_error_line(error)}). Check the address, the "
        "credentials and the endpoint."
    )


def map_in_threads(function: Callable[[str], T], files: Iterable[str]) -> list[T]:
    """Return function(file) of each file, 16 at a time: an object store takes long to answer."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(function, files))


def get_file_size(file: str) -> int:
    """Return the size of a file in bytes."""
    if not is_remote(file):
        return pathlib.Path(file).stat().st_size
    store, path = open_filesystem(file)
    info: Any = store.get_file_info(path)  # of one path, not of several
    return info.size


def get_object_tag(file: str) -> str:
    """Return a text that changes with an object's content, as its store reports it."""
    store, path = open_filesystem(file)
    try:
        with store.open_input_file(path) as stream:
            headers = {}
            for key, value in (stream.metadata() or {}).items():
                headers[key.lower()] = value.decode() if isinstance(value, bytes) else value
            info: Any = store.get_file_info(path)
            return f"{stream.size()} bytes, {headers.get('etag') or info.mtime}"
    except OSError as error:
        raise explain_unreachable(file, error) from None


@contextlib.contextmanager
def open_text_file(file: str) -> Iterator[io.BufferedIOBase]:
    """Open a file's bytes, decompressed if its name ends in .gz or .zst.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with open_raw(file) as found, decompress(file, found) as stream:
            yield stream
    # of a truncated file gzip raises EOFError, the others OSError
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({first_error_line(error)}). Copy it again or leave it out."
        ) from None


def open_raw(file: str) -> Any:
    """Open a file's bytes: a Python file, or a pyarrow.NativeFile in an object store."""
    if not is_remote(file):
        return open(file, "rb")
    store, path = open_filesystem(file)
    return store.open_input_file(path)


def decompress(file: str, found: Any) -> io.BufferedIOBase:
    """Return a stream of the decompressed bytes of what `open_raw` opened."""
    if file.endswith(".zst"):
        import pyarrow as pa

        compressed: Any = pa.CompressedInputStream(found, "zstd")
        return io.BufferedReader(compressed)
    if file.endswith(".gz"):
        return gzip.open(found)
    return io.BufferedReader(found) if is_remote(file) else found


# ---- the kinds: each reader yields the documents of one file, the records that are none, and the
# errors that are confined to a record


def read_text(source: TextSource, file: str) -> Reading:
    """Yield the file as one document."""
    with open_text_file(file) as stream:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise too_large_error(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte {error.start} is not UTF-8 ({error.reason}). Convert the file to UTF-8 "
            "or leave it out."
        ) from None
    # line ends as Python and editors show them; a paragraph ends at "\n\n"
    yield Document(relative_name(source, file), text.replace("\r\n", "\n"))


def read_jsonl(source: TextSource, file: str) -> Reading:
    """Yield a document per line."""
    name = relative_name(source, file)
    with open_text_file(file) as stream:
        lines = iter(lambda: stream.readline(MAX_DOCUMENT_BYTES), b"")
        for n, line in enumerate(lines, 1):
            place = f"{file}:{n}"
            if not line.strip():
                continue
            if len(line) == MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_DOCUMENT_BYTES)
                yield too_large_error(place)
                continue
            try:
                record = parse_json_line(line, source.field, place)
                document = make_document(f"{name}:{n}", record, source.field, place)
            except UserError as error:
                yield error
            else:
                yield document


def parse_json_line(line: bytes, field: str, place: str) -> dict[str, Any]:
    """Return the JSON object of a line. Raise UserError if it is none."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.start} of the line is not UTF-8 ({error.reason}). "
            "Mend or remove the line."
        ) from None
    # besides JSONDecodeError: numbers too long, brackets too deep
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not JSON ({first_error_line(error)}). Mend or remove the line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f'{place}: expected an object such as {{"{field}": "..."}}, got '
            f"{type(record).__name__}."
        )
    return record


def read_parquet(source: TextSource, file: str) -> Reading:
    """Yield a document per row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = relative_name(source, file)
    fields = source.field.split("+")
    try:
        with open_raw(file) as found, pq.ParquetFile(found) as table:
            names = table.schema_arrow.names
            missing = [field for field in fields if field not in names]
            if missing:
                raise UserError(
                    f"{file}: has no column {missing[0]!r}; it has: {', '.join(names)}. "
                    "Write parquet:GLOB#column."
                )
            n = 0
            for batch in table.iter_batches(1024, columns=fields):
                for record in batch.to_pylist():
                    n += 1
                    yield try_document(f"{name}:{n}", record, source.field, f"{file}:{n}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as parquet ({first_error_line(error)}). Copy it again or "
            "leave it out."
        ) from None


def read_warc(source: TextSource, file: str) -> Reading:
    """Yield the main text of the HTML pages among the responses.

    Source: trafilatura with precision before recall, like FineWeb (2406.17557).
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    name, n = relative_name(source, file), 0
    with open_text_file(file) as stream:
        forward = ForwardReader(stream)
        try:
            records = ArchiveIterator(cast(BinaryIO, forward), parse_http=False)
            for n, record in enumerate(records, 1):
                place = f"{file}:{n}"
                n_bytes = get_content_length(record, place)
                if n_bytes > MAX_DOCUMENT_BYTES:
                    yield too_large_error(place)
                    continue
                record.freeze()
                if forward.error:
                    break
                # the last record of a truncated file looks whole otherwise
                if record.content_length != n_bytes:
                    raise UserError(
                        f"{place}: the record ends after {record.content_length} of {n_bytes} "
                        "bytes. Copy the file again or leave it out."
                    )
                if record.record_type == WarcRecordType.response:
                    yield read_response(record, f"{name}:{n}", place)
        except OSError as error:
            raise UserError(
                f"{file}:{n + 1}: cannot be read as WARC ({first_error_line(error)}). Copy the "
                "file again or leave it out."
            ) from None
        if forward.error:
            raise forward.error


def get_content_length(record: WarcRecord, place: str) -> int:
    """Return the bytes that a record declares. Raise UserError if it declares none."""
    declared = record.headers.get("Content-Length") or ""
    if not re.fullmatch(r"\d{1,18}", declared, re.ASCII):
        raise UserError(
            f"{place}: its header is damaged (Content-Length {declared[:40]!r}). Copy the file "
            "again or leave it out."
        )
    return int(declared)


def read_response(record: WarcRecord, id: str, place: str) -> Document | Skipped:
    """Return the document of a response, or why it has none."""
    text, reason = extract_page_text(record)
    if not text:
        return Skipped(reason, place)
    date = record.record_date.strftime("%Y-%m-%dT%H:%M:%SZ") if record.record_date else ""
    meta = {"url": record.headers.get("WARC-Target-URI") or "", "date": date}
    return Document(id, text, 0, json.dumps(meta, ensure_ascii=False))


class ForwardReader:
    """A stream in the form that fastwarc can take.

    fastwarc asks for the position even of a stream that has none, and an exception while it reads
    would end the process: `error` keeps it.
    """

    def __init__(self, stream: io.BufferedIOBase):
        """Read the stream from where it is."""
        self.stream = stream
        self.n_read = 0
        self.error: Exception | None = None

    def read(self, n: int) -> bytes:
        """Read at most n bytes."""
        try:
            # no more than is ready: an error must not take what was whole before it
            data = self.stream.read1(n)
        except (EOFError, zlib.error, OSError) as error:
            self.error, data = error, b""
        self.n_read += len(data)
        return data

    def tell(self) -> int:
        """Return the position."""
        return self.n_read


def extract_page_text(record: WarcRecord) -> tuple[str, str]:
    """Return (main text, "") of a response, or ("", the reason why there is none)."""
    import trafilatura
    from resiliparse.parse.encoding import bytes_to_str

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every odd page
    try:
        record.parse_http(auto_decode="all")
        body = record.reader.read()
    except (OSError, ValueError, zlib.error):
        return "", "its HTTP message cannot be decoded"
    status = record.http_headers and record.http_headers.status_code
    content_type = (record.http_content_type or "").lower()
    if status != 200:
        return "", f"HTTP status {status}"
    if "html" not in content_type:
        return "", f"is {content_type or 'of no stated type'}, not HTML"
    if not body.strip():
        return "", "empty body"
    html = bytes_to_str(body, find_charset(record.http_charset, body))
    try:
        text = trafilatura.extract(html, include_comments=False, favor_precision=True)
    except Exception:  # lxml and the extractor meet every page that was ever written
        return "", "its HTML cannot be parsed"
    return (text, "") if text else ("", "no main text in its HTML")


def find_charset(declared: str | None, body: bytes) -> str:
    """Return the encoding of a page: as HTTP declares it, else the page, else its bytes."""
    from resiliparse.parse.encoding import detect_encoding

    try:
        return codecs.lookup(declared or "").name
    except LookupError:  # none is declared, or an unknown one
        return detect_encoding(body, from_html_meta=True) or "utf-8"


def too_large_error(place: str) -> UserError:
    """Return the error for a document that is too large."""
    return UserError(
        f"{place}: one document of more than {MAX_DOCUMENT_BYTES >> 20} MB. Split it into "
        "documents, such as lines of a .jsonl file, or leave it out."
    )


def try_document(id: str, record: dict[str, Any], fields: str, place: str) -> Document | UserError:
    """Return the document of a record, or the error that `make_document` raises."""
    try:
        return make_document(id, record, fields, place)
    except UserError as error:
        return error


def make_document(id: str, record: dict[str, Any], fields: str, place: str) -> Document:
    """Return the document that a record's field, or its prompt+completion, makes.

    Raises:
        UserError: a field is missing or no text, or the completion is empty; it names the place.
    """
    *prompt, text = [get_text_field(record, field, place) for field in fields.split("+")]
    if prompt and not text:
        raise UserError(
            f"{place}: its completion is empty, so there is nothing to learn from it. Remove the "
            "record."
        )
    prompt_text = "".join(prompt)
    return Document(id, prompt_text + text, len(prompt_text))


def get_text_field(record: dict[str, Any], field: str, place: str) -> str:
    """Return record[field]. Raise UserError, naming the place, if it is no text."""
    if field not in record:
        raise UserError(
            f"{place}: has no field {field!r}; it has: {', '.join(record)}. Name the field that "
            "holds the text after '#'."
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field {field!r}: expected text, got {type(text).__name__}. Name another "
            "field or mend the record."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start + 1} is half of a surrogate pair, which is no text. "
            "Mend or remove the record."
        ) from None
    return text


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error, or the name of its type."""
    return (str(error) or type(error).__name__).splitlines()[0]


# ---- Hugging Face


class HubDataset(NamedTuple):
    """The WHERE of an hf: source.

    Attributes:
        name: of a data set, or a local directory.
        config: its configuration, if one is given.
        split: such as "train".
    """

    name: str
    config: str | None
    split: str


def parse_hf_source(source: TextSource) -> HubDataset:
    """Return the parts of NAME[/CONFIG]:SPLIT."""
    name, _, split = source.pattern.rpartition(":")
    parts = name.split("/")
    if len(parts) > 2 and not pathlib.Path(name).is_dir():
        return HubDataset("/".join(parts[:2]), "/".join(parts[2:]), split)
    return HubDataset(name, None, split)


def read_hf(source: TextSource, _: str) -> Reading:
    """Yield the documents of a Hugging Face data set."""
    import datasets

    name, config, split = parse_hf_source(source)
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        for n, record in enumerate(rows, 1):
            yield try_document(f"{split}:{n}", record, source.field, f"hf:{source.pattern}:{n}")
    # datasets and the hub raise dozens of types; each means that the data set cannot be read
    except Exception as error:
        raise UserError(
            f"hf:{source.pattern}: {type(error).__name__}: {first_error_line(error)} "
            "Check name, config, split and the network."
        ) from error


# ---- text of every Python installation


def read_python(source: TextSource, _: str) -> Reading:
    """Yield text of this Python installation."""
    return PYTHON_READERS[source.pattern]()


def read_code() -> Iterator[Document]:
    """Yield the files of the standard library."""
    for file in list_stdlib_files():
        text = file.read_bytes().decode("utf-8", "replace")
        yield Document(file.relative_to(stdlib_dir()).as_posix(), text)


def read_prose() -> Iterator[Document]:
    """Yield docstrings per module, packages' README texts, and the language reference's topics."""
    import pydoc_data.topics

    packages = pathlib.Path(sysconfig.get_path("purelib"))
    modules = {file.relative_to(stdlib_dir()).as_posix(): file for file in list_stdlib_files()}
    for name in PROSE_PACKAGES:
        for file in list_source_files(packages / name):
            modules[file.relative_to(packages).as_posix()] = file
    for name, file in sorted(modules.items()):
        docstrings = [text for text in extract_docstrings(file) if is_prose(text)]
        if docstrings:
            yield Document(f"docstrings/{name}", "\n\n".join(dict.fromkeys(docstrings)))
    for name, metadata in sorted(get_installed_packages().items()):
        readme = (get_readme(metadata) or "").strip()
        if readme:
            yield Document(f"readme/{name}", readme.encode("utf-8", "replace").decode())
    for name, topic in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"topics/{name}", topic.strip())


def get_readme(metadata: email.message.Message) -> str | None:
    """Return the README text in a package's metadata."""
    payload: Any = metadata.get_payload()
    return payload or metadata.get("Description")


def read_tasks() -> Iterator[Document]:
    """Yield short functions with a short summary: the prompt asks for it, the code answers."""
    for file in list_stdlib_files():
        name = file.relative_to(stdlib_dir()).as_posix()
        lines = file.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
        for node in parse_module(file).body:
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
                continue
            docstring = ast.get_docstring(node)
            if not docstring:
                continue
            summary = " ".join(docstring.partition("\n\n")[0].split())
            statement = node.body[0]  # the docstring
            head = lines[node.lineno - 1 : statement.lineno - 1]
            body = lines[statement.end_lineno : node.end_lineno]
            function = "".join(head + body)
            if 20 <= len(summary) <= 120 and len(function) <= 500:
                prompt = f"Write a Python function. {summary}\n\n"
                yield Document(f"{name}:{node.name}", prompt + function, len(prompt))


def get_installed_packages() -> dict[str, Any]:
    """Return name -> metadata of the installed packages.

    The remains of an interrupted pip, which have no name, are left out.
    """
    packages = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        if metadata and metadata["Name"]:
            packages[metadata["Name"].lower()] = metadata
    return packages


# packages with the most docstrings that every installation of jaxpt has: 8 MB of prose, not 3
PROSE_PACKAGES = ("flax", "jax", "numpy", "optax")
# directories of tests, data tables, and programs that are no library code
NOT_LIBRARY = {"test", "tests", "testing", "idlelib", "lib2to3", "pydoc_data"}
NOT_LIBRARY |= {"site-packages", "turtledemo"}


def stdlib_dir() -> pathlib.Path:
    """Return the directory of the standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


@functools.cache
def list_stdlib_files() -> list[pathlib.Path]:
    """Return the files of the standard library, without the build settings of this machine."""
    files = list_source_files(stdlib_dir())
    return [file for file in files if not file.name.startswith("_sysconfigdata")]


def list_source_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the Python files below root, sorted, without tests."""
    files = []
    for file in root.rglob("*.py"):
        is_library = not NOT_LIBRARY & set(file.relative_to(root).parts[:-1])
        if is_library and not re.match(r"test_|.*_test\.py", file.name):
            files.append(file)
    return sorted(files, key=lambda file: file.as_posix())


def extract_docstrings(file: pathlib.Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions, outermost first, dedented."""
    docstrings = []
    nodes: list[ast.AST] = [parse_module(file)]
    # The list grows while it is read: breadth first, through statements only, which is all that can
    # hold a definition.
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                docstrings.append(text)
        for block in ("body", "orelse", "handlers", "finalbody"):
            nodes += getattr(node, block, ())
    return docstrings


def parse_module(file: pathlib.Path) -> ast.Module:
    """Return a file's syntax tree, an empty one if it was written for another Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def is_prose(docstring: str) -> bool:
    """Return whether a docstring has 80 characters, three quarters of them letters or spaces."""
    n_prose = sum(map(str.isalpha, docstring)) + docstring.count(" ")
    return len(docstring) >= 80 and n_prose >= 0.75 * len(docstring)


PYTHON_READERS: dict[str, Callable[[], Reading]] = {
    "prose": read_prose,
    "code": read_code,
    "tasks": read_tasks,
}
READERS: dict[str, Callable[[TextSource, str], Reading]] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "warc": read_warc,
    "hf": read_hf,
    "python": read_python,
}
