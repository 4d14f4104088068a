"""Direct preference optimization: the loss of pairs of answers against a frozen reference.

In a sequence, documents 1 and 2 are the chosen and the rejected answer to one prompt, 3 and 4 to
another.

Source: Rafailov et al., 2305.18290, equation 7.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model import loss
from jaxpt.spec import Batch


class PairLosses(NamedTuple):
    """The loss of the pairs of a batch, as sums over them: float32 scalars.

    Attributes:
        token_weights: float32 [B, T], derivative of the summed loss by each target's nats.
        loss_sum: of -log sigmoid(margin).
        margin_sum: of beta x (log-ratio of chosen - log-ratio of rejected).
        n_right: pairs with a margin above 0.
    """

    token_weights: Array
    loss_sum: Array
    margin_sum: Array
    n_right: Array


def compute_target_nats(
    hidden: Array, lm_head: Array, batch: Batch, chunk_tokens: int, softcap: float | None
) -> Array:
    """Return the nats of each target, float32 [B, T], 0 where not trained; by chunks of logits."""

    def score(_: None, chunk: tuple[Array, Any]) -> tuple[None, Array]:
        hidden, (targets, mask) = chunk
        found = loss.compute_log_likelihoods(hidden, lm_head, targets, softcap)
        return None, -found[0] * mask

    per_token = (batch.targets, batch.loss_mask)
    chunks = loss.split_token_chunks(chunk_tokens, hidden, per_token)
    _, nats = jax.lax.scan(score, None, chunks)
    return loss.join_token_chunks(nats)


def sum_answers(values: Array, segment_ids: Array) -> Array:
    """Return [B, T] summed over each answer, [B, pairs, 2]: chosen, rejected."""
    B, T = values.shape
    n_answers = T + T % 2  # at most
    sums = jnp.zeros((B, n_answers + 1), jnp.float32)
    sums = sums.at[jnp.arange(B)[:, None], segment_ids].add(values)
    return sums[:, 1:].reshape(B, n_answers // 2, 2)


def find_pairs(batch: Batch) -> Array:
    """Return 1 for each pair of which both answers have targets, else 0: float32 [B, pairs]."""
    n_targets = sum_answers(batch.loss_mask, batch.segment_ids)
    return jnp.all(n_targets > 0, axis=-1).astype(jnp.float32)


def measure_pairs(nats: Array, reference_nats: Array, batch: Batch, beta: float) -> PairLosses:
    """Return the loss of the pairs of a batch.

    Args:
        nats: of each target by the model, float32 [B, T].
        reference_nats: by the reference.
        batch: with the pairs.
        beta: how strongly a log-ratio counts.
    """
    log_ratios = sum_answers(reference_nats - nats, batch.segment_ids)
    margins = beta * (log_ratios[..., 0] - log_ratios[..., 1])
    is_pair = find_pairs(batch)
    push = beta * jax.nn.sigmoid(-margins) * is_pair
    by_answer = jnp.stack([push, -push], axis=-1).reshape(len(push), -1)
    by_answer = jnp.pad(by_answer, [(0, 0), (1, 0)])  # segment 0 is padding
    weights = jnp.take_along_axis(by_answer, batch.segment_ids, axis=1) * batch.loss_mask
    return PairLosses(
        weights,
        jnp.sum(jax.nn.softplus(-margins) * is_pair),
        jnp.sum(margins * is_pair),
        jnp.sum((margins > 0) * is_pair),
    )
