"""Cross-entropy without the logits of a whole batch. Returns sums; the caller divides once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.softcap import apply_softcap, softcap_gradient
from jaxpt.sharding import with_logical_constraint

# Tokens whose logits exist on a device at one time. A whole sequence of 4,096 with a vocabulary of
# 32,000 would be 0.5 GB in float32 and its gradient as much again. Each chunk reads the head and
# adds to its float32 gradient, D x V each, and a matmul sums over no more than the chunk. A CPU
# gains by 512 over 256 (docs/performance.md) and nothing by 1,024; an accelerator's matmuls
# outweigh that traffic with 1,024.
CPU_CHUNK_TOKENS, ACCELERATOR_CHUNK_TOKENS = 512, 1024

Sums = tuple[Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(
    hidden: Array,
    lm_head: Array,
    targets: Array,
    loss_mask: Array,
    z_loss_weight: float,
    chunk_tokens: int,
    softcap: float | None,
) -> Sums:
    def add(sums: Sums, chunk: Any) -> tuple[Sums, None]:
        hidden, targets, mask = chunk
        losses, nats, _ = compute_chunk_losses(
            hidden, lm_head, targets, mask, z_loss_weight, softcap
        )
        loss_sum, nats_sum = sums
        loss_sum += jnp.sum(losses)
        nats_sum += jnp.sum(nats)
        return (loss_sum, nats_sum), None

    zeros = (jnp.float32(0), jnp.float32(0))
    chunks = split_token_chunks(chunk_tokens, hidden, targets, loss_mask)
    sums, _ = jax.lax.scan(add, zeros, chunks)
    return sums


def cross_entropy(
    hidden: Array,
    lm_head: Array,
    targets: Array,
    loss_mask: Array,
    z_loss_weight: float = 0.0,
    chunk_tokens: int = CPU_CHUNK_TOKENS,
    softcap: float | None = None,
) -> Sums:
    """Return the summed loss and the summed nats.

    Args:
        hidden: [B, T, D], after the final norm.
        lm_head: [D, V].
        targets: int32 [B, T].
        loss_mask: float32 [B, T], weight of each target.
        z_loss_weight: of log(Z)^2, added to the first sum only (PaLM, 2204.02311, section 5).
        chunk_tokens: tokens over all devices whose logits may exist at once.
        softcap: of the logits, ModelSpec.logit_softcap.

    Returns:
        sum of mask x (nats + z_loss_weight log(Z)^2), and sum of mask x nats: float32 scalars. The
        first has gradients for hidden and lm_head; the second is for the log.
    """
    return _cross_entropy(hidden, lm_head, targets, loss_mask, z_loss_weight, chunk_tokens, softcap)


def cross_entropy_fwd(
    hidden: Array,
    lm_head: Array,
    targets: Array,
    loss_mask: Array,
    z_loss_weight: float,
    chunk_tokens: int,
    softcap: float | None,
) -> tuple[Sums, tuple[Array, Array]]:
    """Return the sums, and the gradients, computed while a chunk's logits exist.

    That takes three matmuls, where recomputing the logits in backward would take four.
    """

    def add(carry: Any, chunk: Any) -> tuple[Any, Array]:
        loss_sum, nats_sum, d_head = carry
        hidden, targets, mask = chunk
        losses, nats, d_logits = compute_chunk_losses(
            hidden, lm_head, targets, mask, z_loss_weight, softcap
        )
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, lm_head)
        float32 = jnp.float32
        d_head += jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=float32)
        loss_sum += jnp.sum(losses)
        nats_sum += jnp.sum(nats)
        return (loss_sum, nats_sum, d_head), d_hidden

    zero = jnp.float32(0)
    zeros = (zero, zero, jnp.zeros(lm_head.shape, jnp.float32))
    chunks = split_token_chunks(chunk_tokens, hidden, targets, loss_mask)
    sums, d_chunks = jax.lax.scan(add, zeros, chunks)
    loss_sum, nats_sum, d_head = sums
    d_hidden = jnp.moveaxis(d_chunks, 0, 2)
    d_hidden = d_hidden.reshape(hidden.shape)
    d_head = d_head.astype(lm_head.dtype)
    return (loss_sum, nats_sum), (d_hidden, d_head)


def cross_entropy_bwd(
    z_loss_weight: float,
    chunk_tokens: int,
    softcap: float | None,
    gradients: tuple[Array, Array],
    d_sums: Sums,
) -> tuple[Array, Array, None, None]:
    """Scale the gradients by the first sum's."""
    d_hidden, d_head = gradients
    scale = d_sums[0]
    d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
    d_head = (scale * d_head).astype(d_head.dtype)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(cross_entropy_fwd, cross_entropy_bwd)


def split_token_chunks(
    chunk_tokens: int, hidden: Array, targets: Array, loss_mask: Array
) -> tuple[Array, ...]:
    """Return [B, T, ...] as [n, B, T / n, ...]: every n-th position of each sequence.

    A device keeps its own tokens, whether the mesh shards the batch or the positions.
    """
    B, T, _ = hidden.shape
    n = 1
    while T % (2 * n) == 0 and B * T // n > chunk_tokens:
        n *= 2

    def split(x: Array) -> Array:
        chunks = x.reshape(B, T // n, n, *x.shape[2:])
        return jnp.moveaxis(chunks, 2, 0)

    return split(hidden), split(targets), split(loss_mask)


def compute_chunk_losses(
    hidden: Array,
    lm_head: Array,
    targets: Array,
    loss_mask: Array,
    z_loss_weight: float,
    softcap: float | None,
) -> tuple[Array, Array, Array]:
    """Return masked losses and nats [B, T], and the summed losses' d_logits [B, T, V], float32."""
    logits = compute_logits(hidden, lm_head, softcap)
    logits = with_logical_constraint(logits, "batch", "position", "vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = (log_z - take_target_logits(logits, targets)) * loss_mask
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    probs = jnp.exp(logits - log_z[..., None])
    z_scale = 1 + 2 * z_loss_weight * log_z
    d_logits = z_scale[..., None] * probs - is_target
    d_logits = d_logits * loss_mask[..., None]
    if softcap is not None:
        d_logits = d_logits * softcap_gradient(logits, softcap)
    losses = nats + z_loss_weight * log_z**2 * loss_mask
    return losses, nats, d_logits


def compute_logits(hidden: Array, lm_head: Array, softcap: float | None = None) -> Array:
    """Return logits [B, T, V], accumulated in float32."""
    logits = jnp.einsum("btd,dv->btv", hidden, lm_head, preferred_element_type=jnp.float32)
    return apply_softcap(logits, softcap)


def take_target_logits(logits: Array, targets: Array) -> Array:
    """Return the logit of each target, [B, T]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return chosen[..., 0]


def compute_log_likelihoods(
    hidden: Array, lm_head: Array, targets: Array, softcap: float | None = None
) -> Sums:
    """Return log-likelihoods in nats, and whether the target was the likeliest token; both [B, T].

    All logits exist at once: pass few tokens.
    """
    logits = compute_logits(hidden, lm_head, softcap)
    target_logits = take_target_logits(logits, targets)
    is_likeliest = jnp.argmax(logits, axis=-1) == targets
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return target_logits - log_z, is_likeliest
