"""Cross-entropy without ever holding the logits of a whole batch. Returns sums: the one division is the caller's, at the end."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxpt.sharding import with_logical_constraint

# Tokens whose logits exist on a device at one time. A whole row of 4,096 with a vocabulary of 32,000 would be 0.5 GB in float32 and its
# gradient as much again. Each chunk reads the head and adds to its float32 gradient, D x V each, and a product sums over no more than
# the chunk. A CPU gains by 512 over 256 (docs/performance.md) and nothing by 1,024; an accelerator's products outweigh that traffic with 1,024.
CPU_CHUNK_TOKENS, ACCELERATOR_CHUNK_TOKENS = 512, 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    z_loss_weight: float = 0.0,
    chunk_tokens: int = CPU_CHUNK_TOKENS,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and its summed nats.

    hidden   [B, T, D]   after the final norm
    head     [D, V]
    targets  [B, T]      int32
    weights  [B, T]      float32
    z_loss   weight of log(Z)^2, added to the first sum only (PaLM, 2204.02311, section 5)
    at_a_time  tokens over all devices whose logits may exist at once

    Returns (sum of weight x (nats + z_loss log(Z)^2), sum of weight x nats), float32 scalars. The first sum has gradients, by
    hidden and by head; the second is for the log.
    """

    def add(sums, chunk):
        hidden, targets, weights = chunk
        losses, nats, _ = compute_chunk_losses(hidden, lm_head, targets, weights, z_loss_weight)
        return (sums[0] + jnp.sum(losses), sums[1] + jnp.sum(nats)), None

    return jax.lax.scan(
        add,
        (jnp.float32(0), jnp.float32(0)),
        split_token_chunks(chunk_tokens, hidden, targets, loss_mask),
    )[0]


def cross_entropy_fwd(hidden, head, targets, weights, z_loss, at_a_time):
    """The sums, and the gradients by hidden and head, taken while a chunk's logits are there: three products, where
    computing the logits again in the backward pass would take four.
    """
    B, T, D = hidden.shape

    def add(carry, chunk):
        loss_sum, nats_sum, by_head = carry
        hidden, targets, weights = chunk
        losses, nats, by_logits = compute_chunk_losses(hidden, head, targets, weights, z_loss)
        by_logits = by_logits.astype(hidden.dtype)
        by_hidden = jnp.einsum("btv,dv->btd", by_logits, head)
        by_head += jnp.einsum("btd,btv->dv", hidden, by_logits, preferred_element_type=jnp.float32)
        return (loss_sum + jnp.sum(losses), nats_sum + jnp.sum(nats), by_head), by_hidden

    zeros = (jnp.float32(0), jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (loss_sum, nats_sum, by_head), by_hidden = jax.lax.scan(
        add, zeros, split_token_chunks(at_a_time, hidden, targets, weights)
    )
    return (loss_sum, nats_sum), (
        jnp.moveaxis(by_hidden, 0, 2).reshape(B, T, D),
        by_head.astype(head.dtype),
    )


def cross_entropy_bwd(z_loss, at_a_time, gradients, by_sums):
    by_hidden, by_head = gradients
    scale = by_sums[0]
    return (
        (scale * by_hidden).astype(by_hidden.dtype),
        (scale * by_head).astype(by_head.dtype),
        None,
        None,
    )


cross_entropy.defvjp(cross_entropy_fwd, cross_entropy_bwd)


def split_token_chunks(at_a_time, hidden, targets, weights):
    """[B, T, ...] -> [n, B, T / n, ...], every n-th position of each row: a device keeps its own, whether the mesh cuts rows apart or across."""
    B, T, _ = hidden.shape
    n = 1
    while T % (2 * n) == 0 and B * T // n > at_a_time:
        n *= 2
    return tuple(
        jnp.moveaxis(x.reshape(B, T // n, n, *x.shape[2:]), 2, 0)
        for x in (hidden, targets, weights)
    )


def compute_chunk_losses(hidden, head, targets, weights, z_loss):
    """Of one chunk: weighted losses and nats [B, T], and the gradient of the summed losses by the logits [B, T, V], float32."""
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    logits = with_logical_constraint(logits, "batch", "position", "vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = (log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]) * weights
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    shares = jnp.exp(logits - log_z[..., None])
    by_logits = ((1 + 2 * z_loss * log_z)[..., None] * shares - hit) * weights[..., None]
    return nats + z_loss * log_z**2 * weights, nats, by_logits


def compute_log_likelihoods(
    hidden: jax.Array, lm_head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Per-token log-likelihood in nats and whether the target was the likeliest token; both [B, T]. All logits exist at once: give few tokens."""
    logits = jnp.einsum("btd,dv->btv", hidden, lm_head, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
