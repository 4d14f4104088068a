"""Documents that hold a benchmark's words: those that share 13 words in a row (or as many as asked) with an item.

Source: GPT-3 (2005.14165, appendix C) took 13 words as the length that is hardly ever shared by chance.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from jaxpt.data.benchmarks import BenchmarkItem

DEFAULT_NGRAM = 13


class NgramIndex:
    """The word n-grams of benchmark items.

    n_short counts items of fewer than n words: they have no n-gram, so no document can be caught with them.
    """

    def __init__(self, items: Sequence[BenchmarkItem], n: int = DEFAULT_NGRAM):
        self.items, self.n = items, n
        grams = [hash_ngrams(normalize_words(item.text), n) for item in items]
        owners = np.repeat(np.arange(len(items)), [len(each) for each in grams])
        together = np.concatenate([*grams, np.empty(0, np.uint64)])
        order = np.argsort(together, kind="stable")
        self.grams, self.owners = together[order], owners[order]
        self.bits = np.zeros(
            1 << 24, bool
        )  # by an n-gram's first 24 bits: whether an item has one like it
        self.bits[self.grams >> np.uint64(40)] = True
        self.n_short = sum(not len(each) for each in grams)

    def find_matches(self, text: str) -> list[tuple[BenchmarkItem, str]]:
        """The items that the text overlaps, in their order, each with the first n words in a row that they share."""
        found = normalize_words(text)
        grams = hash_ngrams(found, self.n)
        if not len(grams) or not len(self.grams):
            return []
        at = np.flatnonzero(
            self.bits[grams >> np.uint64(40)]
        )  # nearly none of a document's n-grams
        low = np.searchsorted(self.grams, grams[at], "left")
        first: dict[int, int] = {}
        for i, start in zip(at, low, strict=True):
            for owner in self.owners[start : np.searchsorted(self.grams, grams[i], "right")]:
                first.setdefault(int(owner), int(i))
        return [
            (self.items[owner], " ".join(found[i : i + self.n]))
            for owner, i in sorted(first.items())
        ]

    def find_contaminated(self, texts: list[str]) -> list[str]:
        """A rule in the sense of filters.py: why each text must go, or ""."""
        reasons = []
        for text in texts:
            hits = self.find_matches(text)
            named = [f"{item.task} {item.id}: {shared!r}" for item, shared in hits[:3]]
            reasons.append("; ".join(named) + (f"; {len(hits) - 3} more" if len(hits) > 3 else ""))
        return reasons


def normalize_words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: case, punctuation and line ends hide nothing."""
    return re.findall(r"\w+", text.lower())


def hash_ngrams(found: list[str], n: int) -> np.ndarray:
    """[max(0, n_words - n + 1)] uint64, one for each n words in a row: a polynomial in the words' checksums, modulo 2^64."""
    if len(found) < n:
        return np.empty(0, np.uint64)
    codes = np.array([zlib.crc32(word.encode()) for word in found], np.uint64) + np.uint64(1)
    total = np.zeros(len(found) - n + 1, np.uint64)
    for k in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + len(total)]
    return total
