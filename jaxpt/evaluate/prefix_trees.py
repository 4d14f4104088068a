"""Lay out sequences that share prefixes, so that each prefix is computed once.

Sorted sequences form trees: a column holds a token whose whole past is the path to it from the root
of its tree, and the token attends to that path alone. The columns of a tree are in depth-first
order, so a token's descendants are the columns after it up to an end, and one number per column,
`visible_until`, says who attends to it. Trees that share nothing are placed side by side in a row,
as documents are in training.

The seven answers to a question share the question, and all questions share the examples in front of
them: the 5,882 requests of truthfulqa_mc2 have 1.24 million tokens and 68,362 columns.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Columns of a row. A row is MIN_SEQ_LEN, SEQ_LEN_GROWTH x, SEQ_LEN_GROWTH^2 x ... long, so that
# only two or three lengths are compiled.
MIN_SEQ_LEN = 256
SEQ_LEN_GROWTH = 4
MAX_SEQ_LEN = 16_384  # of trees; a single sequence may be longer
# A tree takes a row of up to this many times what all its sequences share. Every row repeats that
# prefix, so short rows waste work; but the attention of a token costs what its row is long,
# whatever it attends to.
SEQ_LEN_PER_PREFIX = 8
# Sequences that share fewer tokens get separate trees, which pack better than sharing would save.
MIN_SHARED_TOKENS = 16
MAX_BATCH_TOKENS = 4096  # per device and step


class TreeArrays(NamedTuple):
    """Input of the model and its targets; every field is int32 [B, T].

    Attributes:
        tokens: token ids.
        visible_until: columns from this one up to here, exclusive, attend to this one; an unused
            column is visible to itself.
        positions: position in the sequence, which is the depth in the tree.
        columns: of each target, the column that predicts it; a row's targets are at its beginning.
        targets: ids whose log-likelihood is computed.
    """

    tokens: Any
    visible_until: Any
    positions: Any
    columns: Any
    targets: Any


class TreeBatch(NamedTuple):
    """Trees of one row length, and where their scores belong.

    Attributes:
        arrays: numpy arrays.
        n_scored: most targets of any row.
        places: (sequence, row, its first target); the targets of a sequence are consecutive.
    """

    arrays: TreeArrays
    n_scored: int
    places: list[tuple[int, int, int]]


class PrefixTree(NamedTuple):
    """Sequences that share a prefix.

    Attributes:
        members: (sequence, columns that it shares with the member before), sorted.
        size: columns, or targets where those are more.
    """

    members: list[tuple[int, int]]
    size: int


class ScoredSequence(NamedTuple):
    """A sequence, the last tokens of which are scored.

    Attributes:
        ids: int32 [n + 1], for n columns: the last id is only predicted.
        n_scored: how many of the last ids are scored.
    """

    ids: np.ndarray
    n_scored: int

    @property
    def n_columns(self) -> int:
        """Return the columns that the sequence takes alone."""
        return len(self.ids) - 1


def make_tree_batches(
    sequences: Sequence[ScoredSequence], longest: int, n_shards: int, share: bool = True
) -> Iterator[TreeBatch]:
    """Yield batches with every target of every sequence exactly once.

    Args:
        sequences: what to score.
        longest: columns of the longest sequence that the model takes. Rows of single sequences are
            at most this long, rounded up to a multiple of MIN_SEQ_LEN.
        n_shards: the number of rows of a batch is a multiple of it.
        share: whether sequences share prefixes.
    """
    if share:
        trees = build_trees(sequences, longest)
    else:
        trees = [PrefixTree([(i, 0)], each.n_columns) for i, each in enumerate(sequences)]
    packed = pack_trees([tree.size for tree in trees], longest)
    for seq_len, rows in packed.items():
        rows_per_shard = min(max(MAX_BATCH_TOKENS // seq_len, 1), math.ceil(len(rows) / n_shards))
        batch_size = rows_per_shard * n_shards
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            trees_by_row = [[trees[i] for i in row] for row in chosen]
            yield fill_tree_arrays(sequences, trees_by_row, batch_size, seq_len)


@dataclasses.dataclass
class GrowingTree:
    """A tree that `build_trees` adds sequences to.

    Attributes:
        members: see PrefixTree.
        n_columns: columns so far.
        n_scored: targets so far.
        n_shared: tokens that all members share.
    """

    members: list[tuple[int, int]]
    n_columns: int
    n_scored: int
    n_shared: int

    def finish(self) -> PrefixTree:
        """Return the tree as it is."""
        return PrefixTree(self.members, max(self.n_columns, self.n_scored))


def build_trees(sequences: Sequence[ScoredSequence], longest: int) -> list[PrefixTree]:
    """Group the sequences into trees, in the order of their ids: neighbors share the most."""
    # big-endian bytes sort as the ids do
    keys = [sequence.ids[:-1].astype(">i4").tobytes() for sequence in sequences]
    trees: list[GrowingTree] = []
    before = np.empty(0, np.int32)
    for i in sorted(range(len(sequences)), key=keys.__getitem__):
        ids, n_scored = sequences[i].ids[:-1], sequences[i].n_scored
        n_shared = count_shared_prefix(before, ids)
        before = ids
        tree = trees[-1] if trees else None
        if tree and n_shared >= MIN_SHARED_TOKENS:
            n_columns = tree.n_columns + len(ids) - n_shared
            prefix = min(n_shared, tree.n_shared)
            limit = round_seq_len(min(SEQ_LEN_PER_PREFIX * prefix, MAX_SEQ_LEN), longest)
            if max(n_columns, tree.n_scored + n_scored) <= limit:
                tree.members.append((i, n_shared))
                tree.n_columns = n_columns
                tree.n_scored += n_scored
                tree.n_shared = prefix
                continue
        trees.append(GrowingTree([(i, 0)], len(ids), n_scored, len(ids)))
    return [tree.finish() for tree in trees]


def count_shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many ids two sequences have in common at their beginnings."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def pack_trees(sizes: Sequence[int], longest: int) -> dict[int, list[list[int]]]:
    """Pack trees into rows by best fit, largest first.

    A tree goes to the fullest row that still holds it, or opens a row of the shortest length that
    does.

    Returns:
        Row length -> rows, each a list of indices into sizes.
    """
    rows: dict[int, list[list[int]]] = {}
    free: list[tuple[int, int, int]] = []  # (columns left, row length, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found = bisect.bisect_left(free, (sizes[i], 0, 0))
        if found < len(free):
            n_left, seq_len, row = free.pop(found)
        else:
            n_left = seq_len = round_seq_len(sizes[i], longest)
            row = len(rows.setdefault(seq_len, []))
            rows[seq_len].append([])
        rows[seq_len][row].append(i)
        bisect.insort(free, (n_left - sizes[i], seq_len, row))
    return rows


def round_seq_len(n: int, longest: int) -> int:
    """Return the shortest row length for n columns: one of the series, or `longest` rounded up."""
    seq_len = MIN_SEQ_LEN
    while seq_len < n:
        seq_len *= SEQ_LEN_GROWTH
    longest_rounded = -(-longest // MIN_SEQ_LEN) * MIN_SEQ_LEN
    return longest_rounded if n <= longest_rounded < seq_len else seq_len


def fill_tree_arrays(
    sequences: Sequence[ScoredSequence],
    trees_by_row: list[list[PrefixTree]],
    n_rows: int,
    seq_len: int,
) -> TreeBatch:
    """Fill the arrays of one batch."""
    shape = (n_rows, seq_len)
    arrays = TreeArrays(*(np.zeros(shape, np.int32) for _ in TreeArrays._fields))
    arrays.visible_until[:] = np.arange(1, seq_len + 1)
    places = []
    max_scored = 0
    for row, trees in enumerate(trees_by_row):
        column, target = 0, 0  # the next to be filled
        for tree in trees:
            path = np.empty(0, np.int64)  # columns of the sequence before, from the root on
            for i, n_shared in tree.members:
                ids, n_scored = sequences[i]
                n_columns = len(ids) - 1
                # what the two do not share is invisible to all that follows
                arrays.visible_until[row, path[n_shared:]] = column
                new = np.arange(column, column + n_columns - n_shared)
                arrays.tokens[row, new] = ids[n_shared:-1]
                arrays.positions[row, new] = np.arange(n_shared, n_columns)
                path = np.concatenate([path[:n_shared], new])
                targets = slice(target, target + n_scored)
                arrays.columns[row, targets] = path[-n_scored:]
                arrays.targets[row, targets] = ids[-n_scored:]
                places.append((i, row, target))
                column += len(new)
                target += n_scored
            arrays.visible_until[row, path] = column
        max_scored = max(max_scored, target)
    return TreeBatch(arrays, max_scored, places)
