"""Read text: one string names a source, `[NAME=]KIND:WHERE`, and every source yields Documents.

A kind of source is a file of this package, which holds one `KIND` (source.SourceKind) and opens
with how it is written: text, jsonl, parquet, warc, hf, python. To add a kind, add a file.

Two fields joined by "+", as in jsonl:tasks.jsonl#question+answer, make a document of a prompt and
its completion: one text, whose prompt is read but not trained on. Three, prompt+chosen+rejected,
make a preference pair. A GLOB may be on a disk or in an object store: s3://BUCKET/PATH,
gs://BUCKET/PATH.

Order is canonical: sources as listed, then file names, then record numbers; "first" means first in
this order everywhere. Ids are NAME/file, or NAME/file:record with records counted from 1, and files
relative to the glob.

What cannot be read stops the reading with an error that names file and record, or is counted and
skipped: see TextSource.iterate_documents.
"""

from jaxpt.data.sources.parse import parse_source, parse_sources
from jaxpt.data.sources.source import READ_ERRORS, Document, TextSource

__all__ = ["READ_ERRORS", "Document", "TextSource", "parse_source", "parse_sources"]
