"""How likely a model finds text.

Held-out loss of packed rows, bits per byte of raw text, log-likelihood of continuations.

Pieces of text to be scored are laid several to a row, in trees that compute once what several begin
with (prefix_trees.py): their scores are those they
would have alone, little is computed for padding, and two or three row lengths are all that is
compiled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import stage
from jaxpt.evaluate import prefix_trees
from jaxpt.model import attention, llama, loss
from jaxpt.sharding import (
    make_batch_sharding,
    make_logical_sharding,
    make_replicated_sharding,
    n_shards,
)
from jaxpt.spec import Batch, ModelSpec, UserError

MAX_LOGITS_BYTES = 256  # tokens whose logits exist on a device at one time


def make_loss_step(spec: ModelSpec, mesh, dtype="float32"):
    """The jitted step(params, batch) -> (sum of weight x nats, sum of weights), float32 scalars on
    every device.
    """
    dtype = jnp.dtype(dtype)

    def step(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = llama.bind_params(spec, params)
            hidden = model(batch.tokens, batch.segment_ids, batch.positions, dtype)
            _, nats_sum = loss.cross_entropy(
                hidden, model.lm_head(dtype), batch.targets, batch.loss_mask
            )
            return nats_sum, jnp.sum(batch.loss_mask)

    return jax.jit(
        step,
        in_shardings=(llama.make_param_shardings(spec, mesh), make_batch_sharding(mesh)),
        out_shardings=make_replicated_sharding(mesh),
    )


def measure_heldout_loss(step, params, batches: Iterable[Batch]) -> float:
    """Nats per trained token over all batches.

    `step` is nats_step's. NaN when no token has weight.
    """
    nats_sum = weights_sum = 0.0
    for batch in batches:
        nats, weights = step(params, batch)
        nats_sum += float(nats)
        weights_sum += float(weights)
    return nats_sum / weights_sum if weights_sum else float("nan")


class BitsPerByte(NamedTuple):
    """Sums over texts; the one division is `bits_per_byte`."""

    loss_sum: float
    n_bytes: int  # of the texts in UTF-8
    n_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte."""
        return self.loss_sum / math.log(2) / self.n_bytes if self.n_bytes else float("nan")


def measure_bits_per_byte(
    spec: ModelSpec,
    params: dict[str, Any],
    texts: list[str],
    token_ids: list[list[int]],
    bos_id: int,
    *,
    max_length: int | None = None,
    dtype="float32",
    label: str = "bits per byte",
) -> BitsPerByte:
    """Score raw texts, each token of each exactly once, the first given `bos_id`.

    No end-of-sequence token is counted.

    token_ids   of each text, without beginning- or end-of-sequence tokens
    max_length  tokens that the model sees at once; None is its own longest. Long texts are cut by
    `rolling_windows`
    """
    windows = [
        window
        for ids in token_ids
        for window in split_rolling_windows(ids, bos_id, max_length or spec.max_seq_len)
    ]
    scores = compute_continuation_log_likelihoods(
        spec, params, windows, max_length=max_length, dtype=dtype, label=label
    )
    return BitsPerByte(
        loss_sum=-sum(nats for nats, _ in scores),
        n_bytes=sum(len(text.encode()) for text in texts),
        n_tokens=sum(map(len, token_ids)),
    )


def split_rolling_windows(
    ids: list[int], prefix_id: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(context, predicted) pairs that predict each id once.

    A window begins with the last token of the one before it; only the last window reaches back
    further, so that it too reads max_length tokens.

    Source: lm-evaluation-harness, get_rolling_token_windows with context_len=1, made disjoint.
    """
    if ids:
        yield [prefix_id], ids[:max_length]
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield ids[end - max_length - 1 : start], ids[start:end]


def compute_continuation_log_likelihoods(
    spec: ModelSpec,
    params: dict[str, Any],
    pairs: list[tuple[list[int], list[int]]],
    *,
    max_length: int | None = None,
    dtype="float32",
    label: str = "log-likelihoods",
    answered: Callable[[int, tuple[float, bool]], None] | None = None,
) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids).

    The continuation's log-likelihood in nats, and whether each of its tokens was the likeliest.
    `token_log_likelihoods` says the rest.

    answered  is called with the place in `pairs` and the result of each as soon as it is known
    """
    results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for place, likelihoods, likeliest in compute_token_log_likelihoods(
        spec, params, pairs, max_length=max_length, dtype=dtype, label=label
    ):
        results[place] = float(likelihoods.sum(dtype=np.float64)), bool(likeliest.all())
        if answered:
            answered(place, results[place])
    return results


def compute_token_log_likelihoods(
    spec: ModelSpec,
    params: dict[str, Any],
    pairs: list[tuple[list[int], list[int]]],
    *,
    max_length: int | None = None,
    dtype="float32",
    label: str = "log-likelihoods",
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each (context ids, continuation ids), in the order in which they are done.

    Its place in `pairs`, and of the continuation's tokens the log-likelihood in nats, float32 [n],
    and whether each was the likeliest, bool [n]. Too long a context loses tokens on its left.

    Raises UserError for an empty context or continuation, one that is longer than the context
    length, or an unknown id.
    """
    max_length = max_length or spec.max_seq_len
    pieces = [
        prefix_trees.ScoredSequence(
            np.asarray([*context, *continuation][-(max_length + 1) :], np.int32), len(continuation)
        )
        for context, continuation in pairs
    ]
    for (context, continuation), (ids, _) in zip(pairs, pieces, strict=True):
        if not context or not continuation:
            raise UserError(
                f"{label}: an empty "
                f"{'continuation' if context else 'context'} cannot be "
                "scored. Give at least one token."
            )
        if len(continuation) > max_length:
            raise UserError(
                f"{label}: a continuation of {len(continuation):,} tokens "
                f"does not fit the model's context of {max_length:,}. Shorten "
                "it."
            )
        wrong = ids[(ids < 0) | (ids >= spec.vocab_size)]
        if wrong.size:
            raise UserError(
                f"{label}: the text has token id {wrong[0]}, but the model "
                f"knows ids 0 to {spec.vocab_size - 1}. "
                "Use the tokenizer that the model was trained with."
            )
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step, where = (
        make_token_step(spec, mesh, jnp.dtype(dtype)),
        make_logical_sharding(mesh, ("batch", None)),
    )

    def collect(batch, scored):
        likelihoods, likeliest = (np.asarray(x) for x in scored)
        for piece, row, first in batch.places:
            asked = slice(first, first + pieces[piece].n_scored)
            yield piece, likelihoods[row, asked], likeliest[row, asked]
            advance(pieces[piece].n_columns)

    with stage.progress_bar(label, sum(piece.n_columns for piece in pieces), "tokens") as advance:
        running = None  # the device works on one batch while the host reads the one before
        # within a tree places are no distances, which a window counts
        for batch in prefix_trees.make_tree_batches(
            pieces, max_length, n_shards(mesh, "batch"), share=spec.sliding_window is None
        ):
            rows = jax.tree.map(
                lambda x: jax.make_array_from_callback(x.shape, where, x.__getitem__), batch.arrays
            )
            scored = step(params, rows, np.int32(batch.n_scored))
            if running:
                yield from collect(*running)
            running = batch, scored
        if running:
            yield from collect(*running)


@functools.lru_cache(maxsize=8)
def make_token_step(spec: ModelSpec, mesh, dtype):
    """The jitted step(params, prefix_trees.Rows, n_asked) -> (log-likelihood of each target in
    nats, whether it was the likeliest), both [B, T].

    Only each row's first n_asked questions are answered, rounded up to whole blocks of logits.
    """
    where = make_logical_sharding(mesh, ("batch", None))

    def step(params, rows: prefix_trees.TreeArrays, n_asked):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model = llama.bind_params(spec, params)

            def attend(q, k, v):
                if spec.sliding_window is None:
                    return attention.attend_prefix_tree(q, k, v, rows.visible_until)
                return attention.attend(q, k, v, rows.visible_until, spec.sliding_window)

            hidden = model.run_layers(rows.tokens, rows.positions, attend, dtype)
            asked = jnp.take_along_axis(hidden, rows.columns[..., None], axis=1)
            B, T, _ = asked.shape
            width = floor_power_of_two(max(MAX_LOGITS_BYTES * n_shards(mesh, "batch") // B, 1))
            head = model.lm_head(dtype)

            def answer(
                block,
                found,
                # some columns of all rows at a time, so that each device has logits of its own rows
                # only
            ):
                part = functools.partial(
                    jax.lax.dynamic_slice_in_dim,
                    start_index=block * width,
                    slice_size=width,
                    axis=1,
                )
                more = loss.compute_log_likelihoods(part(asked), head, part(rows.targets))
                return jax.tree.map(
                    lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                        old, new, block * width, axis=1
                    ),
                    found,
                    more,
                )

            nothing = jnp.zeros((B, T), jnp.float32), jnp.zeros((B, T), bool)
            return jax.lax.fori_loop(0, -(-n_asked // width), answer, nothing)

    return jax.jit(
        step,
        in_shardings=(
            llama.make_param_shardings(spec, mesh),
            where,
            make_replicated_sharding(mesh),
        ),
        out_shardings=make_replicated_sharding(mesh),
    )


def floor_power_of_two(n: int) -> int:
    """Return the largest power of two up to n."""
    return 1 << (n.bit_length() - 1)
