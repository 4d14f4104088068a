"""What `warc:` and the preset c4 leave of HTML files: run `python benchmarks/pages.py DIR...`.

Prints the pages with text, their characters, what c4's rules keep of them, and the share of the
kept lines that begin in lower case: sentences cut in the middle.
"""

import pathlib
import sys
import tempfile
import time

from jaxpt.data import filters, sources


def make_record(page: bytes) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
    head = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\n"
    return b"%sContent-Length: %d\r\n\r\n%s\r\n\r\n" % (head, len(http), http)


def main(directories: list[str]) -> None:
    files = []
    for directory in directories:
        files += [
            file for file in sorted(pathlib.Path(directory).rglob("*.html")) if file.is_file()
        ]
    with tempfile.TemporaryDirectory() as place:
        warc = pathlib.Path(place, "pages.warc")
        warc.write_bytes(b"".join(make_record(file.read_bytes()) for file in files))
        start = time.process_time()
        documents = list(sources.parse_source(f"warc:{warc}").iterate_documents())
        seconds = time.process_time() - start
    rules = filters.parse_rules("c4", ["-language"])
    judged = filters.apply_rules(documents, rules)
    lines = []
    n_kept = 0
    for document, failed in zip(judged.documents, judged.failed_rule, strict=True):
        if failed == len(rules):
            n_kept += 1
            lines += document.text.split("\n")
    n_chars = sum(len(document.text) for document in documents)
    n_kept_chars = sum(map(len, lines))
    n_lower = sum(line[:1].islower() for line in lines)
    print(f"{len(files):,} files, {seconds:.1f} s of CPU time")
    print(f"main text: {len(documents):,} pages, {n_chars / 1e6:.2f} million characters")
    print(f"c4 keeps: {n_kept:,} pages, {n_kept_chars / 1e6:.2f} million characters")
    print(
        f"lines beginning in lower case: {n_lower:,} of {len(lines):,}, {n_lower / len(lines):.1%}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
