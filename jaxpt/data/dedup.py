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

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import string
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from jaxpt import io
from jaxpt.data.meta import PAIR

N_HASHES = 128
N_BANDS = 32
SHINGLE_WORDS = 5
MIN_SIMILARITY = 0.5
# Rounds of comparisons within a bucket: a bucket of many unlike documents costs 8 x its size, not
# its square.
MAX_ROUNDS = 8
COMPARED_AT_ONCE = 2**15  # pairs: 2 x 16 MB of signatures
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# odd numbers: each permutes the hashes in another way
MULTIPLIERS = np.random.default_rng(1).integers(2**31, size=N_HASHES, dtype=np.uint32) * 2 + 1
WORDLESS = 2**32 - 1  # each hash of a text without a word
HASHED_AT_ONCE = 2**18  # characters: their hashes stay in a core's cache
LONG_WORD = 64  # bytes; longer ones are hashed one by one
BYTE_MASKS = np.array([256**n - 1 for n in range(9)], np.uint64)  # of the first n bytes
PUNCTUATION = string.punctuation.encode()
TO_SPACES = bytes(32 if byte in b"\t\n\v\f\r" else byte for byte in range(256))
# bytes -> the characters of so many bytes that are white space
WIDE_SPACES: dict[int, list[int]] = {2: [], 3: []}
for character in filter(str.isspace, map(chr, range(0x80, 0x3001))):
    encoded = character.encode()
    WIDE_SPACES[len(encoded)].append(int.from_bytes(encoded, "little"))


def hash_text(text: bytes) -> bytes:
    """Return 32 bytes of BLAKE2b of a UTF-8 text.

    Bytes 0-15 are its identity, 16-23 decide its split, 24-31 decide sampling.
    """
    return hashlib.blake2b(text, digest_size=32).digest()


def hash_document(text: bytes, meta: str) -> bytes:
    """Return `hash_text` of a document; the identity of a pair is that of both of its answers."""
    digest = hash_text(text)
    if PAIR.is_in(meta):
        return hash_text(text + meta.encode())[:16] + digest[16:]
    return digest


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


def compute_signatures(texts: Sequence[str]) -> list[bytes]:
    """Return the MinHash signature of each text, N_HASHES uint32."""
    signatures: list[bytes] = []
    first = n_chars = 0
    for stop, text in enumerate(texts, 1):
        n_chars += len(text)
        if n_chars >= HASHED_AT_ONCE or stop == len(texts):
            least = compute_minhash(texts[first:stop])
            signatures += [row.tobytes() for row in least]
            first = stop
            n_chars = 0
    return signatures


def compute_minhash(texts: Sequence[str]) -> np.ndarray:
    """Return for each text the least of its shingles' hashes, [n, N_HASHES] uint32.

    Hash k of a shingle is MULTIPLIERS[k] times its own hash, modulo 2^32.
    """
    words, n_words = hash_words(texts)
    last_words = np.cumsum(n_words)
    # a text of fewer words than a shingle has is one shingle
    n_shingles = np.maximum(n_words - SHINGLE_WORDS + 1, np.minimum(n_words, 1))
    ends = np.cumsum(n_shingles)
    starts = ends - n_shingles
    first = np.repeat(last_words - n_words - starts, n_shingles)
    first += np.arange(len(first))
    stop = np.repeat(last_words, n_shingles)
    padded = np.append(words, np.zeros(SHINGLE_WORDS, np.uint64))
    shingles = np.zeros(len(first), np.uint64)
    for place in range(SHINGLE_WORDS):
        word = first + place
        shingles *= MULTIPLIER
        shingles += np.where(word < stop, padded[word], 0)
    hashes = (mix_bits(shingles) >> 32).astype(np.uint32)
    least = np.full((N_HASHES, len(texts)), WORDLESS, np.uint32)
    has_words = np.flatnonzero(n_words)
    if len(has_words):
        product = np.empty_like(hashes)
        for k, multiplier in enumerate(MULTIPLIERS):
            np.multiply(hashes, multiplier, out=product)
            least[k, has_words] = np.minimum.reduceat(product, starts[has_words])
    return least.T


def hash_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all texts' normalized words, uint64, and how many each text has."""
    lines = [text.lower().encode().translate(TO_SPACES, PUNCTUATION) for text in texts]
    joined = bytearray(b" ".join([b"", *lines, bytes(8)]))
    windows = np.ndarray(len(joined) - 7, "<u8", joined, strides=(1,))  # the 8 bytes from each on
    data = np.frombuffer(joined, np.uint8)[:-8]
    blank_wide_spaces(data, windows)
    is_space = data == ord(" ")
    starts = np.flatnonzero(is_space[:-1] & ~is_space[1:]) + 1
    ends = np.flatnonzero(~is_space[:-1] & is_space[1:]) + 1
    line_starts = np.cumsum([1, *(len(line) + 1 for line in lines)])
    n_words = np.diff(np.searchsorted(starts, line_starts))
    sizes = ends - starts
    hashes = sizes.astype(np.uint64)
    for offset in range(0, LONG_WORD, 8):
        left = np.flatnonzero(sizes > offset)
        n_bytes = np.minimum(sizes[left] - offset, 8)
        read = windows[starts[left] + offset] & BYTE_MASKS[n_bytes]
        hashes[left] = mix_bits(hashes[left] ^ read)
    for word in np.flatnonzero(sizes > LONG_WORD):
        digest = hash_text(data[starts[word] : ends[word]].tobytes())
        hashes[word] = int.from_bytes(digest[:8], "little")
    return hashes, n_words


def blank_wide_spaces(data: np.ndarray, windows: np.ndarray) -> None:
    """Make ASCII spaces of the white space that takes several bytes of UTF-8."""
    first_bytes = np.flatnonzero(data >= 0xC2)
    following = windows[first_bytes]
    for size, spaces in WIDE_SPACES.items():
        is_space = np.isin(following & BYTE_MASKS[size], spaces)
        places = first_bytes[is_space]
        data[places[:, None] + np.arange(size)] = ord(" ")


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Return a random permutation of the 64-bit numbers, the finalizer of MurmurHash3."""
    mixed = numbers ^ (numbers >> 33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> 33
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> 33
    return mixed


def write_signatures(path: pathlib.Path, signatures: Sequence[bytes]) -> pathlib.Path:
    """Write n signatures for `find_near_duplicates` and return the file: [n, N_HASHES] uint32."""
    joined = b"".join(signatures)
    hashes = np.frombuffer(joined, np.uint32)
    file = signature_path(path)
    with io.open_write(file) as out:
        np.save(out, hashes.reshape(-1, N_HASHES))
    return file


def signature_path(path: pathlib.Path) -> pathlib.Path:
    """Return the file of the signatures."""
    return path.with_suffix(".signatures.npy")


def split_bands(signatures: np.ndarray) -> np.ndarray:
    """Return [N_BANDS, n] uint64 of [n, N_HASHES] uint32.

    A polynomial in a band's hashes, modulo 2^64, stands for the band.
    """
    bands = np.zeros((N_BANDS, len(signatures)), np.uint64)
    band_size = N_HASHES // N_BANDS
    for k in range(band_size):
        hashes = signatures[:, k::band_size].T
        bands = bands * MULTIPLIER + hashes.astype(np.uint64)
    return bands


# The bands of a text without a word, such as one of punctuation alone: it is near to nothing.
WORDLESS_HASHES = np.full((1, N_HASHES), WORDLESS, np.uint32)
WORDLESS_BAND = split_bands(WORDLESS_HASHES)[0, 0]


def find_near_duplicates(paths: Sequence[pathlib.Path], is_candidate: np.ndarray) -> np.ndarray:
    """Return for each candidate the first candidate of its group, [n_candidates] int64.

    Args:
        paths: as given to `write_signatures`, in canonical order.
        is_candidate: [n] bool, of all stored signatures.
    """
    n = int(is_candidate.sum())
    groups = np.arange(n)  # each document's group, named by its first document
    with SignatureStore(paths, is_candidate) as store:
        for members, keys in store.iterate_buckets():
            for _ in range(MAX_ROUNDS):
                if not len(members):
                    break
                # each against the first of its bucket; those unlike it among themselves next
                is_start = np.append(True, np.diff(keys) != 0)
                bucket = np.cumsum(is_start) - 1
                leaders = members[is_start][bucket]
                is_alike = store.are_alike(groups, leaders, members)
                pairs = groups[np.stack([leaders[is_alike], members[is_alike]])]
                groups = join_groups(groups, pairs)
                members = members[~is_alike]
                keys = keys[~is_alike]
    return groups


def find_shared_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents that share their key with another one, sorted by key, and their keys."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_equal = np.diff(ordered) == 0
    is_shared = np.zeros(len(keys), bool)
    is_shared[1:] |= is_equal
    is_shared[:-1] |= is_equal
    is_shared &= ordered != WORDLESS_BAND
    members = order[is_shared]
    shared = ordered[is_shared]
    in_order = np.lexsort((members, shared))
    return members[in_order], shared


def join_groups(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the groups after joining pairs [2, m] of them; the first name of each wins."""
    import scipy.sparse

    a, b = pairs
    pairs = pairs[:, a != b]
    if not pairs.size:
        return groups
    names, index = np.unique(pairs, return_inverse=True)
    a, b = index.reshape(2, -1)
    edges = np.ones(len(a), bool)
    n = len(names)
    graph = scipy.sparse.coo_matrix((edges, (a, b)), (n, n))
    _, component = scipy.sparse.csgraph.connected_components(graph)
    _, first = np.unique(component, return_index=True)
    new_names = np.arange(len(groups))
    new_names[names] = names[first[component]]
    return new_names[groups]


class SignatureStore(contextlib.ExitStack):
    """The candidates' signatures, and these by bands, in two unnamed files beside the originals."""

    def __init__(self, paths: Sequence[pathlib.Path], is_candidate: np.ndarray):
        """Copy them, a file at a time."""
        super().__init__()
        self.n = int(is_candidate.sum())
        directory = paths[0].parent
        self.whole = self.enter_context(tempfile.TemporaryFile(dir=directory))
        self.bands = self.enter_context(tempfile.TemporaryFile(dir=directory))
        start = row = 0
        for path in paths:
            signatures = np.load(signature_path(path))
            own = signatures[is_candidate[row : row + len(signatures)]]
            row += len(signatures)
            self.whole.write(own)
            for band, keys in enumerate(split_bands(own)):
                self.bands.seek(8 * (band * self.n + start))
                self.bands.write(keys)
            start += len(own)
        self.whole.flush()
        self.bands.flush()

    def iterate_buckets(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `find_shared_keys` of each band; a thread is one band ahead."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.read_buckets, 0)
            for band in range(1, N_BANDS):
                buckets = coming.result()
                coming = pool.submit(self.read_buckets, band)
                yield buckets
            yield coming.result()

    def read_buckets(self, band: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `find_shared_keys` of a band."""
        self.bands.seek(8 * band * self.n)
        return find_shared_keys(np.fromfile(self.bands, np.uint64, self.n))

    def are_alike(self, groups: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return whether candidates a and b [m] are near, or in one group already, [m] bool."""
        is_alike = groups[a] == groups[b]
        open_pairs = np.flatnonzero(~is_alike)
        # in the order of the file, so that what is read is near what was read before
        open_pairs = open_pairs[np.argsort(a[open_pairs])]
        for start in range(0, len(open_pairs), COMPARED_AT_ONCE):
            chunk = open_pairs[start : start + COMPARED_AT_ONCE]
            is_equal = self.read_signatures(a[chunk]) == self.read_signatures(b[chunk])
            is_alike[chunk] = np.mean(is_equal, 1) >= MIN_SIMILARITY
        return is_alike

    def read_signatures(self, candidates: np.ndarray) -> np.ndarray:
        """Return [m, N_HASHES] uint32 of m candidates."""
        # mapped into memory, the file's pages would add up
        signatures = np.empty((len(candidates), N_HASHES), np.uint32)
        file = self.whole.fileno()
        for signature, candidate in zip(signatures, candidates.tolist(), strict=True):
            os.preadv(file, [signature.data], candidate * signature.nbytes)
        return signatures
