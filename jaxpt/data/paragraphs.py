"""Paragraphs that stood in the corpus before.

Marked in each text alone, decided over all of them, taken out when the shards are written.

A paragraph is what stands between empty lines, without the white space around it; of equal ones the
first in canonical order stays. 64 bits of
a hash stand for it: among ten million, two unlike ones are taken for equal with a chance of 3 in a
million.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxpt.data import dedup

PARAGRAPH_GAP = re.compile(r"(\n{2,})")
# A paragraph: its hash, its number in the text, its size, the characters of the gaps around it, and
# how many shorter ones the text has
MARK_SIZE = np.dtype(
    [
        (name, "<u8" if name == "digest" else "<u4")
        for name in ("digest", "number", "chars", "bytes", "before", "after", "shorter")
    ]
)


def hash_paragraphs(texts: Sequence[str], least: int = 100) -> list[bytes]:
    """What `repeats` asks of each text: a MARK for each paragraph of 100 characters or more."""
    return [hash_text_paragraphs(text, least) for text in texts]


def hash_text_paragraphs(text: str, least: int) -> bytes:
    """Return the hashes of one text's paragraphs."""
    parts = PARAGRAPH_GAP.split(text)  # paragraph, gap, paragraph, ...
    plain = [part.strip() for part in parts[::2]]
    gaps = [0, *map(len, parts[1::2]), 0]
    shorter = sum(0 < len(part) < least for part in plain)
    found = [
        (
            int.from_bytes(hashlib.blake2b(each.encode(), digest_size=8).digest()),
            k,
            len(part),
            len(part.encode()),
            gaps[k],
            gaps[k + 1],
            shorter,
        )
        for k, (each, part) in enumerate(zip(plain, parts[::2], strict=True))
        if len(each) >= least
    ]
    return np.array(found, MARK_SIZE).tobytes()


class RepeatedParagraphs(NamedTuple):
    """What goes out of n documents.

    amounts  [n, 3] int64, of each document: paragraphs, and characters and bytes with the gaps that
    go with them
    cuts     (row, number, leading) of each paragraph, by row: one with nothing left before it takes
    the gap behind it along, another the one before
    empty    rows of which nothing stays;  original  for each the row where its first paragraph
    stands
    """

    repeated_chars: np.ndarray
    cuts: np.ndarray
    empty: np.ndarray
    original: np.ndarray


def find_repeated_paragraphs(
    each: Callable[[], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]], n: int
) -> RepeatedParagraphs:
    """Of n documents in canonical order what stood in one before, or before in the same.

    each  gives, in parts and every time anew, (rows [m], paragraphs of each [m], MARKs of them
    all): some 35 bytes a paragraph are held
    """
    digests, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
    for rows, counts, found in each():
        digests.append(found["digest"].copy())
        owners.append(np.repeat(rows, counts).astype(np.int32))
    first, owners = (
        dedup.find_exact_duplicates(np.concatenate(digests)[:, None]),
        np.concatenate(owners),
    )
    amounts, at = np.zeros((n, 3), np.int64), 0
    cuts, empty, original = (
        [np.empty(0, [("row", "<i8"), ("number", "<u4"), ("leading", "?")])],
        [],
        [],
    )
    for rows, counts, found in each():
        of = np.flatnonzero(first[at : at + len(found)] != np.arange(at, at + len(found)))
        row, gone = np.repeat(rows, counts)[of], found[of]
        here = np.empty(len(of), cuts[0].dtype)
        leading = gone["number"] == np.arange(len(of)) - np.searchsorted(
            row, row
        )  # all before it go too
        here["row"], here["number"], here["leading"] = row, gone["number"], leading
        gap = np.where(leading, gone["after"], gone["before"])
        for k, size in enumerate((np.ones(len(of)), gone["chars"] + gap, gone["bytes"] + gap)):
            amounts[:, k] += np.bincount(row, size, n).astype(np.int64)
        nothing = (counts > 0) & (amounts[rows, 0] == counts)
        starts = np.cumsum([0, *counts])[:-1]
        nothing[nothing] = found["shorter"][starts[nothing]] == 0
        empty.append(rows[nothing])
        original.append(owners[first[at + starts[nothing]]])
        cuts.append(here[~np.isin(row, rows[nothing])])
        at += len(found)
    return RepeatedParagraphs(
        amounts,
        np.concatenate(cuts),
        *(np.concatenate([np.empty(0, np.int64), *rows]) for rows in (empty, original)),
    )


def remove_spans(text: str, cuts: np.ndarray) -> str:
    """The text without the paragraphs that `cuts` tells of it."""
    parts = PARAGRAPH_GAP.split(text)
    for number, leading in zip(cuts["number"].tolist(), cuts["leading"].tolist(), strict=True):
        parts[2 * number] = ""
        gap = 2 * number + (1 if leading else -1)
        if gap < len(parts):
            parts[gap] = ""
    return "".join(parts)
