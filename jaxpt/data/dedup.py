"""Find exact and near-duplicates from digests and signatures, never from texts.

Near-duplicates: MinHash over word 5-grams of the normalized text (lower case, no punctuation,
single spaces), 128 hashes in 32 bands of 4. Two documents that agree in a band are compared by
their whole signatures. From half of the hashes on (an estimated Jaccard similarity of 0.5) they are
joined, and the first of each connected group is kept. A pair is found with probability 0.995 at a
true similarity of 0.63 (one word in twenty changed), half of the time at 0.5, hardly ever at 0.4.

Source: Broder (1997), "On the resemblance and containment of documents". A shared band at
similarity s has probability 1 - (1 - s^4)^32; the figures above include the comparison.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

N_HASHES = 128
N_BANDS = 32
SHINGLE_WORDS = 5
MIN_SIMILARITY = 0.5
# Rounds of comparisons within a bucket: a bucket of many unlike documents costs 8 x its size, not
# its square.
MAX_ROUNDS = 8
COMPARED_AT_ONCE = 2**15  # pairs: 2 x 16 MB of signatures
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def hash_text(text: bytes) -> bytes:
    """Return 32 bytes of BLAKE2b of a UTF-8 text.

    Bytes 0-15 are its identity, 16-23 decide its split, 24-31 decide sampling.
    """
    return hashlib.blake2b(text, digest_size=32).digest()


def find_exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """Return for each document the index of the first one with the same text, [n] int64.

    Args:
        digests: [n, k] uint64, in canonical order.
    """
    order = np.lexsort(digests.T)  # stable: the first of equals comes first
    is_new = np.ones(len(order), bool)
    differs = digests[order[1:]] != digests[order[:-1]]
    is_new[1:] = differs.any(1)
    leaders = order[is_new]
    first = np.empty(len(order), np.int64)
    group = np.cumsum(is_new) - 1
    first[order] = leaders[group]
    return first


def compute_minhash(column: Any) -> Any:
    """Return the Daft expression of a text column's signatures, lists of N_HASHES uint32.

    It does 55 MB/s per core.
    """
    plain = column.normalize(lowercase=True, remove_punct=True, white_space=True)
    return plain.minhash(
        num_hashes=N_HASHES, ngram_size=SHINGLE_WORDS, seed=1, hash_function="xxhash"
    )


def compute_signatures(texts: Sequence[str]) -> list[bytes]:
    """Return the MinHash signature of each text, N_HASHES uint32."""
    from daft import col
    from daft.expressions import ExpressionsProjection
    from daft.recordbatch import MicroPartition

    plain_texts = list(map(str, texts))
    table = MicroPartition.from_pydict({"text": plain_texts})
    signature = compute_minhash(col("text")).alias("signature")
    projection = ExpressionsProjection([signature])
    computed = table.eval_expression_list(projection).to_arrow()
    column = computed["signature"].combine_chunks()
    hashes = column.flatten().to_numpy()
    rows = hashes.reshape(-1, N_HASHES)
    return [row.tobytes() for row in rows]


def write_signatures(path: pathlib.Path, signatures: Sequence[bytes]) -> list[pathlib.Path]:
    """Write signatures for `find_near_duplicates` and return the files.

    Args:
        path: PATH.whole.npy gets [n, N_HASHES] uint32, PATH.bands.npy [N_BANDS, n] uint64.
        signatures: n of them.
    """
    joined = b"".join(signatures)
    hashes = np.frombuffer(joined, np.uint32)
    whole = hashes.reshape(-1, N_HASHES)
    bands = split_bands(whole)
    whole_file = whole_path(path)
    bands_file = bands_path(path)
    np.save(whole_file, whole)
    np.save(bands_file, bands)
    return [whole_file, bands_file]


def whole_path(path: pathlib.Path) -> pathlib.Path:
    """Return the file of whole signatures."""
    return path.with_suffix(".whole.npy")


def bands_path(path: pathlib.Path) -> pathlib.Path:
    """Return the file of signatures by bands."""
    return path.with_suffix(".bands.npy")


def split_bands(whole: np.ndarray) -> np.ndarray:
    """Return [N_BANDS, n] uint64 of [n, N_HASHES] uint32.

    A polynomial in a band's hashes, modulo 2^64, stands for the band.
    """
    bands = np.zeros((N_BANDS, len(whole)), np.uint64)
    band_size = N_HASHES // N_BANDS
    for k in range(band_size):
        hashes = whole[:, k::band_size].T
        bands = bands * MULTIPLIER + hashes.astype(np.uint64)
    return bands


# The bands of a text without a word, such as one of punctuation alone: it is near to nothing.
WORDLESS_HASHES = np.full((1, N_HASHES), 2**32 - 1, np.uint32)
EMPTY_SIGNATURE = split_bands(WORDLESS_HASHES)[0, 0]


def find_near_duplicates(paths: Sequence[pathlib.Path], is_candidate: np.ndarray) -> np.ndarray:
    """Return for each candidate the first candidate of its group, [n_candidates] int64.

    The signatures stay on disk: some 40 bytes per document are in memory.

    Args:
        paths: as given to `write_signatures`, in canonical order.
        is_candidate: [n] bool, of all stored signatures.
    """
    store = SignatureStore(paths, is_candidate)
    groups = np.arange(store.n)  # each document's group, named by its first document
    for band in range(N_BANDS):
        keys = store.read_band(band)
        members = find_shared_keys(keys)
        for _ in range(MAX_ROUNDS):
            if not len(members):
                break
            # each against the first of its bucket; those unlike it among themselves next
            is_change = np.diff(keys[members]) != 0
            is_start = np.append(True, is_change)
            starts = np.flatnonzero(is_start)
            counts = np.diff(starts, append=len(members))
            leaders = np.repeat(members[starts], counts)
            is_alike = store.are_alike(groups, leaders, members)
            pairs = np.stack([leaders[is_alike], members[is_alike]])
            groups = join_groups(groups, groups[pairs])
            members = members[~is_alike]
    return groups


def find_shared_keys(keys: np.ndarray) -> np.ndarray:
    """Return the documents that share their key with another one, sorted by key."""
    order = np.argsort(keys, kind="stable")
    has_words = keys[order] != EMPTY_SIGNATURE
    order = order[has_words]
    if not len(order):
        return order
    is_equal = np.diff(keys[order]) == 0
    equals_next = np.append(is_equal, False)
    equals_last = np.append(False, is_equal)
    return order[equals_next | equals_last]


def join_groups(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the groups after joining pairs [2, m] of them; the first name of each wins."""
    import scipy.sparse

    names, index = np.unique(pairs, return_inverse=True)
    a, b = index.reshape(2, -1)
    edges = np.ones(len(a), bool)
    n = len(names)
    shape = (n, n)
    graph = scipy.sparse.coo_matrix((edges, (a, b)), shape)
    _, component = scipy.sparse.csgraph.connected_components(graph)
    _, first = np.unique(component, return_index=True)
    new_names = np.arange(len(groups))
    new_names[names] = names[first[component]]
    return new_names[groups]


class SignatureStore:
    """The candidates' signatures on disk."""

    def __init__(self, paths: Sequence[pathlib.Path], is_candidate: np.ndarray):
        """Find where each file's signatures begin."""
        self.paths = paths
        sizes = [0]
        for path in paths:
            _, n = load_mapped(bands_path(path)).shape
            sizes.append(n)
        self.starts = np.cumsum(sizes)
        self.candidates = np.flatnonzero(is_candidate)
        self.n = len(self.candidates)

    def read_band(self, k: int) -> np.ndarray:
        """Return one band of all candidates, [n] uint64."""
        parts = []
        for path in self.paths:
            bands = load_mapped(bands_path(path))
            parts.append(bands[k])
        band = np.concatenate(parts)
        return band[self.candidates]

    def are_alike(self, groups: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return whether candidates a and b [m] are near, or in one group already, [m] bool."""
        is_alike = groups[a] == groups[b]
        open_pairs = np.flatnonzero(~is_alike)
        similarity = self.compute_similarity(a[open_pairs], b[open_pairs])
        is_alike[open_pairs] = similarity >= MIN_SIMILARITY
        return is_alike

    def compute_similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the fraction of hashes in which candidates a and b [m] agree, [m]."""
        parts = [np.empty(0)]
        for start in range(0, len(a), COMPARED_AT_ONCE):
            chunk = slice(start, start + COMPARED_AT_ONCE)
            first = self.read_signatures(a[chunk])
            second = self.read_signatures(b[chunk])
            is_equal = first == second
            parts.append(np.mean(is_equal, 1))
        return np.concatenate(parts)

    def read_signatures(self, candidates: np.ndarray) -> np.ndarray:
        """Return [m, N_HASHES] uint32 of m candidates."""
        rows = self.candidates[candidates]
        signatures = np.empty((len(rows), N_HASHES), np.uint32)
        file_index = np.searchsorted(self.starts, rows, "right") - 1
        for k in np.unique(file_index):
            mask = file_index == k
            # opened again each time, so that what was mapped does not add up
            stored = load_mapped(whole_path(self.paths[k]))
            row_in_file = rows[mask] - self.starts[k]
            signatures[mask] = stored[row_in_file]
        return signatures


def load_mapped(path: pathlib.Path) -> np.ndarray:
    """Return an array that is mapped into memory."""
    return np.load(path, mmap_mode="r")
