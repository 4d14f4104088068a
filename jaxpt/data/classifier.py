"""Read, write and score with fastText classifiers of texts.

A text's features are its words, their character n-grams and runs of words, each a row of the
model; the mean of the rows decides.

Source: Joulin et al., "Bag of Tricks for Efficient Text Classification" (1607.01759); file format,
hashes and features are those of fastText 0.9.2, whose scores are matched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import struct
from collections.abc import Callable, Iterable

import numpy as np

from jaxpt.data.fasttext_file import ModelReader
from jaxpt.spec import UserError

MAGIC = (793712314, 12)  # and the version of the format
WORD, LABEL = 0, 1
SOFTMAX, SUPERVISED = 3, 3
END_OF_LINE = "</s>"
LABEL_PREFIX = "__label__"
MAX_CACHED_WORDS = 2**18


def hash_bytes(data: bytes) -> int:
    """Return fastText's FNV-1a hash of bytes, which it takes as signed."""
    value = 2166136261
    for byte in data:
        signed = byte if byte < 128 else byte + 0xFFFFFF00
        value = ((value ^ signed) * 16777619) & 0xFFFFFFFF
    return value


@dataclasses.dataclass(frozen=True)
class Features:
    """What turns a text into rows of a model.

    Attributes:
        words: word -> row.
        n_buckets: rows behind the words, for n-grams by their hash.
        word_ngrams: longest run of words that has a row.
        shortest: character n-gram; of words.
        longest: character n-gram; 0: words alone.
        kept: bucket -> row behind the words, of a pruned model; None: all are there.
    """

    words: dict[str, int]
    n_buckets: int
    word_ngrams: int
    shortest: int = 0
    longest: int = 0
    kept: dict[int, int] | None = None

    def list_rows(self, text: str) -> list[int]:
        """Return the row of each feature of a text, read as one line."""
        words = [word for word in split_words(text) if not word.startswith(LABEL_PREFIX)]
        words.append(END_OF_LINE)
        looked_up = list(map(self.look_up, words))
        rows = list(itertools.chain.from_iterable(own for own, _ in looked_up))
        if self.word_ngrams > 1:
            hashes = np.array([value for _, value in looked_up], np.uint32)
            signed = hashes.astype(np.int32).astype(np.int64).astype(np.uint64)
            rows += self.list_run_rows(signed)
        return rows

    def list_run_rows(self, hashes: np.ndarray) -> list[int]:
        """Return the rows of runs of 2 and more words.

        Args:
            hashes: [words] uint64.
        """
        rows = []
        runs = hashes
        for n in range(2, self.word_ngrams + 1):
            runs = runs[: len(hashes) - n + 1] * np.uint64(116049371) + hashes[n - 1 :]
            buckets = runs % np.uint64(self.n_buckets)
            rows += self.place(buckets.tolist())
        return rows

    def place(self, buckets: Iterable[int]) -> list[int]:
        """Return the rows of n-grams' buckets; those that were pruned have none."""
        n_words = len(self.words)
        if self.kept is None:
            return [n_words + bucket for bucket in buckets]
        return [n_words + self.kept[bucket] for bucket in buckets if bucket in self.kept]

    @functools.cached_property
    def look_up(self) -> Callable[[str], tuple[list[int], int]]:
        """A function, word -> (its rows, its hash), that remembers the words it was asked for."""
        return functools.lru_cache(MAX_CACHED_WORDS)(self.find_word)

    def find_word(self, word: str) -> tuple[list[int], int]:
        """Return the rows of a word and of its character n-grams, and its hash."""
        data = word.encode()
        row = self.words.get(word)
        rows = [] if row is None else [row]
        if self.longest and word != END_OF_LINE:
            rows += self.place(self.list_ngram_buckets(f"<{word}>"))
        return rows, hash_bytes(data)

    def list_ngram_buckets(self, word: str) -> list[int]:
        """Return the buckets of the character n-grams of <word>; "<" and ">" alone are none."""
        buckets = []
        for first in range(len(word)):
            for n in range(self.shortest, self.longest + 1):
                is_edge = n == 1 and first in (0, len(word) - 1)
                if first + n <= len(word) and n and not is_edge:
                    ngram = word[first : first + n].encode()
                    buckets.append(hash_bytes(ngram) % self.n_buckets)
        return buckets


def split_words(text: str) -> list[str]:
    """Return the words as fastText separates them: by ASCII white space and zero bytes."""
    for space in "\0\t\n\v\f\r":
        text = text.replace(space, " ")
    return [word for word in text.split(" ") if word]


class Classifier:
    """A fastText model of texts with labels.

    Attributes:
        labels: without their prefix.
    """

    def __init__(self, features: Features, rows: np.ndarray, labels: list[str], out: np.ndarray):
        """Take a model's parts.

        Args:
            features: of a text.
            rows: [rows, dim] float32.
            labels: their names.
            out: [labels, dim] float32.
        """
        self.features = features
        self.rows = rows
        self.labels = labels
        self.out = out

    def score(self, text: str, label: str) -> float:
        """Return the probability of a label, 0 to 1."""
        found = self.features.list_rows(text)
        hidden = self.rows[found].mean(0) if found else np.zeros(self.rows.shape[1], np.float32)
        logits = self.out @ hidden
        weights = np.exp(logits - logits.max())
        return float(weights[self.labels.index(label)] / weights.sum())


@functools.cache
def read_classifier(path: str) -> Classifier:
    """Read a fastText .bin or .ftz. Raise UserError if it is none that is supported."""
    try:
        return parse_classifier(ModelReader(pathlib.Path(path)))
    except (struct.error, ValueError, IndexError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(
            f"{path}: cannot be read as a fastText classifier ({error}). Give a .bin or .ftz of "
            "fastText 0.9, trained with softmax, or one of jaxpt train_quality."
        ) from None


def parse_classifier(reader: ModelReader) -> Classifier:
    """Return the classifier in a file. Raise ValueError for another kind of model."""
    header = reader.read_fields("14id")
    if header[:2] != MAGIC:
        raise ValueError("it does not begin as one")
    word_ngrams, loss, kind, n_buckets, shortest, longest = header[7:13]
    if (loss, kind) != (SOFTMAX, SUPERVISED):
        raise ValueError(f"expected a classifier with loss softmax, got loss {loss}, kind {kind}")
    n_entries, n_words, n_labels, _, n_pruned = reader.read_fields("iiiqq")
    names = []
    for _ in range(n_entries):
        names.append(reader.read_name().decode())
        reader.read_fields("qb")
    kept: dict[int, int] | None = None
    if n_pruned >= 0:
        pairs = reader.read_array("<i4", 2 * n_pruned).reshape(-1, 2)
        buckets, places = pairs.T.tolist()
        kept = dict(zip(buckets, places, strict=True))
    rows = read_matrix(reader)
    out = read_matrix(reader)
    words = {name: row for row, name in enumerate(names[:n_words])}
    labels = [name.removeprefix(LABEL_PREFIX) for name in names[n_words:]]
    n_rows = n_words + (n_buckets if kept is None else len(kept))
    if len(labels) != n_labels or len(out) != n_labels or len(rows) < n_rows:
        raise ValueError("its parts do not fit each other")
    features = Features(words, n_buckets, word_ngrams, shortest, longest, kept)
    return Classifier(features, rows, labels, out)


def read_matrix(reader: ModelReader) -> np.ndarray:
    """Return a matrix, quantized or not, as [rows, dim] float32."""
    [is_quantized] = reader.read_fields("?")
    if is_quantized:
        return reader.read_quantized_matrix()
    n_rows, dim = reader.read_fields("qq")
    return reader.read_array("<f4", n_rows * dim).reshape(n_rows, dim)


def encode_classifier(model: Classifier) -> bytes:
    """Return the bytes of a fastText model that is not pruned."""
    features = model.features
    training = (model.rows.shape[1], 5, 5, 1, 5)  # dim, and what reading does not need
    kind = (features.word_ngrams, SOFTMAX, SUPERVISED)
    sizes = (features.n_buckets, features.shortest, features.longest, 100)
    labels = [f"{LABEL_PREFIX}{label}" for label in model.labels]
    names = [*features.words, *labels]
    n_words = len(features.words)
    parts = [struct.pack("<14id", *MAGIC, *training, *kind, *sizes, 1e-4)]
    parts.append(struct.pack("<iiiqq", len(names), n_words, len(labels), len(names), -1))
    for i, name in enumerate(names):
        kind_of_name = WORD if i < n_words else LABEL
        parts.append(name.encode() + b"\0" + struct.pack("<qb", 1, kind_of_name))
    for matrix in (model.rows, model.out):
        parts.append(struct.pack("<?qq", False, *matrix.shape))
        parts.append(matrix.astype("<f4").tobytes())
    return b"".join(parts)
