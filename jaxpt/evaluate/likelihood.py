"""How likely a model finds text: held-out loss of packed rows, bits per byte of raw text, log-likelihood of continuations.

Pieces of text to be scored are packed several to a row, as in training: a document does not see its neighbours, so their
scores are those they would have alone, little is computed for padding, and two or three row lengths are all that is compiled.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import stage
from jaxpt.model import llama, loss
from jaxpt.sharding import batch_sharding, n_shards, replicated
from jaxpt.spec import Batch, ModelSpec, UserError

SHORTEST_ROW = 256  # tokens; longer pieces take rows 4, 16, ... times as long, up to the model's context
TOKENS_AT_A_TIME = 4096  # on each device in one step
LOGITS_AT_A_TIME = 256  # tokens of these whose logits exist at one time


def nats_step(spec: ModelSpec, mesh, dtype="float32"):
    """The jitted step(params, batch) -> (sum of weight x nats, sum of weights), float32 scalars on every device."""
    dtype = jnp.dtype(dtype)

    def step(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = llama.bind(spec, params)
            hidden = model(batch.tokens, batch.segments, batch.positions, dtype)
            _, nats_sum = loss.cross_entropy(hidden, model.head(dtype), batch.targets, batch.weights)
            return nats_sum, jnp.sum(batch.weights)

    return jax.jit(step, in_shardings=(llama.shardings(spec, mesh), batch_sharding(mesh)), out_shardings=replicated(mesh))


def heldout_loss(step, params, batches: Iterable[Batch]) -> float:
    """Nats per trained token over all batches; `step` is nats_step's. NaN when no token has weight."""
    nats_sum = weights_sum = 0.0
    for batch in batches:
        nats, weights = step(params, batch)
        nats_sum += float(nats)
        weights_sum += float(weights)
    return nats_sum / weights_sum if weights_sum else float("nan")


class BitsPerByte(NamedTuple):
    """Sums over texts; the one division is `bits_per_byte`."""

    nats_sum: float
    bytes_sum: int  # of the texts in UTF-8
    tokens_sum: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats_sum / math.log(2) / self.bytes_sum if self.bytes_sum else float("nan")


def bits_per_byte(
    spec: ModelSpec, params: dict[str, Any], texts: list[str], token_ids: list[list[int]], bos_id: int, *,
    max_length: int | None = None, dtype="float32", label: str = "bits per byte",
) -> BitsPerByte:  # fmt: skip
    """Score raw texts, each token of each exactly once, the first given `bos_id`; no end-of-sequence token is counted.

    token_ids   of each text, without beginning- or end-of-sequence tokens
    max_length  tokens that the model sees at once; None is its own longest. Long texts are cut by `rolling_windows`
    """
    windows = [window for ids in token_ids for window in rolling_windows(ids, bos_id, max_length or spec.max_positions)]
    scores = continuation_log_likelihoods(spec, params, windows, max_length=max_length, dtype=dtype, label=label)
    return BitsPerByte(
        nats_sum=-sum(nats for nats, _ in scores), bytes_sum=sum(len(text.encode()) for text in texts), tokens_sum=sum(map(len, token_ids))
    )


def rolling_windows(ids: list[int], prefix_id: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, predicted) pairs that predict each id once. A window begins with the last token of the one before it; only
    the last window reaches back further, so that it too reads max_length tokens.

    Source: lm-evaluation-harness, get_rolling_token_windows with context_len=1, made disjoint.
    """
    if ids:
        yield [prefix_id], ids[:max_length]
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield ids[end - max_length - 1 : start], ids[start:end]


def continuation_log_likelihoods(
    spec: ModelSpec, params: dict[str, Any], pairs: list[tuple[list[int], list[int]]], *,
    max_length: int | None = None, dtype="float32", label: str = "log-likelihoods", answered: Callable[[int, tuple[float, bool]], None] | None = None,
) -> list[tuple[float, bool]]:  # fmt: skip
    """For each (context ids, continuation ids): the continuation's log-likelihood in nats, and whether each of its tokens
    was the likeliest. `token_log_likelihoods` says the rest.

    answered  is told the place in `pairs` and the result of each as soon as it is known
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for place, likelihoods, likeliest in token_log_likelihoods(spec, params, pairs, max_length=max_length, dtype=dtype, label=label):
        results[place] = float(likelihoods.sum(dtype=np.float64)), bool(likeliest.all())
        if answered:
            answered(place, results[place])
    return results


def token_log_likelihoods(
    spec: ModelSpec, params: dict[str, Any], pairs: list[tuple[list[int], list[int]]], *,
    max_length: int | None = None, dtype="float32", label: str = "log-likelihoods",
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:  # fmt: skip
    """For each (context ids, continuation ids), in the order in which they are done: its place in `pairs`, and of the
    continuation's tokens the log-likelihood in nats, float32 [n], and whether each was the likeliest, bool [n]. Too long a
    context loses tokens on its left.

    Raises UserError for an empty context or continuation, one that is longer than the context length, or an unknown id.
    """
    max_length = max_length or spec.max_positions
    pieces = [(np.asarray([*context, *continuation][-(max_length + 1) :], np.int32), len(continuation)) for context, continuation in pairs]
    for (context, continuation), (ids, _) in zip(pairs, pieces, strict=True):
        if not context or not continuation:
            raise UserError(f"{label}: an empty {'continuation' if context else 'context'} cannot be scored. Give at least one token.")
        if len(continuation) > max_length:
            raise UserError(
                f"{label}: a continuation of {len(continuation):,} tokens does not fit the model's context of {max_length:,}. Shorten it."
            )
        wrong = ids[(ids < 0) | (ids >= spec.vocab_size)]
        if wrong.size:
            raise UserError(
                f"{label}: the text has token id {wrong[0]}, but the model knows ids 0 to {spec.vocab_size - 1}. "
                "Use the tokenizer that the model was trained with."
            )
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = token_step(spec, mesh, jnp.dtype(dtype))

    def collect(batch, scored):
        likelihoods, likeliest = (np.asarray(x) for x in scored)
        for piece, row, start in batch.places:
            ids, n_scored = pieces[piece]
            end = start + len(ids) - 1
            span = slice(end - n_scored, end)
            yield piece, likelihoods[row, span], likeliest[row, span]
            advance(len(ids) - 1)

    with stage.progress(label, sum(len(ids) - 1 for ids, _ in pieces), "tokens") as advance:
        running = None  # the device works on one batch while the host reads the one before
        for batch in packed_batches([ids for ids, _ in pieces], max_length, n_shards(mesh, "batch")):
            scored = step(params, jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, batch_sharding(mesh), x.__getitem__), batch.arrays))
            if running:
                yield from collect(*running)
            running = batch, scored
        if running:
            yield from collect(*running)


@functools.lru_cache(maxsize=8)
def token_step(spec: ModelSpec, mesh, dtype):
    """The jitted step(params, batch) -> (log-likelihood of each target in nats, whether it was the likeliest), both [B, T]."""

    def step(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = llama.bind(spec, params)
            hidden = model(batch.tokens, batch.segments, batch.positions, dtype)
            B, T, _ = hidden.shape
            columns = power_of_two_below(max(LOGITS_AT_A_TIME * n_shards(mesh, "batch") // B, 1))

            def cut(x):  # some columns of all rows at a time, so that each device has logits of its own rows only
                return jnp.moveaxis(x.reshape(B, T // columns, columns, *x.shape[2:]), 1, 0).reshape(T // columns, B * columns, *x.shape[2:])

            scored = loss.log_likelihoods(cut(hidden), model.head(dtype), cut(batch.targets))
            return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(T // columns, B, columns), 0, 1).reshape(B, T), scored)

    return jax.jit(step, in_shardings=(llama.shardings(spec, mesh), batch_sharding(mesh)), out_shardings=replicated(mesh))


class PackedBatch(NamedTuple):
    arrays: Batch  # numpy
    places: list[tuple[int, int, int]]  # (piece, row, first column)


def packed_batches(pieces: list[np.ndarray], max_length: int, n_pieces_of_batch: int) -> Iterator[PackedBatch]:
    """The pieces as Batches: piece p, of n + 1 ids, fills n columns of one row as tokens and targets."""
    for row_len, rows in pack(pieces, max_length).items():
        per_batch = min(max(TOKENS_AT_A_TIME // row_len, 1), math.ceil(len(rows) / n_pieces_of_batch)) * n_pieces_of_batch
        for first in range(0, len(rows), per_batch):
            shape = (per_batch, row_len)
            arrays = Batch(*(np.zeros(shape, np.int32) for _ in range(4)), np.zeros(shape, np.float32))
            places = []
            for row, members in enumerate(rows[first : first + per_batch]):
                column = 0
                for segment, piece in enumerate(members, 1):
                    ids = pieces[piece]
                    span = slice(column, column + len(ids) - 1)
                    arrays.tokens[row, span], arrays.targets[row, span] = ids[:-1], ids[1:]
                    arrays.segments[row, span], arrays.positions[row, span] = segment, np.arange(len(ids) - 1)
                    arrays.weights[row, span] = 1
                    places.append((piece, row, column))
                    column += len(ids) - 1
            yield PackedBatch(arrays, places)


def pack(pieces: list[np.ndarray], max_length: int) -> dict[int, list[list[int]]]:
    """Row length -> rows, each a list of pieces. Best fit, longest first: a piece goes to the fullest row that still holds
    it, or opens a row of the shortest length that does."""
    rows: dict[int, list[list[int]]] = {}
    free: list[tuple[int, int, int]] = []  # (columns left, row length, row), sorted
    for piece in sorted(range(len(pieces)), key=lambda piece: -len(pieces[piece])):
        n = len(pieces[piece]) - 1
        found = bisect.bisect_left(free, (n, 0, 0))
        if found < len(free):
            left, row_len, row = free.pop(found)
        else:
            left = row_len = row_length(n, max_length)
            row = len(rows.setdefault(row_len, []))
            rows[row_len].append([])
        rows[row_len][row].append(piece)
        bisect.insort(free, (left - n, row_len, row))
    return rows


def row_length(n: int, max_length: int) -> int:
    row_len = SHORTEST_ROW
    while row_len < n:
        row_len *= 4
    return min(row_len, -(-max_length // SHORTEST_ROW) * SHORTEST_ROW)


def power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)
