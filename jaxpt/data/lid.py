"""fastText's lid.176, computed a batch of texts at a time.

The same label and score, to rounding, in a fraction of the time.

fastText looks up each word's character n-grams anew wherever the word stands. Here Arrow numbers
the distinct words of a batch, the
vectors of each are summed once, and the texts become one sparse product: [texts, words] x [words,
16]. Of words that come often the sums are kept.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759) and
"FastText.zip" (1612.03651), for the method; the
file format, the n-gram hash and the hierarchical softmax are those of fastText 0.9.2, whose numbers
are matched.
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

MAX_CACHED_WORDS = (
    2**18
)  # of which the sums are kept, about 20 MB with their names; then it begins again
NO_NGRAM = np.uint16(2**16 - 1)  # in place of the row of an n-gram that the model does not have
END_OF_SENTENCE = "</s> "  # what fastText reads at the end of a line
FNV_OFFSET, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
BATCH_CHARS = 2**21  # of text at once


class LidModel:
    """A quantized supervised model with hierarchical softmax and n-grams of characters, as
    lid.176.ftz is. Raises ValueError for another.
    """

    def __init__(self, file: pathlib.Path):
        stream = io.BytesIO(file.read_bytes())

        def take(form: str):
            found = struct.unpack("<" + form, stream.read(struct.calcsize("<" + form)))
            return found if len(found) > 1 else found[0]

        def array(dtype: str, n: int) -> np.ndarray:
            return np.frombuffer(stream.read(n * np.dtype(dtype).itemsize), dtype)

        (
            magic,
            version,
            _,
            _,
            _,
            _,
            _,
            word_ngrams,
            loss,
            kind,
            self.n_buckets,
            self.shortest,
            self.longest,
            _,
            _,
        ) = take("14id")
        n_entries, self.n_words, n_labels, _, n_pruned = take("iiiqq")
        entries = []
        for _ in range(n_entries):
            name = b""
            while (byte := stream.read(1)) != b"\0":
                name += byte
            entries.append((name, *take("qb")))
        self.n_buckets = np.uint32(self.n_buckets)
        self.pruned = np.full(self.n_buckets, NO_NGRAM)
        if n_pruned > 0:
            pairs = array("<i4", 2 * n_pruned).reshape(-1, 2)
            self.pruned[pairs[:, 0]] = pairs[:, 1]
        self.there = np.packbits(
            self.pruned != NO_NGRAM, bitorder="little"
        )  # small enough to stay near the core
        quantized = take("?")
        if (
            (magic, version, word_ngrams, loss, kind, quantized) != (793712314, 12, 1, 1, 3, True)
            or not 0 <= n_pruned < NO_NGRAM
            or self.shortest < 2
        ):
            raise ValueError(
                f"{file}: not a quantized fastText 0.9 model of single words "
                "with hierarchical softmax"
            )
        self.rows = dequantize(take, array)
        take("?")
        n_nodes, width = take("qq")
        self.nodes = array("<f4", n_nodes * width).reshape(n_nodes, width)[: n_labels - 1]
        self.vocabulary = pa.array(
            [name + b" " for name, _, _ in entries[: self.n_words]], pa.large_binary()
        ).cast(pa.large_string())
        self.labels = [
            name.decode().removeprefix("__label__") for name, _, _ in entries[self.n_words :]
        ]
        self.paths = build_huffman_paths([count for _, count, _ in entries[self.n_words :]])
        self.clear_cache()

    def clear_cache(self) -> None:
        """Begin anew with the model's own words, the only ones that have a row besides those of
        their n-grams.
        """
        self.known = pa.concat_arrays(
            [self.vocabulary, pa.array([" "], pa.large_string())]
        )  # between two spaces stands no word
        self.sums, self.counts = (
            np.zeros((len(self.known), self.rows.shape[1]), np.float32),
            np.zeros(len(self.known), np.float32),
        )
        sums, counts = self.sum_ngrams(self.vocabulary)
        self.sums[: self.n_words], self.counts[: self.n_words] = (
            sums + self.rows[: self.n_words],
            counts + 1,
        )
        end = self.vocabulary.index(END_OF_SENTENCE).as_py()
        self.sums[end], self.counts[end] = (
            self.rows[end],
            1,
        )  # what fastText reads at the end of a line, without n-grams

    def predict_languages(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(likeliest label, its score, its lead over the next) of each text as one line, [n] each.

        Line ends are spaces, a text's end is a word.
        """
        found, first, n_chars = [([], np.empty(0), np.empty(0))], 0, 0
        for i, text in enumerate(texts):
            n_chars += len(text)
            if n_chars >= BATCH_CHARS or i + 1 == len(texts):
                found.append(self.predict_batch(texts[first : i + 1]))
                first, n_chars = i + 1, 0
        labels, scores, leads = zip(*found, strict=True)
        return list(itertools.chain(*labels)), np.concatenate(scores), np.concatenate(leads)

    def predict_batch(self, texts: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Identify a batch of texts."""
        lines = [f"{text} {END_OF_SENTENCE}".encode() for text in texts]
        data = b"".join(lines)
        for mark in b"\0\t\n\v\f\r":
            data = data.replace(bytes([mark]), b" ")
        ends = np.append(0, np.flatnonzero(np.frombuffer(data, np.uint8) == ord(" ")) + 1)
        words = pa.LargeStringArray.from_buffers(
            len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(data)
        ).dictionary_encode()
        where, starts = (
            words.indices.to_numpy(),
            np.searchsorted(ends, np.cumsum([0, *map(len, lines)])),
        )
        at = self.lookup_words(
            words.dictionary, np.bincount(where, minlength=len(words.dictionary)) > 1
        ).take(where)
        stand_in = scipy.sparse.csr_matrix(
            (np.ones(len(at), np.float32), at, starts), (len(texts), len(self.sums))
        )
        hidden = stand_in @ self.sums / (stand_in @ self.counts)[:, None]
        # einsum and a sparse product: the threads of a BLAS would stand in each other's way, with a
        # process on each core
        with np.errstate(over="ignore"):  # of what is surely left
            right = 1 / (1 + np.exp(-np.einsum("td,nd->nt", hidden, self.nodes)))
        turns = np.log(
            np.concatenate([1 - right, right]) + np.float32(1e-5)
        )  # fastText's own guard against log(0)
        scores = np.minimum(np.exp(self.paths @ turns), 1).T
        best = scores.argmax(1)
        second, first = np.partition(scores, -2, 1)[:, -2:].T
        return [self.labels[i] for i in best], first, first - second

    def lookup_words(self, words: pa.Array, often: np.ndarray) -> np.ndarray:
        """[n] int32: where in self.sums and self.counts each of the distinct words is until the
        next call; those that come often are kept for longer.
        """
        if len(self.known) > MAX_CACHED_WORDS:
            self.clear_cache()
        n_known = len(self.known)
        at = pc.fill_null(pc.index_in(words, self.known), -1).to_numpy().copy()
        new = np.flatnonzero(at < 0)
        new = new[np.argsort(~often.take(new), kind="stable")]
        at[new] = np.arange(n_known, n_known + len(new), dtype=np.int32)
        fresh = words.take(pa.array(new))
        sums, counts = self.sum_ngrams(fresh)
        self.sums, self.counts = (
            np.concatenate([self.sums[:n_known], sums]),
            np.concatenate([self.counts[:n_known], counts]),
        )
        self.known = pa.concat_arrays([self.known, fresh[: int(often.take(new).sum())]])
        return at

    def sum_ngrams(self, words: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(the sum of the rows of each word's n-grams [n, dim], how many they are [n])."""
        sums, counts = (
            np.empty((len(words), self.rows.shape[1]), np.float32),
            np.empty(len(words), np.float32),
        )
        begin, nothing = (pa.scalar(mark, pa.large_string()) for mark in ("<", ""))
        simple = pc.string_is_ascii(words)
        for chosen, ngrams in (
            (simple, self.hash_byte_ngrams),
            (pc.invert(simple), self.hash_character_ngrams),
        ):
            spelled = pc.binary_join_element_wise(begin, words.filter(chosen), nothing)
            offsets, data = (
                np.frombuffer(buffer, dtype)
                for buffer, dtype in zip(spelled.buffers()[1:], (np.int64, np.uint8), strict=True)
            )
            n, shape = len(spelled), (len(spelled), len(self.rows))
            word_of = np.repeat(np.arange(n, dtype=np.int32), np.diff(offsets[: n + 1]))
            sum_here, count_here = (
                np.zeros((n, self.rows.shape[1]), np.float32),
                np.zeros(n, np.float32),
            )
            data = np.where(
                data[: len(word_of)] == ord(" "), np.uint8(ord(">")), data[: len(word_of)]
            )
            for first, last, hashes in ngrams(data, word_of):
                buckets = (
                    hashes // self.n_buckets
                )  # to the remainder, which numpy finds more slowly
                buckets *= self.n_buckets
                np.subtract(hashes, buckets, out=buckets)
                there = (
                    self.there.take(buckets >> np.uint32(3))
                    >> (buckets & np.uint32(7)).astype(np.uint8)
                ) & np.uint8(1)
                found = np.flatnonzero(there.view(bool) & (first == last))
                of, rows = (
                    first.take(found),
                    self.pruned.take(buckets.take(found)).astype(np.int32) + self.n_words,
                )
                sum_here += (
                    scipy.sparse.coo_matrix((np.ones(len(of), np.float32), (of, rows)), shape)
                    @ self.rows
                )
                count_here += np.bincount(of, minlength=n)
            mask = chosen.to_numpy(zero_copy_only=False)
            sums[mask], counts[mask] = sum_here, count_here
        return sums, counts

    def hash_byte_ngrams(
        self, data: np.ndarray, word_of: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(word number of its first character, of its last, hash) of each n-gram, where each
        character is a byte.
        """
        hashes = np.full(len(data), FNV_OFFSET, np.uint32)
        for n in range(1, min(self.longest, len(data)) + 1):
            hashes = hashes[: len(data) - n + 1] ^ data[n - 1 :]
            hashes *= FNV_PRIME
            if n >= self.shortest:
                yield word_of[: len(hashes)], word_of[n - 1 :], hashes

    def hash_character_ngrams(
        self, data: np.ndarray, word_of: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The same where a character is one to four bytes."""
        begins = np.flatnonzero((data & 0xC0) != 0x80)
        sizes, of = np.diff(begins, append=len(data)), word_of.take(begins)
        signed = (
            np.append(data, [0] * 3).astype(np.int8).astype(np.uint32)
        )  # fastText hashes signed bytes
        spelled = [(signed.take(begins + k), sizes > k) for k in range(sizes.max(initial=0))]
        hashes = np.full(len(begins), FNV_OFFSET, np.uint32)
        for n in range(1, min(self.longest, len(begins)) + 1):
            hashes = hashes[: len(begins) - n + 1].copy()
            for byte, there in spelled:  # of the character that is added
                np.copyto(hashes, (hashes ^ byte[n - 1 :]) * FNV_PRIME, where=there[n - 1 :])
            if n >= self.shortest:
                yield of[: len(hashes)], of[n - 1 :], hashes


def dequantize(take, array) -> np.ndarray:
    """The input matrix [rows, dim] of product-quantized rows."""
    has_norms, n_rows, _, n_codes = take("?qqi")
    codes = array("u1", n_codes).reshape(n_rows, -1)

    def codebook():
        dim, n_parts, width, last = take("4i")
        centroids = array("<f4", dim * 256)
        return [
            centroids[k * 256 * width :][: 256 * (last if k == n_parts - 1 else width)].reshape(
                256, -1
            )
            for k in range(n_parts)
        ]

    parts = codebook()
    rows = np.concatenate([part[codes[:, k]] for k, part in enumerate(parts)], 1)
    if has_norms:
        norms = array("u1", n_rows)
        rows = rows * codebook()[0][norms]
    return rows


def build_huffman_paths(counts: Sequence[int]) -> scipy.sparse.csr_matrix:
    """FastText's tree over the labels: [labels, 2 x inner nodes], 1 where a label's path turns left
    (first half) or right at a node.
    """
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
