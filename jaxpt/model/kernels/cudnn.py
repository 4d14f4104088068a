"""Attention on NVIDIA GPUs by cuDNN, through JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxpt.model.kernels.blockwise import (
    Visibility,
    attend_whole,
    find_document_starts,
    make_document_ids,
)
from jaxpt.model.kernels.sharded import ATTENTION_OUTPUT, shard_map_attention


def cudnn_attend(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
    """Return attention by cuDNN's flash attention over packed documents.

    It is given where each document starts and its length. The list of documents has a fixed length,
    T / 128 per sequence and at least 8; with more (documents of under 128 tokens on average), a
    device that has such a sequence takes `xla` in that step.
    """
    packed = functools.partial(cudnn_packed_attention, window=window)

    def plain(q: Array, k: Array, v: Array, ids: Array) -> Array:
        return attend_whole(q, k, v, make_document_ids(ids), Visibility(window))

    def attend_either(is_short: Array, *inputs: Array) -> Array:
        return jax.lax.cond(is_short, packed, plain, *inputs)

    def forward(*inputs: Array) -> tuple[Array, Any]:
        return attend_either(*inputs), inputs

    def backward(residuals: Any, d_out: Array) -> tuple[Any, ...]:
        is_short, *qkv, ids = residuals

        def gradients(branch: Callable[..., Array], *qkv: Array) -> Any:
            _, pullback = jax.vjp(lambda *x: branch(*x, ids), *qkv)
            return pullback(d_out)

        packed_gradients = functools.partial(gradients, packed)
        plain_gradients = functools.partial(gradients, plain)
        found = jax.lax.cond(is_short, packed_gradients, plain_gradients, *qkv)
        return None, *found, None

    # cuDNN's statistics are [B x documents, N, T] float32, several times the layer's input, so they
    # are recomputed in backward: one more forward of attention for keeping only q, k and v. It also
    # keeps lax.cond from storing for both branches.
    either = jax.custom_vjp(attend_either)
    either.defvjp(forward, backward)

    def local(q: Array, k: Array, v: Array, ids: Array) -> Array:
        n_documents = jnp.sum(find_document_starts(ids), axis=1)
        is_short = jnp.max(n_documents) <= max_documents(ids)
        return either(is_short, q, k, v, ids)

    out = shard_map_attention(local)(q, k, v, segment_ids)
    return checkpoint_name(out, ATTENTION_OUTPUT)


def cudnn_packed_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, window: int | None
) -> Array:
    """Return cuDNN's attention over packed documents."""
    # jax.nn's own interface has no packed documents
    from jax._src.cudnn import fused_attention_stablehlo as fused

    _, _, N, H = q.shape
    n_repeats = N // k.shape[2]
    # JAX computes the offsets of keys with the number of query heads, which is wrong for fewer kv
    # heads: they are repeated
    k = jnp.repeat(k, n_repeats, axis=2)
    v = jnp.repeat(v, n_repeats, axis=2)
    starts, lengths = compute_document_offsets(segment_ids)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    out = fused.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=H**-0.5,
        mask_type=fused.MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    assert isinstance(out, Array)  # a tuple only where statistics are asked for
    return out


def max_documents(segment_ids: Array) -> int:
    """Return how many documents per sequence cuDNN is given room for."""
    return max(8, segment_ids.shape[1] // 128)


def compute_document_offsets(segment_ids: Array) -> tuple[Array, Array]:
    """Return start and length of each document, padding included; int32 [B, max_documents].

    Both are -1 where there is no document.
    """
    size = max_documents(segment_ids)
    T = segment_ids.shape[1]

    def find_starts(is_start: Array) -> Array:
        return jnp.nonzero(is_start, size=size, fill_value=T)[0]

    is_start = find_document_starts(segment_ids)
    starts = jax.vmap(find_starts)(is_start).astype(jnp.int32)
    lengths = jnp.diff(starts, axis=1, append=T)
    exists = starts < T
    starts = jnp.where(exists, starts, -1)
    return starts, jnp.where(exists, lengths, -1)
