"""Find paragraphs that occurred in the corpus before, and remove them.

Each text is marked by itself, repeats are decided over all marks, and paragraphs are removed when
the shards are written. A paragraph is what is between empty lines, without surrounding white space;
of equal ones the first in canonical order stays. A 64-bit hash represents it: among ten million
paragraphs, two different ones count as equal with a chance of 3 in a million.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxpt.data import dedup

PARAGRAPH_GAP = re.compile(r"(\n(?:[^\S\n]*\n)+)")
# a paragraph: its hash, its number in the text, its size, the characters of the gaps around it, and
# how many shorter paragraphs the text has
SIZE_FIELDS = ("number", "chars", "bytes", "before", "after", "shorter")
MARK_FIELDS = [("digest", "<u8"), *((name, "<u4") for name in SIZE_FIELDS)]
MARK_DTYPE = np.dtype(MARK_FIELDS)
# a paragraph to remove, with the gap before it; leading: nothing is left before it, so that the gap
# after it goes instead
CUT_DTYPE = np.dtype([("row", "<i8"), ("number", "<u4"), ("leading", "?")])


def mark_text(text: str, least: int) -> bytes:
    """Return a MARK_DTYPE for each paragraph of a text that has as many characters or more."""
    parts = PARAGRAPH_GAP.split(text)  # paragraph, gap, paragraph, ...
    raw = parts[::2]
    gaps = [0, *map(len, parts[1::2]), 0]
    stripped = [part.strip() for part in raw]
    n_shorter = sum(0 < len(part) < least for part in stripped)
    marks = []
    for k, part in enumerate(stripped):
        if len(part) < least:
            continue
        digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
        number = int.from_bytes(digest)
        n_chars = len(raw[k])
        n_bytes = len(raw[k].encode())
        before, after = gaps[k : k + 2]
        mark = (number, k, n_chars, n_bytes, before, after, n_shorter)
        marks.append(mark)
    return np.array(marks, MARK_DTYPE).tobytes()


class MarkedDocuments(NamedTuple):
    """The marks of some documents of the corpus.

    Attributes:
        rows: [m] indices of documents, in canonical order.
        counts: [m] marks per document.
        marks: [sum of counts] MARK_DTYPE.
    """

    rows: np.ndarray
    counts: np.ndarray
    marks: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """[m] the first mark of each document."""
        ends = np.cumsum(self.counts)
        return ends - self.counts


class RepeatedParagraphs(NamedTuple):
    """What must be removed from n documents.

    Attributes:
        repeated_chars: [n, 3] int64, per document: paragraphs, and their characters and bytes with
            the gaps that go with them.
        cuts: CUT_DTYPE of each paragraph, by row, without those of empty documents.
        empty: rows of which nothing stays.
        original: for each of `empty`, the row that has its first paragraph.
    """

    repeated_chars: np.ndarray
    cuts: np.ndarray
    empty: np.ndarray
    original: np.ndarray


def find_repeated_paragraphs(
    read_marks: Callable[[], Iterator[MarkedDocuments]], n: int
) -> RepeatedParagraphs:
    """Find paragraphs that occurred in an earlier document, or earlier in the same.

    Memory is about 35 bytes per paragraph.

    Args:
        read_marks: yields MarkedDocuments in parts, from the start at each call.
        n: number of documents, in canonical order.
    """
    digests: list[np.ndarray] = [np.empty(0, np.uint64)]
    owners: list[np.ndarray] = [np.empty(0, np.int32)]
    for rows, counts, marks in read_marks():
        digests.append(marks["digest"].copy())
        mark_rows = np.repeat(rows, counts)
        owners.append(mark_rows.astype(np.int32))
    digest = np.concatenate(digests)
    first = dedup.find_exact_duplicates(digest[:, None])
    owner = np.concatenate(owners)
    amounts = np.zeros((n, 3), np.int64)
    start = 0
    cuts = [np.empty(0, CUT_DTYPE)]
    empty: list[np.ndarray] = [np.empty(0, np.int64)]
    originals: list[np.ndarray] = [np.empty(0, np.int64)]
    for documents in read_marks():
        stop = start + len(documents.marks)
        here = first[start:stop]
        is_repeat = here != np.arange(start, stop)
        cut = cut_repeats(documents, is_repeat, amounts)
        is_empty = find_emptied(documents, amounts)
        emptied = documents.rows[is_empty]
        empty.append(emptied)
        first_repeats = here[documents.starts[is_empty]]
        originals.append(owner[first_repeats])
        is_kept = ~np.isin(cut["row"], emptied)
        cuts.append(cut[is_kept])
        start = stop
    joined = map(np.concatenate, (cuts, empty, originals))
    return RepeatedParagraphs(amounts, *joined)


def cut_repeats(
    documents: MarkedDocuments, is_repeat: np.ndarray, amounts: np.ndarray
) -> np.ndarray:
    """Return the cuts of repeated paragraphs, and add them to the amounts."""
    repeats = np.flatnonzero(is_repeat)
    n = len(repeats)
    mark_rows = np.repeat(documents.rows, documents.counts)
    row = mark_rows[repeats]
    marks = documents.marks[repeats]
    cuts = np.empty(n, CUT_DTYPE)
    first_in_document = np.searchsorted(row, row)
    n_before = np.arange(n) - first_in_document  # cut in the same document
    number = marks["number"]
    leading = number == n_before
    cuts["row"] = row
    cuts["number"] = number
    cuts["leading"] = leading
    gap = np.where(leading, marks["after"], marks["before"])
    n_chars = marks["chars"] + gap
    n_bytes = marks["bytes"] + gap
    sizes = (np.ones(n), n_chars, n_bytes)
    for k, size in enumerate(sizes):
        total = np.bincount(row, size, len(amounts))
        amounts[:, k] += total.astype(np.int64)
    return cuts


def find_emptied(documents: MarkedDocuments, amounts: np.ndarray) -> np.ndarray:
    """Return [m] whether every paragraph of a document is cut, and it has no shorter ones."""
    rows, counts, marks = documents
    is_all_cut = amounts[rows, 0] == counts
    is_empty = is_all_cut & (counts > 0)
    first_marks = marks[documents.starts[is_empty]]
    is_empty[is_empty] = first_marks["shorter"] == 0
    return is_empty


def remove_spans(text: str, cuts: np.ndarray) -> str:
    """Return the text without the paragraphs of its cuts."""
    parts = PARAGRAPH_GAP.split(text)
    for _, number, leading in cuts.tolist():
        place = 2 * number
        parts[place] = ""
        gap = place - 1
        if leading:
            gap = place + 1
        if gap < len(parts):
            parts[gap] = ""
    return "".join(parts)
