"""Cross-entropy without ever holding the logits of a whole batch. Returns sums: the one division is the caller's, at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpt.sharding import constrain

# Tokens whose logits exist on a device at one time. 256 x 32,000 float32 logits are 33 MB, which a core's caches still help with;
# a whole row of 4,096 would be 0.5 GB and its gradient as much again. An accelerator reads the head and adds to its float32
# gradient once a chunk, D x V each: with 1,024 tokens its products outweigh that traffic, with 256 they do not.
ON_CPU, ON_ACCELERATOR = 256, 1024


def cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0, at_a_time: int = ON_CPU
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and its summed nats.

    hidden   [B, T, D]   after the final norm
    head     [D, V]
    targets  [B, T]      int32
    weights  [B, T]      float32
    z_loss   weight of log(Z)^2, added to the first sum only (PaLM, 2204.02311, section 5)
    at_a_time  tokens over all devices whose logits may exist at once

    Returns (sum of weight x (nats + z_loss log(Z)^2), sum of weight x nats), float32 scalars.
    """
    B, T, _ = hidden.shape
    n_chunks = 1
    while T % (2 * n_chunks) == 0 and B * T // n_chunks > at_a_time:
        n_chunks *= 2

    def chunked(x):  # every n-th position of each row: a device keeps its own, whether the mesh cuts rows apart or across
        return jnp.moveaxis(x.reshape(B, T // n_chunks, n_chunks, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def add(sums, chunk):
        hidden, targets, weights = chunk
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "position", "vocab")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = (log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]) * weights
        return (sums[0] + jnp.sum(nats + z_loss * log_z**2 * weights), sums[1] + jnp.sum(nats)), None

    sums, _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), (chunked(hidden), chunked(targets), chunked(weights)))
    return sums


def log_likelihoods(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per-token log-likelihood in nats and whether the target was the likeliest token; both [B, T]. One row's logits at a time."""

    def row(one):
        hidden, targets = one
        logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    return jax.lax.map(row, (hidden, targets))
