"""Documents that hold a benchmark's words: those that share 13 words in a row with an item.

Source: GPT-3 (2005.14165, appendix C) took 13 words as the length that is hardly ever shared by chance.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from jaxpt.data.benchmarks import Item

NGRAM = 13


class Index:
    """The word 13-grams of benchmark items.

    n_short counts items of fewer than 13 words: they have no 13-gram, so no document can be caught with them.
    """

    def __init__(self, items: Sequence[Item]):
        self.items = items
        grams = [fingerprints(words(item.text)) for item in items]
        owners = np.repeat(np.arange(len(items)), [len(each) for each in grams])
        together = np.concatenate([*grams, np.empty(0, np.uint64)])
        order = np.argsort(together, kind="stable")
        self.grams, self.owners = together[order], owners[order]
        self.n_short = sum(not len(each) for each in grams)

    def hits(self, text: str) -> list[tuple[Item, str]]:
        """The items that the text overlaps, in their order, each with the first 13 words that they share."""
        found = words(text)
        grams = fingerprints(found)
        if not len(grams) or not len(self.grams):
            return []
        low = np.searchsorted(self.grams, grams, "left")
        at = np.flatnonzero(self.grams[np.minimum(low, len(self.grams) - 1)] == grams)
        first: dict[int, int] = {}
        for i in at:
            high = np.searchsorted(self.grams, grams[i], "right")
            for owner in self.owners[low[i] : high]:
                first.setdefault(int(owner), int(i))
        return [(self.items[owner], " ".join(found[i : i + NGRAM])) for owner, i in sorted(first.items())]

    def judge(self, texts: list[str]) -> list[str]:
        """A rule in the sense of filters.py: why each text must go, or ""."""
        reasons = []
        for text in texts:
            hits = self.hits(text)
            named = [f"{item.task} {item.id}: {shared!r}" for item, shared in hits[:3]]
            reasons.append("; ".join(named) + (f"; {len(hits) - 3} more" if len(hits) > 3 else ""))
        return reasons


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case: case, punctuation and line ends hide nothing."""
    return re.findall(r"\w+", text.lower())


def fingerprints(found: list[str]) -> np.ndarray:
    """[max(0, n - 12)] uint64, one for each 13 words in a row: a polynomial in the words' checksums, modulo 2^64."""
    if len(found) < NGRAM:
        return np.empty(0, np.uint64)
    codes = np.array([zlib.crc32(word.encode()) for word in found], np.uint64) + np.uint64(1)
    total = np.zeros(len(found) - NGRAM + 1, np.uint64)
    for k in range(NGRAM):
        total = total * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + len(total)]
    return total
