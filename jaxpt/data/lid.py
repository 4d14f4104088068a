"""Compute fastText's lid.176 for a batch of texts: the same labels and scores, to rounding, faster.

fastText looks up the character n-grams of a word wherever the word occurs. Here Arrow numbers the
distinct words of a batch, the vectors of each word are summed once, and the texts become one sparse
product: [texts, words] x [words, 16]. The sums of frequent words are kept.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759) and
"FastText.zip" (1612.03651) for the method; file format, n-gram hash and hierarchical softmax are
those of fastText 0.9.2, whose numbers are matched.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse

from jaxpt.data.fasttext_file import ModelReader

# words whose sums are kept, about 20 MB with their names; then the cache is cleared
MAX_CACHED_WORDS = 2**18
NO_NGRAM = np.uint16(2**16 - 1)  # instead of the row of an n-gram that the model does not have
END_OF_SENTENCE = "</s> "  # what fastText reads at the end of a line
FNV_OFFSET, FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)
BATCH_CHARS = 2**21  # of text at once
SPACES = b"\0\t\n\v\f\r"  # end a word, like " "

# (word of the first character, word of the last one, hash) of n-grams of one length
Ngrams = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


class Predictions(NamedTuple):
    """The likeliest label of each text, its score, and its lead over the next label."""

    labels: list[str]
    scores: np.ndarray
    leads: np.ndarray


class NgramSums(NamedTuple):
    """The sum of the rows of each word's n-grams, [n, dim] float32, and their number, [n]."""

    sums: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """Words, labels and n-grams of a model.

    Attributes:
        words: byte strings, with a space behind each.
        labels: ISO codes.
        label_counts: occurrences in training, which make the tree over the labels.
        ngram_rows: [n_buckets] uint16, the row of each n-gram hash, or NO_NGRAM.
    """

    words: list[bytes]
    labels: list[str]
    label_counts: list[int]
    ngram_rows: np.ndarray


def read_dictionary(reader: ModelReader, n_buckets: int) -> Dictionary:
    """Read the dictionary. Raise ValueError if its n-grams are not pruned."""
    n_entries, n_words, _, _, n_pruned = reader.read_fields("iiiqq")
    names = []
    counts = []
    for _ in range(n_entries):
        names.append(reader.read_name())
        count, _ = reader.read_fields("qb")
        counts.append(count)
    ngram_rows = np.full(n_buckets, NO_NGRAM)
    if not 0 <= n_pruned < NO_NGRAM:
        raise ValueError(f"expected fewer than {NO_NGRAM:,} n-grams, got {n_pruned:,}")
    pairs = reader.read_array("<i4", 2 * n_pruned).reshape(-1, 2)
    buckets, rows = pairs.T
    ngram_rows[buckets] = rows
    words = [name + b" " for name in names[:n_words]]
    labels = []
    for name in names[n_words:]:
        label = name.decode()
        labels.append(label.removeprefix("__label__"))
    return Dictionary(words, labels, counts[n_words:], ngram_rows)


class LidModel:
    """A quantized model of characters' n-grams with hierarchical softmax, as lid.176.ftz is."""

    def __init__(self, file: pathlib.Path):
        """Read the model. Raise ValueError for a file of another kind."""
        reader = ModelReader(file)
        header = reader.read_fields("14id")
        magic_and_version = header[:2]
        word_ngrams_loss_and_kind = header[7:10]
        n_buckets, self.shortest, self.longest = header[10:13]
        is_known = magic_and_version == (793712314, 12)
        is_known = is_known and word_ngrams_loss_and_kind == (1, 1, 3)
        if not is_known or self.shortest < 2:
            raise ValueError(
                f"{file}: expected a fastText 0.9 model of single words with hierarchical softmax"
            )
        dictionary = read_dictionary(reader, n_buckets)
        [is_quantized] = reader.read_fields("?")
        if not is_quantized:
            raise ValueError(f"{file}: expected a quantized fastText model")
        self.n_buckets = np.uint32(n_buckets)
        self.ngram_rows = dictionary.ngram_rows
        # a bit per bucket: small enough to stay in the core's cache
        self.has_ngram = np.packbits(self.ngram_rows != NO_NGRAM, bitorder="little")
        self.rows = reader.read_quantized_matrix()
        reader.read_fields("?")
        n_nodes, width = reader.read_fields("qq")
        nodes = reader.read_array("<f4", n_nodes * width).reshape(n_nodes, width)
        self.labels = dictionary.labels
        self.nodes = nodes[: len(self.labels) - 1]
        self.n_words = len(dictionary.words)
        words = pa.array(dictionary.words, pa.large_binary())
        self.vocabulary = words.cast(pa.large_string())
        self.paths = build_huffman_paths(dictionary.label_counts)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Keep only the model's own words, which alone have a row besides their n-grams'."""
        nothing = pa.array([" "], pa.large_string())  # between two spaces there is no word
        self.known = pa.concat_arrays([self.vocabulary, nothing])
        sums, counts = self.sum_ngrams(self.vocabulary)
        sums += self.rows[: self.n_words]
        counts += 1
        end = self.vocabulary.index(END_OF_SENTENCE).as_py()
        sums[end] = self.rows[end]  # it has no n-grams
        counts[end] = 1
        padding = self.make_sums(1)
        self.sums = np.concatenate([sums, padding.sums])
        self.counts = np.concatenate([counts, padding.counts])

    def predict_languages(self, texts: Sequence[str]) -> Predictions:
        """Return the likeliest label of each text.

        A text is one line: line ends are spaces, and the end of the text is a word.
        """
        batches = [Predictions([], np.empty(0), np.empty(0))]
        first = n_chars = 0
        for stop, text in enumerate(texts, 1):
            n_chars += len(text)
            if n_chars >= BATCH_CHARS or stop == len(texts):
                predicted = self.predict_batch(texts[first:stop])
                batches.append(predicted)
                first = stop
                n_chars = 0
        labels, scores, leads = zip(*batches, strict=True)
        all_labels = list(itertools.chain(*labels))
        numbers = map(np.concatenate, (scores, leads))
        return Predictions(all_labels, *numbers)

    def predict_batch(self, texts: Sequence[str]) -> Predictions:
        """Return the same for texts that are computed together."""
        in_text = self.count_words(texts)
        n_rows = in_text @ self.counts
        sums = in_text @ self.sums
        hidden = sums / n_rows[:, None]
        # einsum and a sparse product: the threads of a BLAS would compete, with a process per core
        logits = np.einsum("td,nd->nt", hidden, self.nodes)
        with np.errstate(over="ignore"):  # of what is surely left
            right = 1 / (1 + np.exp(-logits))
        turns = np.concatenate([1 - right, right])
        turns = np.log(turns + np.float32(1e-5))  # fastText's own guard against log(0)
        path_scores = np.exp(self.paths @ turns)
        scores = np.minimum(path_scores, 1).T
        labels = [self.labels[i] for i in scores.argmax(1)]
        best_two = np.partition(scores, -2, 1)[:, -2:]
        second, first = best_two.T
        return Predictions(labels, first, first - second)

    def count_words(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
        """Return the occurrences of each word in each text, [texts, len(self.sums)]."""
        lines = [f"{text} {END_OF_SENTENCE}".encode() for text in texts]
        data = b"".join(lines)
        for space in SPACES:
            data = data.replace(bytes([space]), b" ")
        is_space = np.frombuffer(data, np.uint8) == ord(" ")
        spaces = np.flatnonzero(is_space)
        ends = np.append(0, spaces + 1)
        buffers = map(pa.py_buffer, (ends, data))
        words = pa.LargeStringArray.from_buffers(len(spaces), *buffers)
        encoded = words.dictionary_encode()
        word = encoded.indices.to_numpy()
        distinct = encoded.dictionary
        n_times = np.bincount(word, minlength=len(distinct))
        places = self.lookup_words(distinct, n_times > 1)
        columns = places.take(word)
        line_sizes = map(len, lines)
        line_ends = np.cumsum([0, *line_sizes])
        starts = np.searchsorted(ends, line_ends)
        ones = np.ones(len(columns), np.float32)
        shape = (len(texts), len(self.sums))
        return scipy.sparse.csr_matrix((ones, columns, starts), shape)

    def lookup_words(self, words: pa.Array, is_frequent: np.ndarray) -> np.ndarray:
        """Return where in self.sums and self.counts each word is, valid until the next call.

        Args:
            words: [n] distinct words.
            is_frequent: [n] bool, whether to keep the word for longer.

        Returns:
            [n] int32.
        """
        if len(self.known) > MAX_CACHED_WORDS:
            self.clear_cache()
        n_known = len(self.known)
        options = pc.SetLookupOptions(value_set=self.known)
        places = pc.call_function("index_in", [words], options)
        places = pc.fill_null(places, -1).to_numpy().copy()
        new = np.flatnonzero(places < 0)
        is_rare = ~is_frequent.take(new)
        frequent_first = np.argsort(is_rare, kind="stable")
        new = new[frequent_first]
        numbers = np.arange(len(new), dtype=np.int32)
        places[new] = n_known + numbers
        new_words = words.take(pa.array(new))
        sums, counts = self.sum_ngrams(new_words)
        known_sums = self.sums[:n_known]
        known_counts = self.counts[:n_known]
        self.sums = np.concatenate([known_sums, sums])
        self.counts = np.concatenate([known_counts, counts])
        n_kept = len(new) - int(is_rare.sum())
        self.known = pa.concat_arrays([self.known, new_words[:n_kept]])
        return places

    def make_sums(self, n: int) -> NgramSums:
        """Return zeros for n words."""
        _, width = self.rows.shape
        sums = np.zeros((n, width), np.float32)
        counts = np.zeros(n, np.float32)
        return NgramSums(sums, counts)

    def sum_ngrams(self, words: pa.Array) -> NgramSums:
        """Sum the rows of each word's n-grams."""
        total = self.make_sums(len(words))
        is_ascii = pc.call_function("string_is_ascii", [words])
        is_other = pc.call_function("invert", [is_ascii])
        kinds = [(is_ascii, self.hash_byte_ngrams), (is_other, self.hash_char_ngrams)]
        for chosen, hash_ngrams in kinds:
            mask = chosen.to_numpy(zero_copy_only=False)
            chosen_words = words.filter(chosen)
            data, word = spell_words(chosen_words)
            ngrams = hash_ngrams(data, word)
            part = self.sum_rows(ngrams, len(chosen_words))
            total.sums[mask] = part.sums
            total.counts[mask] = part.counts
        return total

    def sum_rows(self, ngrams: Ngrams, n: int) -> NgramSums:
        """Sum the rows of those n-grams that lie in one of n words."""
        sums, counts = self.make_sums(n)
        shape = (n, len(self.rows))
        for first, last, hashes in ngrams:
            # the remainder by hand, which numpy finds more slowly
            buckets = hashes // self.n_buckets
            buckets *= self.n_buckets
            np.subtract(hashes, buckets, out=buckets)
            bits = self.has_ngram.take(buckets >> np.uint32(3))
            place = buckets & np.uint32(7)
            bits >>= place.astype(np.uint8)
            bits &= np.uint8(1)
            is_known = bits.view(bool) & (first == last)
            known = np.flatnonzero(is_known)
            word = first.take(known)
            known_buckets = buckets.take(known)
            rows = self.ngram_rows.take(known_buckets)
            rows = rows.astype(np.int32) + self.n_words
            ones = np.ones(len(word), np.float32)
            occurrences = scipy.sparse.coo_matrix((ones, (word, rows)), shape)
            sums += occurrences @ self.rows
            counts += np.bincount(word, minlength=n)
        return NgramSums(sums, counts)

    def hash_byte_ngrams(self, data: np.ndarray, word: np.ndarray) -> Ngrams:
        """Yield the n-grams of words in which each character is a byte."""
        hashes = np.full(len(data), FNV_OFFSET, np.uint32)
        longest = min(self.longest, len(data))
        for n_before in range(longest):
            hashes = hashes[: len(data) - n_before] ^ data[n_before:]
            hashes *= FNV_PRIME
            if n_before + 1 >= self.shortest:
                yield word[: len(hashes)], word[n_before:], hashes

    def hash_char_ngrams(self, data: np.ndarray, word: np.ndarray) -> Ngrams:
        """Yield the n-grams of words in which a character is one to four bytes."""
        high_bits = data & 0xC0
        starts = np.flatnonzero(high_bits != 0x80)
        sizes = np.diff(starts, append=len(data))
        word = word.take(starts)
        padded = np.append(data, [0] * 3)
        signed = padded.astype(np.int8).astype(np.uint32)  # fastText hashes signed bytes
        char_bytes = []
        for k in range(sizes.max(initial=0)):
            byte = signed.take(starts + k)
            exists = sizes > k
            char_bytes.append((byte, exists))
        hashes = np.full(len(starts), FNV_OFFSET, np.uint32)
        longest = min(self.longest, len(starts))
        for n_before in range(longest):
            hashes = hashes[: len(starts) - n_before].copy()
            for byte, exists in char_bytes:  # of the character that is added
                longer = hashes ^ byte[n_before:]
                longer *= FNV_PRIME
                np.copyto(hashes, longer, where=exists[n_before:])
            if n_before + 1 >= self.shortest:
                yield word[: len(hashes)], word[n_before:], hashes


def spell_words(words: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of words between < and >, and the number of the word of each byte."""
    text = pa.large_string()
    begin = pa.scalar("<", text)
    nothing = pa.scalar("", text)
    spelled = pc.call_function("binary_join_element_wise", [begin, words, nothing])
    _, offset_buffer, data_buffer = spelled.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)
    sizes = np.diff(offsets[: len(words) + 1])
    numbers = np.arange(len(words), dtype=np.int32)
    word = np.repeat(numbers, sizes)
    data = np.frombuffer(data_buffer, np.uint8)[: len(word)]
    end = np.uint8(ord(">"))
    is_space = data == ord(" ")
    return np.where(is_space, end, data), word


def build_huffman_paths(counts: Sequence[int]) -> scipy.sparse.csr_matrix:
    """Return fastText's tree over the labels, [labels, 2 x inner nodes].

    A row is 1 where the label's path turns left (first half) or right (second half) at a node.
    """
    n = len(counts)
    n_inner = n - 1
    n_nodes = n + n_inner
    weight = [*counts, *[10**15] * n_inner]
    parent = [-1] * n_nodes
    is_right = [False] * n_nodes
    leaf = n - 1
    node = n
    for i in range(n, n_nodes):
        smallest = []
        for _ in range(2):
            if leaf >= 0 and weight[leaf] < weight[node]:
                smallest.append(leaf)
                leaf -= 1
            else:
                smallest.append(node)
                node += 1
        left, right = smallest
        weight[i] = weight[left] + weight[right]
        parent[left] = parent[right] = i
        is_right[right] = True
    paths = np.zeros((n, 2 * n_inner), np.float32)
    for label in range(n):
        at = label
        while parent[at] >= 0:
            column = parent[at] - n
            if is_right[at]:
                column += n_inner
            paths[label, column] = 1
            at = parent[at]
    return scipy.sparse.csr_matrix(paths)
