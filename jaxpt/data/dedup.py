"""Which documents say what an earlier one said: exactly, or nearly. Works on digests and signatures, never on texts.

Near-duplicates: MinHash over word 5-grams of the normalised text (lower case, no punctuation, single spaces), 128
hashes in 32 bands of 4. Two documents that agree in a band are compared by their whole signatures; from half of the
hashes on (an estimated Jaccard similarity of 0.5) they are joined, and of each connected group the first is kept. A
pair is found with probability 0.995 at a true similarity of 0.63 (one word in twenty changed), half of the time at 0.5, hardly ever at 0.4.

Source: Broder (1997), "On the resemblance and containment of documents"; a shared band at similarity s has
probability 1 - (1 - s^4)^32; the figures above hold the comparison too.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

N_HASHES, N_BANDS, SHINGLE_WORDS = 128, 32, 5
MIN_SIMILARITY = 0.5
MAX_ROUNDS = 8  # of comparisons within a bucket: a bucket of many unlike documents costs so many times its size, not its square


def hash_text(text: bytes) -> bytes:
    """32 bytes of BLAKE2b of a UTF-8 text. Bytes 0-15 are its identity, 16-23 decide its side of the split, 24-31 the sampling."""
    return hashlib.blake2b(text, digest_size=32).digest()


def find_exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """Digests [n, k] uint64, in canonical order -> for each row the index of the first row with the same text, [n] int64."""
    order = np.lexsort(digests.T)  # stable: of equals the first row comes first
    fresh = np.ones(len(order), bool)
    fresh[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
    return first


def compute_minhash(column):
    """A Daft expression: a text column -> its MinHash signature, a list of N_HASHES uint32. 55 MB/s on a core."""
    plain = column.normalize(lowercase=True, remove_punct=True, white_space=True)
    return plain.minhash(
        num_hashes=N_HASHES, ngram_size=SHINGLE_WORDS, seed=1, hash_function="xxhash"
    )


def compute_signatures(texts: Sequence[str]) -> list[bytes]:
    """The MinHash signature of each text, N_HASHES uint32."""
    from daft import col
    from daft.recordbatch import MicroPartition

    found = MicroPartition.from_pydict({"text": list(map(str, texts))}).eval_expression_list(
        [compute_minhash(col("text")).alias("signature")]
    )
    return [
        row.tobytes()
        for row in found.to_arrow()["signature"]
        .combine_chunks()
        .flatten()
        .to_numpy()
        .reshape(-1, N_HASHES)
    ]


def write_signatures(path: pathlib.Path, found: Sequence[bytes]) -> list[pathlib.Path]:
    """Put signatures on disk for `near`, beside the name `path`: whole, [n, N_HASHES] uint32, and by bands, [N_BANDS, n] uint64. Returns the files."""
    whole = np.frombuffer(b"".join(found), np.uint32).reshape(-1, N_HASHES)
    for name, array in (("whole", whole), ("bands", split_bands(whole))):
        np.save(path.with_suffix(f".{name}.npy"), array)
    return [path.with_suffix(".whole.npy"), path.with_suffix(".bands.npy")]


def split_bands(whole: np.ndarray) -> np.ndarray:
    """[n, N_HASHES] uint32 -> [N_BANDS, n] uint64: a polynomial in a band's hashes, modulo 2^64, stands for the band."""
    bands = np.zeros((N_BANDS, len(whole)), np.uint64)
    for k in range(N_HASHES // N_BANDS):
        bands = bands * np.uint64(0x9E3779B97F4A7C15) + whole[:, k :: N_HASHES // N_BANDS].T.astype(
            np.uint64
        )
    return bands


# the bands of a text without a word, such as one of punctuation alone: it is near to nothing
EMPTY_SIGNATURE = split_bands(np.full((1, N_HASHES), 2**32 - 1, np.uint32))[0, 0]


def find_near_duplicates(paths: Sequence[pathlib.Path], chosen: np.ndarray) -> np.ndarray:
    """Among the chosen rows of all that was kept, [rows] bool, in canonical order: for each the first row of its group, [chosen rows] int64.

    The signatures stay on disk: in memory are some 40 bytes a row.
    """
    import scipy.sparse

    stored = SignatureStore(paths, chosen)
    group = np.arange(stored.n)  # each row's group, named by its first row
    for band in range(N_BANDS):
        keys = stored.read_band(band)
        order = np.argsort(keys, kind="stable")
        order = order[keys[order] != EMPTY_SIGNATURE]
        same = keys[order[1:]] == keys[order[:-1]]
        rows = order[np.append(same, False) | np.append(False, same)] if len(order) else order
        for _ in range(
            MAX_ROUNDS
        ):  # each row against the first of its bucket; those unlike it among themselves
            if not len(rows):
                break
            starts = np.flatnonzero(np.append(True, keys[rows[1:]] != keys[rows[:-1]]))
            leaders = np.repeat(rows[starts], np.diff(starts, append=len(rows)))
            alike = group[leaders] == group[rows]
            asked = np.flatnonzero(~alike)
            alike[asked] = stored.compute_similarity(leaders[asked], rows[asked]) >= MIN_SIMILARITY
            pairs = np.stack([group[leaders[alike]], group[rows[alike]]])
            names, at = np.unique(pairs, return_inverse=True)
            a, b = at.reshape(2, -1)
            _, joined = scipy.sparse.csgraph.connected_components(
                scipy.sparse.coo_matrix((np.ones(len(a), bool), (a, b)), (len(names),) * 2)
            )
            _, first = np.unique(joined, return_index=True)
            renamed = np.arange(stored.n)
            renamed[names] = names[first[joined]]
            group, rows = renamed[group], rows[~alike]
    return group


class SignatureStore:
    """The chosen rows of the signatures on disk."""

    def __init__(self, paths: Sequence[pathlib.Path], chosen: np.ndarray):
        self.paths = paths
        sizes = [np.load(path.with_suffix(".bands.npy"), mmap_mode="r").shape[1] for path in paths]
        self.starts = np.cumsum([0, *sizes])
        self.chosen = np.flatnonzero(chosen)
        self.n = len(self.chosen)

    def read_band(self, k: int) -> np.ndarray:
        """[n] uint64"""
        return np.concatenate(
            [np.load(path.with_suffix(".bands.npy"), mmap_mode="r")[k] for path in self.paths]
        )[self.chosen]

    def compute_similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The share of hashes in which rows a and b, [m] each, agree: [m]."""
        parts = range(0, len(a), 2**15)  # 2 x 16 MB of signatures at a time
        agree = [
            (self.read_signatures(a[i : i + 2**15]) == self.read_signatures(b[i : i + 2**15])).mean(
                1
            )
            for i in parts
        ]
        return np.concatenate([np.empty(0), *agree])

    def read_signatures(self, rows: np.ndarray) -> np.ndarray:
        """[m, N_HASHES] of m rows"""
        rows = self.chosen[rows]
        found, of = (
            np.empty((len(rows), N_HASHES), np.uint32),
            np.searchsorted(self.starts, rows, "right") - 1,
        )
        for k in np.unique(of):
            # opened anew each time, so that what was mapped does not add up
            found[of == k] = np.load(self.paths[k].with_suffix(".whole.npy"), mmap_mode="r")[
                rows[of == k] - self.starts[k]
            ]
        return found
