"""Between judging and writing: which rule drops each document, and what goes to which split."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxpt.data import dedup, filters, paragraphs
from jaxpt.data.prepare.judge import NEAR, PARAGRAPHS
from jaxpt.data.prepare.rows import DocumentTable

SPLITS = ("train", "heldout")


def decide_drops(table: DocumentTable, rules: Sequence[filters.Rule]) -> Drops:
    """Decide which rule drops each document.

    A rule that compares documents sees those that all rules before it kept; the first of equals
    stays.
    """
    failed = table.read_all("failed")
    dropped_by = failed.copy()
    original = np.full(len(failed), -1)
    repeated = None
    for k, rule in enumerate(rules):
        is_alive = dropped_by > k
        if rule.name == PARAGRAPHS:
            read_marks = functools.partial(read_paragraph_marks, table, k, is_alive)
            repeated = paragraphs.find_repeated_paragraphs(read_marks, len(failed))
            dropped_by[repeated.empty] = k
            original[repeated.empty] = repeated.original
        elif rule.mark:
            if rule.name == NEAR:
                paths = [judged.with_suffix("") for judged in table.judged]
                is_candidate = dropped_by[failed > k] > k
                first = dedup.find_near_duplicates(paths, is_candidate)
            else:
                parts = []
                for rows, _, mark in table.iterate_files(f"{k}.mark"):
                    part = mark[is_alive[rows]]
                    parts.append(part)
                marks = np.concatenate(parts)
                first = dedup.find_exact_duplicates(marks)
            alive = np.flatnonzero(is_alive)
            is_repeat = first != np.arange(len(alive))
            repeats = alive[is_repeat]
            dropped_by[repeats] = k
            original[repeats] = alive[first[is_repeat]]
    return Drops(dropped_by, original, repeated)


class Drops(NamedTuple):
    """Which documents are dropped.

    Attributes:
        dropped_by: [n] index of the rule, or the number of rules for those kept.
        original: [n] the row that a duplicate repeats, or -1.
        repeated: the paragraphs that go out of others.
    """

    dropped_by: np.ndarray
    original: np.ndarray
    repeated: paragraphs.RepeatedParagraphs | None


def read_paragraph_marks(
    table: DocumentTable, k: int, is_alive: np.ndarray
) -> Iterator[paragraphs.MarkedDocuments]:
    """Yield what `paragraphs.find_repeated_paragraphs` reads, of rule k and the rows so far.

    What has a prompt is left as it is.
    """
    dtype = paragraphs.MARK_DTYPE
    columns = table.iterate_files("new.prompt_chars", f"{k}.mark")
    for rows, _, prompt_chars, marks in columns:
        has_prompt = prompt_chars != 0
        mask = is_alive[rows] & ~has_prompt
        marks = marks.filter(pa.array(mask))
        lengths = pc.call_function("binary_length", [marks])
        counts = lengths.to_numpy() // dtype.itemsize
        joined = b"".join(marks.to_pylist())
        values = np.frombuffer(joined, dtype)
        marked_rows = rows.start + np.flatnonzero(mask)
        yield paragraphs.MarkedDocuments(marked_rows, counts, values)


def is_kept(
    dropped_by: np.ndarray, numbers: np.ndarray, split: str, n_rules: int, heldout: int
) -> np.ndarray:
    """Return which documents go to a split, [n] bool.

    The text alone decides, so that none changes its split as a corpus grows.
    """
    is_in_split = numbers < heldout
    if split == "train":
        is_in_split = ~is_in_split
    return is_in_split & (dropped_by == n_rules)
