"""Causal attention within documents: one function."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Queries are taken this many at a time and see only the keys up to their own end, so that the upper triangle is never
# computed (half the work at long rows) and a layer holds scores of size QUERY_CHUNK x S rather than T x S.
QUERY_CHUNK = 128


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int | None = None) -> jax.Array:
    """Softmax attention of each query to the keys of its own document at or before it.

    q         [B, T, N, H]   rotated
    k, v      [B, T, K, H]   N is a multiple of K; query head n reads kv head n // (N / K)
    segments  [B, T]         int32; a token sees only tokens of its own segment
    window    a query sees this many positions, itself included; None sees all

    Returns [B, T, N, H] in q's dtype; the softmax is float32.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    chunks = []
    for start in range(0, T, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, T)
        first = 0 if window is None else max(0, start - window + 1)
        chunks.append(
            chunk_attend(
                q[:, start:stop], k[:, first:stop], v[:, first:stop],
                segments[:, start:stop], segments[:, first:stop], start - first, window,
            )
        )  # fmt: skip
    return jnp.concatenate(chunks, axis=1).reshape(B, T, N, H)


@jax.checkpoint  # backward computes the scores again: they are the largest thing a layer would otherwise keep
def chunk_attend(q, k, v, q_segments, k_segments, offset, window):
    """One chunk of queries; the query at place i stands at place offset + i of the keys. q [B, T, K, G, H], k and v [B, S, K, H]."""
    T, S, H = q.shape[1], k.shape[1], q.shape[-1]
    distance = (offset + jnp.arange(T))[:, None] - jnp.arange(S)[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    seen = seen[None] & (q_segments[:, :, None] == k_segments[:, None, :])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * H**-0.5
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)  # every query sees itself, so no row is all -inf
    shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", shares, v)
