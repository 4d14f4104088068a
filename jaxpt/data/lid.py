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

KEPT_WORDS = 2**18  # of which the sums are kept, about 20 MB with their names; then it begins again
NONE = np.uint16(2**16 - 1)  # in place of the row of an n-gram that the model does not have
END = "</s>"  # what fastText reads at the end of a line
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
        self.n_buckets = np.uint32(self.n_buckets)
        self.pruned = np.full(self.n_buckets, NONE, np.uint16)
        if n_pruned > 0:
            pairs = array("<i4", 2 * n_pruned).reshape(-1, 2)
            self.pruned[pairs[:, 0]] = pairs[:, 1]
        quantized = take("?")
        if (magic, version, word_ngrams, loss, kind, quantized) != (793712314, 12, 1, 1, 3, True) or not 0 <= n_pruned < NONE or self.shortest < 2:
            raise ValueError(f"{file}: not a quantized fastText 0.9 model of single words with hierarchical softmax")
        self.rows = dequantized(take, array)
        take("?")
        n_nodes, width = take("qq")
        self.nodes = array("<f4", n_nodes * width).reshape(n_nodes, width)[: n_labels - 1]
        self.vocabulary = pa.array([name for name, _, _ in entries[: self.n_words]], pa.large_binary()).cast(pa.large_string())
        self.labels = [name.decode().removeprefix("__label__") for name, _, _ in entries[self.n_words :]]
        self.paths = huffman([count for _, count, _ in entries[self.n_words :]])
        self.forget()

    def forget(self) -> None:
        """Begin anew with nothing between two spaces, which is no word, and the end of the line, which is one without n-grams."""
        self.known = pa.array(["", END], pa.large_string())
        self.sums = np.stack([np.zeros_like(self.rows[0]), self.rows[self.vocabulary.index(END).as_py()]])
        self.counts = np.array([0, 1], np.float32)

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
        lines = [f"{text} {END}".replace("\0", " ").encode() for text in texts]
        ends = np.cumsum([0, *map(len, lines)])
        split = pc.ascii_split_whitespace(pa.LargeStringArray.from_buffers(len(lines), pa.py_buffer(ends), pa.py_buffer(b"".join(lines))))
        words = split.flatten().dictionary_encode()
        where = words.indices.to_numpy()
        sums, counts = self.looked_up(words.dictionary, np.bincount(where, minlength=len(words.dictionary)) > 1)
        stand_in = scipy.sparse.csr_matrix((np.ones(len(where), np.float32), where, split.offsets.to_numpy()), (len(texts), len(sums)))
        hidden = stand_in @ sums / (stand_in @ counts)[:, None]
        # einsum and a sparse product: the threads of a BLAS would stand in each other's way, with a process on each core
        with np.errstate(over="ignore"):  # of what is surely left
            right = 1 / (1 + np.exp(-np.einsum("td,nd->nt", hidden, self.nodes)))
        turns = np.log(np.concatenate([1 - right, right]) + np.float32(1e-5))  # fastText's own guard against log(0)
        scores = np.minimum(np.exp(self.paths @ turns), 1).T
        best = scores.argmax(1)
        second, first = np.partition(scores, -2, 1)[:, -2:].T
        return [self.labels[i] for i in best], first, first - second

    def looked_up(self, words: pa.Array, often: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sum of the rows of each distinct word [n, dim], how many they are [n]); those that come often are kept for later."""
        if len(self.known) > KEPT_WORDS:
            self.forget()
        at = pc.fill_null(pc.index_in(words, self.known), -1).to_numpy()
        fresh, sums, counts = at < 0, self.sums[at], self.counts[at]
        n_new, n_rows = fresh.sum(), 0
        new = np.zeros((n_new, self.rows.shape[1]), np.float32)
        for of, rows in self.pieces(words.filter(pa.array(fresh))):
            starts = np.zeros(n_new + 1, np.int32)
            np.cumsum(np.bincount(of, minlength=n_new), out=starts[1:])
            new += scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), rows, starts), (n_new, len(self.rows))) @ self.rows
            n_rows += np.diff(starts)
        sums[fresh], counts[fresh] = new, n_rows
        keep = fresh & often
        self.known = pa.concat_arrays([self.known, words.filter(pa.array(keep))])
        self.sums, self.counts = np.concatenate([self.sums, sums[keep]]), np.concatenate([self.counts, counts[keep]])
        return sums, counts

    def pieces(self, words: pa.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(word number, row) of each row of the model that belongs to one of the words, in some parts, by word number: its own, and its n-grams'."""
        own = pc.fill_null(pc.index_in(words, self.vocabulary), -1).to_numpy()
        yield np.flatnonzero(own >= 0), own[own >= 0]
        begin, end, nothing = (pa.scalar(mark, pa.large_string()) for mark in ("<", ">", ""))
        simple = pc.string_is_ascii(words)
        for chosen, ngrams in ((simple, self.ngrams_of_bytes), (pc.invert(simple), self.ngrams_of_characters)):
            spelled = pc.binary_join_element_wise(begin, words.filter(chosen), end, nothing)
            offsets, data = (np.frombuffer(buffer, dtype) for buffer, dtype in zip(spelled.buffers()[1:], (np.int64, np.uint8), strict=True))
            lengths = np.diff(offsets[: len(spelled) + 1])
            word_of = np.repeat(np.flatnonzero(chosen.to_numpy(zero_copy_only=False)).astype(np.int32), lengths)
            for first, last, hashes in ngrams(data[: len(word_of)], word_of):
                rows = self.pruned[hashes - hashes // self.n_buckets * self.n_buckets]  # the remainder, which numpy finds more slowly
                found = np.flatnonzero((rows != NONE) & (first == last))
                yield first[found], rows[found].astype(np.int32) + self.n_words

    def ngrams_of_bytes(self, data: np.ndarray, word_of: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(word number of its first character, of its last, hash) of each n-gram, where each character is a byte."""
        hashes = np.full(len(data), FNV_START, np.uint32)
        for n in range(1, min(self.longest, len(data)) + 1):
            hashes = (hashes[: len(data) - n + 1] ^ data[n - 1 :]) * FNV_PRIME
            if n >= self.shortest:
                yield word_of[: len(hashes)], word_of[n - 1 :], hashes

    def ngrams_of_characters(self, data: np.ndarray, word_of: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The same where a character is one to four bytes."""
        begins = np.flatnonzero((data & 0xC0) != 0x80)
        sizes = np.diff(begins, append=len(data))
        signed = data.astype(np.int8).astype(np.int32).view(np.uint32)  # fastText hashes signed bytes
        hashes, of = np.full(len(begins), FNV_START, np.uint32), word_of[begins]
        for n in range(1, min(self.longest, len(begins)) + 1):
            hashes, last, wide = hashes[: len(begins) - n + 1], begins[n - 1 :], sizes[n - 1 :]
            hashes = (hashes ^ signed[last]) * FNV_PRIME
            for offset in range(1, 4):  # further bytes of the character that is added
                more = np.flatnonzero(wide > offset)
                hashes[more] = (hashes[more] ^ signed[last[more] + offset]) * FNV_PRIME
            if n >= self.shortest:
                yield of[: len(hashes)], of[n - 1 :], hashes


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


def huffman(counts: Sequence[int]) -> scipy.sparse.csr_matrix:
    """fastText's tree over the labels: [labels, 2 x inner nodes], 1 where a label's path turns left (first half) or right at a node."""
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
    paths = np.zeros((n, 2 * (n - 1)), np.float32)
    for label in range(n):
        at = label
        while parent[at] >= 0:
            paths[label, parent[at] - n + (n - 1) * is_right[at]] = 1
            at = parent[at]
    return scipy.sparse.csr_matrix(paths)
