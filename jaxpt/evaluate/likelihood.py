"""Compute log-likelihoods of text: held-out loss, bits per byte, continuations.

Sequences to be scored are laid out as prefix trees, several to a row, so that a shared prefix is
computed once (prefix_trees.py). Scores are those that a sequence would have alone, little is
computed for padding, and two or three row lengths are all that is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt import stage
from jaxpt.evaluate import prefix_trees
from jaxpt.model import loss, transformer
from jaxpt.model.kernels.blockwise import attend_prefix_tree
from jaxpt.model.kernels.select import attend
from jaxpt.sharding import (
    make_batch_sharding,
    make_logical_sharding,
    make_replicated_sharding,
    n_shards,
)
from jaxpt.spec import Batch, ModelSpec, Record, UserError, describe_nonfinite

MAX_LOGITS_TOKENS = 256  # tokens whose logits exist on a device at a time

Step = Callable[..., Any]
TokenPair = tuple[list[int], list[int]]  # context and continuation, token ids
Score = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would write it


def make_loss_step(spec: ModelSpec, mesh: jax.sharding.Mesh, dtype: str = "float32") -> Step:
    """Return a jitted step(params, batch) that sums the loss of a batch.

    It returns float32 scalars on every device: the loss in nats over the tokens of loss_mask, and
    their number.
    """
    compute_dtype = jnp.dtype(dtype)

    def step(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            inputs = batch.tokens, batch.segment_ids, batch.positions
            hidden, _ = transformer.forward(spec, params, *inputs, compute_dtype)
            head = transformer.lm_head(spec, params, compute_dtype)
            loss_mask = batch.loss_mask
            _, loss_sum = loss.cross_entropy(
                hidden, head, batch.targets, loss_mask, softcap=spec.logit_softcap
            )
            return loss_sum, jnp.sum(loss_mask)

    param_shardings = transformer.make_param_shardings(spec, mesh)
    replicated = make_replicated_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(param_shardings, make_batch_sharding(mesh)),
        out_shardings=replicated,
    )


def measure_heldout_loss(step: Step, params: transformer.Params, batches: Iterable[Batch]) -> float:
    """Return nats per trained token over all batches, NaN if no token is trained.

    Args:
        step: as `make_loss_step` returns it.
        params: of the model.
        batches: global batches.
    """
    loss_sum = n_trained = 0.0
    for batch in batches:
        batch_loss, batch_trained = step(params, batch)
        loss_sum += float(batch_loss)
        n_trained += float(batch_trained)
    if not n_trained:
        return math.nan
    return loss_sum / n_trained


@dataclasses.dataclass(frozen=True)
class BitsPerByte(Record):
    """Sums over texts; the one division is `bits_per_byte`."""

    loss_sum: float  # nats
    n_bytes: int  # of the texts in UTF-8
    n_tokens: int  # predicted; no beginning- or end-of-sequence tokens
    n_lost_bytes: int = 0  # of n_bytes: what the tokens do not spell
    stderr: float | None = None  # of bits_per_byte, over texts; None: of one text

    @property
    def reason(self) -> str:
        """Return why bits_per_byte is no number to print, or ""."""
        if self.n_lost_bytes:
            share = self.n_lost_bytes / self.n_bytes
            return (
                f"the tokenizer cannot spell {self.n_lost_bytes:,} of {self.n_bytes:,} bytes "
                f"({share:.2%}): decode(encode(text)) is not the text, so its bits per byte "
                "compare with no other tokenizer's"
            )
        return describe_nonfinite(self.bits_per_byte)

    @property
    def bits_per_byte(self) -> float:
        """Return bits per UTF-8 byte, NaN without text."""
        if not self.n_bytes:
            return math.nan
        return self.loss_sum / math.log(2) / self.n_bytes


def measure_bits_per_byte(
    spec: ModelSpec,
    params: transformer.Params,
    texts: list[str],
    token_ids: list[list[int]],
    bos_id: int,
    *,
    max_length: int | None = None,
    dtype: str = "float32",
    label: str = "bits per byte",
) -> BitsPerByte:
    """Score each token of raw texts once, the first given `bos_id`.

    Args:
        spec: the architecture.
        params: of the model.
        texts: the documents.
        token_ids: of each text, without beginning- or end-of-sequence tokens.
        bos_id: the token in front of each text.
        max_length: tokens that the model sees at once; None: its own context. Longer texts are
            split by `split_rolling_windows`.
        dtype: of matmuls and activations.
        label: of the progress bar.
    """
    max_length = max_length or spec.max_seq_len
    windows, owners = split_all(token_ids, bos_id, max_length)
    scores = compute_continuation_log_likelihoods(
        spec, params, windows, max_length=max_length, dtype=dtype, label=label
    )
    return sum_over_texts(texts, token_ids, owners, [score for score, _ in scores])


def split_all(
    token_ids: list[list[int]], prefix_id: int, max_length: int
) -> tuple[list[TokenPair], list[int]]:
    """Return the rolling windows of all texts, and the number of the text of each."""
    windows: list[TokenPair] = []
    owners: list[int] = []
    for number, ids in enumerate(token_ids):
        windows += split_rolling_windows(ids, prefix_id, max_length)
        owners += [number] * (len(windows) - len(owners))
    return windows, owners


def sum_over_texts(
    texts: list[str], token_ids: list[list[int]], owners: list[int], scores: list[float]
) -> BitsPerByte:
    """Return bits per byte from the log-likelihoods of all windows, each owned by a text."""
    losses = -np.bincount(owners, scores, len(texts))
    n_bytes = np.array([len(text.encode()) for text in texts])
    n_tokens = sum(map(len, token_ids))
    stderr = estimate_ratio_error(losses / math.log(2), n_bytes)
    return BitsPerByte(-sum(scores), int(n_bytes.sum()), n_tokens, stderr=stderr)


def estimate_ratio_error(amounts: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the standard error of sum(amounts) / sum(sizes) over items (delta method).

    None if there is one item, or nothing to divide by.
    """
    n, total = len(amounts), float(np.sum(sizes))
    if n < 2 or not total:
        return None
    residuals = amounts - float(np.sum(amounts)) / total * sizes
    return math.sqrt(float(np.sum(residuals**2)) * n / (n - 1)) / total


def split_rolling_windows(ids: list[int], prefix_id: int, max_length: int) -> Iterator[TokenPair]:
    """Yield (context, predicted) pairs that predict each id once.

    A window begins with the last token of the one before it; only the last window reaches back
    further, so that it also reads max_length tokens.

    Source: lm-evaluation-harness, get_rolling_token_windows with context_len=1, made disjoint.
    """
    if ids:
        yield [prefix_id], ids[:max_length]
    for start in range(max_length, len(ids), max_length):
        end = min(start + max_length, len(ids))
        context = ids[end - max_length - 1 : start]
        yield context, ids[start:end]


def compute_continuation_log_likelihoods(
    spec: ModelSpec,
    params: transformer.Params,
    pairs: list[TokenPair],
    *,
    max_length: int | None = None,
    dtype: str = "float32",
    label: str = "log-likelihoods",
    answered: Callable[[int, Score], None] | None = None,
) -> list[Score]:
    """Score the continuation of each (context ids, continuation ids) as a whole.

    Args:
        spec: the architecture.
        params: of the model.
        pairs: what to score; see `compute_token_log_likelihoods`, also for the errors.
        max_length: tokens that the model sees at once; None: its own context.
        dtype: of matmuls and activations.
        label: of the progress bar and the errors.
        answered: called with an index into pairs and the result as soon as that is known.

    Returns:
        The score of each pair.
    """
    results: list[Score] = [(0.0, True)] * len(pairs)
    scored = compute_token_log_likelihoods(
        spec, params, pairs, max_length=max_length, dtype=dtype, label=label
    )
    for place, log_likelihoods, is_greedy in scored:
        total = float(log_likelihoods.sum(dtype=np.float64))
        score = total, bool(is_greedy.all())
        results[place] = score
        if answered:
            answered(place, score)
    return results


def compute_token_log_likelihoods(
    spec: ModelSpec,
    params: transformer.Params,
    pairs: list[TokenPair],
    *,
    max_length: int | None = None,
    dtype: str = "float32",
    label: str = "log-likelihoods",
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Score each token of the continuation of each (context ids, continuation ids).

    A context that is too long loses tokens on its left.

    Args:
        spec: the architecture.
        params: of the model.
        pairs: what to score.
        max_length: tokens that the model sees at once; None: its own context.
        dtype: of matmuls and activations.
        label: of the progress bar and the errors.

    Yields:
        In the order in which they are computed: index into pairs, log-likelihoods of the
        continuation's tokens in nats, float32 [n], and whether each is the most likely, bool [n].

    Raises:
        UserError: a context or continuation is empty, a continuation is longer than the context
            length, or an id is unknown.
    """
    max_length = max_length or spec.max_seq_len
    sequences = []
    for context, continuation in pairs:
        whole = [*context, *continuation]
        ids = np.asarray(whole[-(max_length + 1) :], np.int32)
        check_scored_pair(spec, context, continuation, ids, max_length, label)
        sequences.append(prefix_trees.ScoredSequence(ids, len(continuation)))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    step = make_token_step(spec, mesh, jnp.dtype(dtype))
    row_sharding = make_logical_sharding(mesh, ("batch", None))
    n_columns = sum(sequence.n_columns for sequence in sequences)
    # the columns of a tree are no distances, which a sliding window counts
    share = spec.sliding_window is None
    batch_shards = n_shards(mesh, "batch")
    batches = prefix_trees.make_tree_batches(sequences, max_length, batch_shards, share)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, row_sharding, x.__getitem__)

    with stage.progress_bar(label, n_columns, "tokens") as advance:

        def collect(batch: prefix_trees.TreeBatch, scored):
            log_likelihoods, is_greedy = map(np.asarray, scored)
            for place, row, first in batch.places:
                sequence = sequences[place]
                targets = slice(first, first + sequence.n_scored)
                yield place, log_likelihoods[row, targets], is_greedy[row, targets]
                advance(sequence.n_columns)

        running = None  # the devices compute one batch while the host reads the one before
        for batch in batches:
            arrays = jax.tree.map(put, batch.arrays)
            scored = step(params, arrays, np.int32(batch.n_scored))
            if running:
                yield from collect(*running)
            running = batch, scored
        if running:
            yield from collect(*running)


def check_scored_pair(
    spec: ModelSpec,
    context: list[int],
    continuation: list[int],
    ids: np.ndarray,
    max_length: int,
    label: str,
) -> None:
    """Raise UserError if a pair cannot be scored. ids: both, as the model sees them."""
    if not context or not continuation:
        empty = "continuation" if context else "context"
        raise UserError(f"{label}: an empty {empty} cannot be scored. Give at least one token.")
    if len(continuation) > max_length:
        raise UserError(
            f"{label}: a continuation of {len(continuation):,} tokens does not fit the model's "
            f"context of {max_length:,}. Shorten it."
        )
    is_unknown = (ids < 0) | (ids >= spec.vocab_size)
    unknown = ids[is_unknown]
    if unknown.size:
        raise UserError(
            f"{label}: the text has token id {unknown[0]}, but the model knows ids 0 to "
            f"{spec.vocab_size - 1}. Use the tokenizer that the model was trained with."
        )


@functools.lru_cache(maxsize=8)
def make_token_step(spec: ModelSpec, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Step:
    """Return a jitted step(params, TreeArrays, n_scored) that scores each target.

    It returns, for each target [B, T], its log-likelihood in nats and whether it is the most
    likely. Only the first n_scored targets of each row are scored, rounded up to whole blocks of
    logits.
    """

    def step(params, arrays: prefix_trees.TreeArrays, n_scored):
        visible_until = arrays.visible_until
        softcap = spec.attention_softcap

        def attend_rows(q, k, v, window, state):
            if spec.sliding_window is None:
                return attend_prefix_tree(q, k, v, visible_until, softcap), state
            return attend(q, k, v, visible_until, window, softcap=softcap), state

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            inputs = arrays.tokens, arrays.positions
            hidden, _ = transformer.forward_with(attend_rows, spec, params, *inputs, dtype)
            queries = jnp.take_along_axis(hidden, arrays.columns[..., None], axis=1)
            B, T, _ = queries.shape
            block_tokens = MAX_LOGITS_TOKENS * n_shards(mesh, "batch")
            width = floor_power_of_two(max(block_tokens // B, 1))
            head = transformer.lm_head(spec, params, dtype)

            # a block is some columns of all rows, so that each device has the logits of its own
            # rows only
            def score_block(block, scores):
                start = block * width

                def take(x):
                    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)

                def put(old, new):
                    return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

                found = loss.compute_log_likelihoods(
                    take(queries), head, take(arrays.targets), spec.logit_softcap
                )
                return jax.tree.map(put, scores, found)

            no_scores = jnp.zeros((B, T), jnp.float32), jnp.zeros((B, T), bool)
            n_blocks = -(-n_scored // width)
            return jax.lax.fori_loop(0, n_blocks, score_block, no_scores)

    param_shardings = transformer.make_param_shardings(spec, mesh)
    row_sharding = make_logical_sharding(mesh, ("batch", None))
    replicated = make_replicated_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(param_shardings, row_sharding, replicated),
        out_shardings=replicated,
    )


def floor_power_of_two(n: int) -> int:
    """Return the largest power of two up to n."""
    return 1 << (n.bit_length() - 1)
