"""Find documents that contain a benchmark's words: those that share a word n-gram with an item.

Source: GPT-3 (2005.14165, appendix C) took 13 words as the length that is hardly ever shared by
chance.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

from jaxpt.data.benchmarks import BenchmarkItem

DEFAULT_NGRAM = 13
MAX_NAMED = 3  # items named in the reason for a drop
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class NgramIndex:
    """The word n-grams of benchmark items.

    n_short counts items of fewer than n words: they have no n-gram, so no document can match them.
    """

    def __init__(self, items: Sequence[BenchmarkItem], n: int = DEFAULT_NGRAM):
        """Hash and sort the n-grams of the items."""
        self.items = items
        self.n = n
        item_words = [normalize_words(item.text) for item in items]
        hashes = [hash_ngrams(words, n) for words in item_words]
        counts = [len(part) for part in hashes]
        self.n_short = counts.count(0)
        numbers = np.arange(len(items))
        owners = np.repeat(numbers, counts)
        joined = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.argsort(joined, kind="stable")
        self.hashes = joined[order]
        self.owners = owners[order]
        self.prefixes = np.zeros(2**24, bool)  # whether an item has an n-gram of this prefix
        self.prefixes[compute_prefix(self.hashes)] = True

    def find_matches(self, text: str) -> list[tuple[BenchmarkItem, str]]:
        """Return the items that the text overlaps, in order, each with the first shared n-gram."""
        words = normalize_words(text)
        hashes = hash_ngrams(words, self.n)
        if not len(hashes) or not len(self.hashes):
            return []
        # this leaves out nearly all of a document's n-grams
        is_candidate = self.prefixes[compute_prefix(hashes)]
        candidates = np.flatnonzero(is_candidate)
        hashes = hashes[candidates]
        starts = np.searchsorted(self.hashes, hashes, "left")
        stops = np.searchsorted(self.hashes, hashes, "right")
        first: dict[int, int] = {}
        for i, start, stop in zip(candidates.tolist(), starts, stops, strict=True):
            owners = self.owners[start:stop]
            for owner in owners.tolist():
                first.setdefault(owner, i)
        matches = []
        for owner, i in sorted(first.items()):
            shared = " ".join(words[i : i + self.n])
            matches.append((self.items[owner], shared))
        return matches

    def find_contaminated(self, texts: Sequence[str]) -> list[str]:
        """Return why each text must be dropped, or "". It is a rule (filters.py)."""
        matches = map(self.find_matches, texts)
        return list(map(describe_matches, matches))


def describe_matches(matches: list[tuple[BenchmarkItem, str]]) -> str:
    """Return the first matches as one line."""
    named = []
    for item, shared in matches[:MAX_NAMED]:
        named.append(f"{item.task} {item.id}: {shared!r}")
    n_more = len(matches) - MAX_NAMED
    if n_more > 0:
        named.append(f"{n_more} more")
    return "; ".join(named)


def normalize_words(text: str) -> list[str]:
    """Return the runs of letters and digits in lower case.

    Case, punctuation, line ends, compatibility forms (full-width digits, ligatures), decomposed
    accents and characters that only format (soft hyphens, joiners) hide nothing.
    """
    if not text.isascii():
        formats = [ord(char) for char in set(text) if unicodedata.category(char) == "Cf"]
        text = unicodedata.normalize("NFKC", text.translate(dict.fromkeys(formats)))
    return re.findall(r"\w+", text.lower())


def hash_ngrams(words: list[str], n: int) -> np.ndarray:
    """Return a hash of each n-gram, [max(0, n_words - n + 1)] uint64.

    It is a polynomial in the words' checksums, modulo 2^64.
    """
    if len(words) < n:
        return np.empty(0, np.uint64)
    checksums = [zlib.crc32(word.encode()) for word in words]
    codes = np.array(checksums, np.uint64)
    codes += np.uint64(1)
    n_ngrams = len(words) - n + 1
    hashes = np.zeros(n_ngrams, np.uint64)
    for k in range(n):
        hashes *= MULTIPLIER
        hashes += codes[k : k + n_ngrams]
    return hashes


def compute_prefix(hashes: np.ndarray) -> np.ndarray:
    """Return the first 24 bits of each hash."""
    return hashes >> np.uint64(40)
