"""Cross-entropy without the logits of a whole batch. Returns sums; the caller divides once.

`sum_chunks` serves any loss of logits whose gradient is known in closed form (model/distill.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxpt.model.kernels.cpu_matmul import keep_form
from jaxpt.model.softcap import apply_softcap, softcap_gradient
from jaxpt.sharding import n_shards, with_logical_constraint

# Tokens whose logits exist on a device at one time. A whole sequence of 4,096 with a vocabulary of
# 32,000 would be 0.5 GB in float32 and its gradient as much again. Each chunk reads the head and
# adds to its float32 gradient, D x V each, and a matmul sums over no more than the chunk. A CPU
# gains by 512 over 256 (docs/performance.md) and nothing by 1,024; an accelerator's matmuls
# outweigh that traffic with 1,024.
CPU_CHUNK_TOKENS, ACCELERATOR_CHUNK_TOKENS = 512, 1024

Sums = tuple[Array, Array]
# (hidden states of a chunk, output head, arrays per token, other arrays) -> (losses, what is
# reported beside them, d_logits of the summed losses): [B, T], and [B, T, V]
MeasureChunk = Callable[[Array, Array, Any, Any], tuple[Array, tuple[Array, ...], Array]]


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

    def measure(hidden: Array, lm_head: Array, per_token: Any, _: Any) -> Any:
        targets, mask = per_token
        logits = compute_chunk_logits(hidden, lm_head, softcap)
        losses, nats, d_logits = measure_targets(logits, targets, z_loss_weight)
        d_logits = pass_softcap(d_logits * mask[..., None], logits, softcap)
        return losses * mask, (nats * mask,), d_logits

    per_token = (targets, loss_mask)
    sums: Any = sum_chunks(measure, chunk_tokens, hidden, lm_head, per_token, ())
    loss_sum, nats_sum = sums
    return loss_sum, nats_sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_chunks(
    measure: MeasureChunk,
    chunk_tokens: int,
    hidden: Array,
    lm_head: Array,
    per_token: Any,
    shared: Any,
) -> tuple[Array, ...]:
    """Return the sums of losses and reports over all tokens, by chunks of them.

    Args:
        measure: computes a chunk's.
        chunk_tokens: tokens over all devices whose logits may exist at once.
        hidden: [B, T, D].
        lm_head: [D, V].
        per_token: arrays [B, T, ...].
        shared: arrays that every chunk reads.

    Returns:
        float32 scalars. The first has gradients for hidden and lm_head.
    """

    def add(carry: None, chunk: Any) -> tuple[None, tuple[Array, ...]]:
        hidden, per_token = chunk
        losses, reports, _ = measure(hidden, lm_head, per_token, shared)
        return carry, tuple(map(jnp.sum, (losses, *reports)))

    chunks = split_token_chunks(chunk_tokens, hidden, per_token)
    _, sums = jax.lax.scan(add, None, chunks)
    return tuple(map(jnp.sum, sums))


def sum_chunks_fwd(
    measure: MeasureChunk,
    chunk_tokens: int,
    hidden: Array,
    lm_head: Array,
    per_token: Any,
    shared: Any,
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    """Return the sums, and the gradients, computed while a chunk's logits exist.

    That takes three matmuls, where recomputing the logits in backward would take four.
    """

    def add(d_head: Array, chunk: Any) -> tuple[Array, Any]:
        hidden, per_token = chunk
        losses, reports, d_logits = measure(hidden, lm_head, per_token, shared)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, lm_head)
        float32 = jnp.float32
        d_head += keep_form(
            jnp.einsum("btd,btv->dv", hidden, d_logits, preferred_element_type=float32)
        )
        return d_head, (tuple(map(jnp.sum, (losses, *reports))), d_hidden)

    chunks = split_token_chunks(chunk_tokens, hidden, per_token)
    d_head, (sums, d_chunks) = jax.lax.scan(add, jnp.zeros(lm_head.shape, jnp.float32), chunks)
    d_hidden = join_token_chunks(d_chunks)
    return tuple(map(jnp.sum, sums)), (d_hidden, d_head.astype(lm_head.dtype))


def sum_chunks_bwd(
    measure: MeasureChunk,
    chunk_tokens: int,
    gradients: tuple[Array, Array],
    d_sums: tuple[Array, ...],
) -> tuple[Array, Array, None, None]:
    """Scale the gradients by the first sum's."""
    d_hidden, d_head = gradients
    scale = d_sums[0]
    d_hidden = (scale * d_hidden).astype(d_hidden.dtype)
    d_head = (scale * d_head).astype(d_head.dtype)
    return d_hidden, d_head, None, None


sum_chunks.defvjp(sum_chunks_fwd, sum_chunks_bwd)


def count_chunk_tokens(mesh: Mesh) -> int:
    """Return the tokens over all devices whose logits may exist at once."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    per_device = CPU_CHUNK_TOKENS if on_cpu else ACCELERATOR_CHUNK_TOKENS
    return per_device * n_shards(mesh, "batch") * n_shards(mesh, "position")


def split_token_chunks(chunk_tokens: int, hidden: Array, per_token: Any) -> tuple[Array, Any]:
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

    return jax.tree.map(split, (hidden, per_token))


def join_token_chunks(x: Array) -> Array:
    """Return [n, B, T / n, ...] as [B, T, ...], the tokens in their order again."""
    n, B, part, *others = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(B, part * n, *others)


def compute_chunk_logits(hidden: Array, lm_head: Array, softcap: float | None) -> Array:
    """Return the logits [B, T, V] of a chunk, sharded like its tokens and the vocabulary."""
    logits = compute_logits(hidden, lm_head, softcap)
    return with_logical_constraint(logits, "batch", "position", "vocab")


def measure_targets(
    logits: Array, targets: Array, z_loss_weight: float, weight: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Return weight x nats + z-loss [B, T], the nats, and d_logits of the first, [B, T, V]."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - take_target_logits(logits, targets)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    probs = jnp.exp(logits - log_z[..., None])
    prob_scale = weight + 2 * z_loss_weight * log_z
    d_logits = prob_scale[..., None] * probs - weight * is_target
    return weight * nats + z_loss_weight * log_z**2, nats, d_logits


def pass_softcap(d_logits: Array, logits: Array, softcap: float | None) -> Array:
    """Return the gradient before the softcap, given that after it."""
    return d_logits if softcap is None else d_logits * softcap_gradient(logits, softcap)


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
