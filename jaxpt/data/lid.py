"""fastText's lid.176, computed a batch of texts at a time: the same label and score, to rounding, in a fraction of the time.

fastText looks up each word's character n-grams anew wherever the word stands. Here a batch's words are counted by Arrow, each
distinct word's vectors are summed once and kept, and the texts become one sparse product: [texts, words] x [words, 16].

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759) and "FastText.zip" (1612.03651), for the method; the
file format, the n-gram hash and the hierarchical softmax are those of fastText 0.9.2, whose numbers are matched.
"""

from __future__ import annotations

import io
import itertools
import pathlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

KEPT_WORDS = 2**18  # of which the sums are kept, about 30 MB with their names; then it begins again
FNV_START, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
BATCH_CHARS = 2**21  # of text at once


class Model:
    """A quantized supervised model with hierarchical softmax and n-grams of characters, as lid.176.ftz is. Raises ValueError for another."""

    def __init__(self, file: pathlib.Path):
        stream = io.BytesIO(file.read_bytes())

        def take(form: str):
            found = struct.unpack("<" + form, stream.read(struct.calcsize("<" + form)))
            return found if len(found) > 1 else found[0]

        def array(dtype: str, n: int) -> np.ndarray:
            return np.frombuffer(stream.read(n * np.dtype(dtype).itemsize), dtype)

        magic, version, _, _, _, _, _, word_ngrams, loss, kind, self.n_buckets, self.shortest, self.longest, _, _ = take("14id")
        n_entries, self.n_words, n_labels, _, n_pruned = take("iiiqq")
        entries = []
        for _ in range(n_entries):
            name = b""
            while (byte := stream.read(1)) != b"\0":
                name += byte
            entries.append((name, *take("qb")))
        self.pruned = np.full(self.n_buckets, -1, np.int32)
        if n_pruned > 0:
            pairs = array("<i4", 2 * n_pruned).reshape(-1, 2)
            self.pruned[pairs[:, 0]] = pairs[:, 1]
        quantized = take("?")
        if (magic, version, word_ngrams, loss, kind, quantized) != (793712314, 12, 1, 1, 3, True) or n_pruned < 0 or self.shortest < 2:
            raise ValueError(f"{file}: not a quantized fastText 0.9 model of single words with hierarchical softmax")
        self.rows = dequantized(take, array)
        take("?")
        n_nodes, width = take("qq")
        self.nodes = array("<f4", n_nodes * width).reshape(n_nodes, width)[: n_labels - 1]
        self.word_ids = {name: i for i, (name, _, _) in enumerate(entries[: self.n_words])}
        self.labels = [name.decode().removeprefix("__label__") for name, _, _ in entries[self.n_words :]]
        self.paths = huffman([count for _, count, _ in entries[self.n_words :]])
        self.forget()

    def forget(self) -> None:
        self.known: dict[bytes, int] = {b"": 0}
        self.sums, self.counts = np.zeros((2**10, self.rows.shape[1]), np.float32), np.zeros(2**10, np.int32)

    def predict(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(likeliest label, its score, its lead over the next) of each text as one line, [n] each. Line ends are spaces, a text's end is a word."""
        found, first, n_chars = [([], np.empty(0), np.empty(0))], 0, 0
        for i, text in enumerate(texts):
            n_chars += len(text)
            if n_chars >= BATCH_CHARS or i + 1 == len(texts):
                found.append(self.batch(texts[first : i + 1]))
                first, n_chars = i + 1, 0
        labels, scores, leads = zip(*found, strict=True)
        return list(itertools.chain(*labels)), np.concatenate(scores), np.concatenate(leads)

    def batch(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        split = pc.ascii_split_whitespace(pa.array([text.replace("\0", " ") + " </s>" for text in texts], pa.large_string()))
        words = split.flatten().dictionary_encode()
        ids = self.ids(words.dictionary.cast(pa.large_binary()).to_pylist())[words.indices.to_numpy()]
        counted = scipy.sparse.csr_matrix((np.ones(len(ids), np.float32), ids, split.offsets.to_numpy()), (len(texts), len(self.known)))
        n_rows = counted @ self.counts[: len(self.known)].astype(np.float32)
        hidden = counted @ self.sums[: len(self.known)] / np.maximum(n_rows, 1)[:, None]
        right = 1 / (1 + np.exp(-(hidden @ self.nodes.T)))
        turns = np.log(np.concatenate([1 - right, right], 1) + 1e-5)  # fastText's own guard against log(0)
        scores = np.minimum(np.exp(turns @ self.paths), 1)
        best = scores.argmax(1)
        second, first = np.partition(scores, -2, 1)[:, -2:].T
        return [self.labels[i] for i in best], first, first - second

    def ids(self, words: list[bytes]) -> np.ndarray:
        """The rows of sums and counts that stand for the words."""
        if len(self.known) + len(words) > KEPT_WORDS:
            self.forget()
        found = np.fromiter(map(self.known.get, words, itertools.repeat(-1)), np.int32, len(words))
        new = np.flatnonzero(found < 0)
        start, stop = len(self.known), len(self.known) + len(new)
        found[new] = np.arange(start, stop)
        fresh = [words[i] for i in new.tolist()]
        self.known |= zip(fresh, range(start, stop), strict=True)
        while stop > len(self.counts):
            self.sums, self.counts = (np.concatenate([each, np.zeros_like(each)]) for each in (self.sums, self.counts))
        of, rows = self.pieces(fresh)
        counted = scipy.sparse.csr_matrix((np.ones(len(of), np.float32), (of, rows)), (len(fresh), len(self.rows)))
        self.sums[start:stop] = counted @ self.rows
        self.counts[start:stop] = np.bincount(of, minlength=len(fresh))
        return found

    def pieces(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(word number, row) of each row of the model that belongs to one of the words: its own, and those of its n-grams."""
        known = np.fromiter(map(self.word_ids.get, words, itertools.repeat(-1)), np.int32, len(words))
        found = [(np.flatnonzero(known >= 0), known[known >= 0])]
        simple = np.fromiter(map(bytes.isascii, words), bool, len(words))
        for chosen, ngrams in ((simple, self.ngrams_of_bytes), (~simple, self.ngrams_of_characters)):
            numbers = np.flatnonzero(chosen)
            spelled = [b"" if words[i] == b"</s>" else b"<%b>" % words[i] for i in numbers.tolist()]
            word_of = np.repeat(numbers, np.fromiter(map(len, spelled), np.int64, len(spelled)))
            for of, hashes in ngrams(np.frombuffer(b"".join(spelled), np.uint8), word_of):
                rows = self.pruned[hashes % np.uint32(self.n_buckets)]
                found.append((of[rows >= 0], rows[rows >= 0] + self.n_words))
        of, rows = zip(*found, strict=True)
        return np.concatenate(of), np.concatenate(rows)

    def ngrams_of_bytes(self, data: np.ndarray, word_of: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(word number, hash) of each n-gram, where each character is a byte."""
        hashes = np.full(len(data), FNV_START, np.uint32)
        for n in range(1, min(self.longest, len(data)) + 1):
            hashes = (hashes[: len(data) - n + 1] ^ data[n - 1 :]) * FNV_PRIME
            if n >= self.shortest:
                whole = word_of[: len(hashes)] == word_of[n - 1 :]
                yield word_of[: len(hashes)][whole], hashes[whole]

    def ngrams_of_characters(self, data: np.ndarray, word_of: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(word number, hash) of each n-gram, where a character is one to four bytes."""
        begins = np.flatnonzero((data & 0xC0) != 0x80)
        stops = np.append(begins[1:], len(data))
        signed = data.astype(np.int8).astype(np.int32).view(np.uint32)  # fastText hashes signed bytes
        hashes, place = np.full(len(begins), FNV_START, np.uint32), np.arange(len(begins))
        for n in range(1, self.longest + 1):
            place = place[place + n <= len(begins)]
            place = place[word_of[begins[place + n - 1]] == word_of[begins[place]]]
            for offset in range(4):  # bytes of the character that is added
                at = begins[place + n - 1] + offset
                more = at < stops[place + n - 1]
                hashes[place[more]] = (hashes[place[more]] ^ signed[at[more]]) * FNV_PRIME
            if n >= self.shortest:
                yield word_of[begins[place]], hashes[place]


def dequantized(take, array) -> np.ndarray:
    """The input matrix [rows, dim] of product-quantized rows."""
    has_norms, n_rows, _, n_codes = take("?qqi")
    codes = array("u1", n_codes).reshape(n_rows, -1)

    def codebook():
        dim, n_parts, width, last = take("4i")
        centroids = array("<f4", dim * 256)
        return [centroids[k * 256 * width :][: 256 * (last if k == n_parts - 1 else width)].reshape(256, -1) for k in range(n_parts)]

    parts = codebook()
    rows = np.concatenate([part[codes[:, k]] for k, part in enumerate(parts)], 1)
    if has_norms:
        norms = array("u1", n_rows)
        rows = rows * codebook()[0][norms]
    return rows


def huffman(counts: Sequence[int]) -> np.ndarray:
    """fastText's tree over the labels: [2 x inner nodes, labels], 1 where a label's path turns left (first half) or right at a node."""
    n = len(counts)
    weight = [*counts, *[10**15] * (n - 1)]
    parent, is_right = [-1] * (2 * n - 1), [False] * (2 * n - 1)
    leaf, node = n - 1, n
    for i in range(n, 2 * n - 1):
        least = []
        for _ in range(2):
            if leaf >= 0 and weight[leaf] < weight[node]:
                least.append(leaf)
                leaf -= 1
            else:
                least.append(node)
                node += 1
        weight[i] = weight[least[0]] + weight[least[1]]
        parent[least[0]] = parent[least[1]] = i
        is_right[least[1]] = True
    paths = np.zeros((2 * (n - 1), n), np.float32)
    for label in range(n):
        at = label
        while parent[at] >= 0:
            paths[parent[at] - n + (n - 1) * is_right[at], label] = 1
            at = parent[at]
    return paths
