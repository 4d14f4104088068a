"""Texts that begin alike, laid out in rows so that what they share is computed once.

The pieces of text, sorted, form trees: a column of a row holds a token whose whole past is the path
to it from its tree's root, and a token
sees that path alone. With the columns of a tree in the order of a walk in depth, a token's
descendants are the columns after it up to an end, so
one number a column, `ends`, says who sees it. Trees that share nothing stand side by side in a row
as documents do in training.

The seven answers to a question share the question, all questions share the examples in front of
them: the 5,882 requests of truthfulqa_mc2 have
1.24 million tokens and 68,362 columns.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_SEQ_LEN, MAX_SEQ_LEN = 256, 16_384  # columns; of trees. A piece alone may take more
# rows are SHORTEST_ROW, GROWTH x, GROWTH^2 x ... long, so that two or three lengths are all that is
# compiled
SEQ_LEN_GROWTH = 4
# A tree takes a row of up to so many times what all its pieces share. Every row repeats that trunk,
# so short rows waste; but a token's
# attention costs what its row is long, whatever it sees of it.
SEQ_LEN_PER_PREFIX = 8
MIN_SHARED_TOKENS = (
    16  # tokens: pieces that share fewer are apart, which packs better than it costs
)
MAX_BATCH_TOKENS = 4096  # on each device in one step


class TreeArrays(NamedTuple):
    """What a model reads and is asked; every field int32 [B, T].

    tokens     ids
    ends       a column is seen by those from itself on up to this one, exclusive; unused columns
    see themselves
    positions  in the piece of text: the depth in the tree
    columns    of the questions: which column's prediction is asked for; each row's questions stand
    at its beginning
    targets    of the questions: how likely which id is
    """

    tokens: Any
    visible_until: Any
    positions: Any
    columns: Any
    targets: Any


class TreeBatch(NamedTuple):
    """Trees of one shape, and where their scores belong."""

    arrays: TreeArrays  # numpy
    n_scored: int  # the most questions of any row
    places: list[
        tuple[int, int, int]
    ]  # (piece, row, its first question); its questions follow one another


class PrefixTree(NamedTuple):
    """Sequences that share a prefix."""

    members: list[tuple[int, int]]  # (piece, columns that it shares with the one before), sorted
    size: int  # columns, or questions where those are more


class ScoredSequence(NamedTuple):
    """Token ids, and how many of the last ones are scored."""

    ids: np.ndarray  # int32 [n + 1]: n columns, for the last is only predicted
    n_scored: int  # of its ids, the last ones

    @property
    def n_columns(self) -> int:
        """Columns that the sequence takes alone."""
        return len(self.ids) - 1


def make_tree_batches(
    pieces: Sequence[ScoredSequence], longest: int, n_shards: int, share: bool = True
) -> Iterator[TreeBatch]:
    """Every piece's questions, each exactly once. Row counts are multiples of n_shards.

    longest  columns of the longest piece that the model takes: rows of single pieces are no longer
    than that, rounded up to SHORTEST_ROW
    share    False keeps pieces apart
    """
    trees = (
        build_trees(pieces, longest)
        if share
        else [PrefixTree([(i, 0)], piece.n_columns) for i, piece in enumerate(pieces)]
    )
    for seq_len, rows in pack_trees([tree.size for tree in trees], longest).items():
        per_batch = (
            min(max(MAX_BATCH_TOKENS // seq_len, 1), math.ceil(len(rows) / n_shards)) * n_shards
        )
        for first in range(0, len(rows), per_batch):
            yield fill_tree_arrays(
                pieces,
                [[trees[i] for i in row] for row in rows[first : first + per_batch]],
                per_batch,
                seq_len,
            )


def build_trees(pieces: Sequence[ScoredSequence], longest: int) -> list[PrefixTree]:
    """The pieces in trees, by the order of their ids: neighbours there share the most."""
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].ids[:-1].astype(">i4").tobytes())
    trees: list[PrefixTree] = []
    members: list[tuple[int, int]] = []
    n_columns = n_asked = trunk = 0
    before = np.empty(0, np.int32)

    def close() -> None:
        if members:
            trees.append(PrefixTree(list(members), max(n_columns, n_asked)))

    for i in order:
        ids, asked = pieces[i].ids[:-1], pieces[i].n_scored
        shared = count_shared_prefix(before, ids)
        limit = round_seq_len(min(SEQ_LEN_PER_PREFIX * min(shared, trunk), MAX_SEQ_LEN), longest)
        if (
            shared >= MIN_SHARED_TOKENS
            and max(n_columns + len(ids) - shared, n_asked + asked) <= limit
        ):
            trunk = min(trunk, shared)
        else:
            close()
            members.clear()
            n_columns = n_asked = shared = 0
            trunk = len(ids)
        members.append((i, shared))
        n_columns, n_asked, before = n_columns + len(ids) - shared, n_asked + asked, ids
    close()
    return trees


def count_shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two pieces have in common at their beginnings."""
    n = min(len(a), len(b))
    apart = np.flatnonzero(a[:n] != b[:n])
    return int(apart[0]) if len(apart) else n


def pack_trees(sizes: Sequence[int], longest: int) -> dict[int, list[list[int]]]:
    """Row length -> rows, each a list of trees by number.

    Best fit, largest first: a tree goes to the fullest row that still holds it, or opens a row of
    the shortest length that does.
    """
    rows: dict[int, list[list[int]]] = {}
    free: list[tuple[int, int, int]] = []  # (columns left, row length, row), sorted
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found = bisect.bisect_left(free, (sizes[i], 0, 0))
        if found < len(free):
            left, seq_len, row = free.pop(found)
        else:
            left = seq_len = round_seq_len(sizes[i], longest)
            row = len(rows.setdefault(seq_len, []))
            rows[seq_len].append([])
        rows[seq_len][row].append(i)
        bisect.insort(free, (left - sizes[i], seq_len, row))
    return rows


def round_seq_len(n: int, longest: int) -> int:
    """The shortest row of n columns: SHORTEST_ROW, 4 x, 16 x, ..., or `longest` rounded up."""
    seq_len, whole = MIN_SEQ_LEN, -(-longest // MIN_SEQ_LEN) * MIN_SEQ_LEN
    while seq_len < n:
        seq_len *= SEQ_LEN_GROWTH
    return whole if n <= whole < seq_len else seq_len


def fill_tree_arrays(
    pieces: Sequence[ScoredSequence], rows: list[list[PrefixTree]], n_rows: int, seq_len: int
) -> TreeBatch:
    """Fill the arrays of one batch."""
    arrays = TreeArrays(*(np.zeros((n_rows, seq_len), np.int32) for _ in TreeArrays._fields))
    arrays.visible_until[:] = np.arange(1, seq_len + 1)
    places, most = [], 0
    for row, trees in enumerate(rows):
        column = asked = 0
        for tree in trees:
            path = np.empty(0, np.int64)  # the columns of the piece before, from the root on
            for i, shared in tree.members:
                ids, n_asked = pieces[i]
                arrays.visible_until[row, path[shared:]] = (
                    column  # what the two do not share is closed to what follows
                )
                new = np.arange(column, column + len(ids) - 1 - shared)
                arrays.tokens[row, new], arrays.positions[row, new] = (
                    ids[shared:-1],
                    np.arange(shared, len(ids) - 1),
                )
                path = np.concatenate([path[:shared], new])
                questions = slice(asked, asked + n_asked)
                arrays.columns[row, questions], arrays.targets[row, questions] = (
                    path[-n_asked:],
                    ids[-n_asked:],
                )
                places.append((i, row, asked))
                column, asked = column + len(new), asked + n_asked
            arrays.visible_until[row, path] = column
        most = max(most, asked)
    return TreeBatch(arrays, most, places)
