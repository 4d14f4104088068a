"""Attention on TPUs by JAX's Splash kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels.blockwise import make_document_ids
from jaxpt.model.kernels.sharded import ATTENTION_OUTPUT, shard_map_attention

BLOCK = 512  # queries, and keys, for which the kernel is started once
# Of sequences from MIN_LARGE on: a quarter of the starts, hardly more scores above the diagonal.
# v5e and v5p refuse 2,048: a kernel has 16 MiB of their vector memory.
LARGE_BLOCK = 1024
MIN_LARGE = 8192


def splash_attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    interpret: bool = False,
) -> Array:
    """Return attention by JAX's Splash kernel (jax.experimental.pallas.ops.tpu.splash_attention).

    It skips blocks of keys hidden by causality or the window, or of other documents, compares
    segments within the others, and holds no scores outside the chip's vector memory.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def local(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        T, N, H = q.shape[1:]
        mask = masks.CausalMask((T, T))
        if window is not None:
            mask = masks.LocalMask((T, T), (window - 1, 0), 0)
        block, computed = choose_blocks(T)
        sizes = kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=computed,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=computed,
            block_q_dq=block,
            block_kv_dq=block,
        )
        run = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * N),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION_OUTPUT,
            interpret=interpret,
        )

        def run_one(  # Any: an Array, by its options
            q: Array, k: Array, v: Array, ids: Array, first_key: Array
        ) -> Any:
            apart = kernel.SplashAttentionKernel(
                skip_documents(run.fwd_mask_info, first_key, block),
                skip_documents(run.dq_mask_info, first_key, block),
                skip_documents(run.dkv_mask_info, first_key, block, keys_outermost=True),
                **run.kwargs,
            )
            return apart(q, k, v, segment_ids=kernel.SegmentIds(ids, ids))

        scaled = q * H**-0.5
        q = jnp.swapaxes(scaled.astype(q.dtype), 1, 2)
        k = jnp.swapaxes(k, 1, 2)
        v = jnp.swapaxes(v, 1, 2)
        first_key = make_document_ids(segment_ids).first_key[:, ::block]
        out = jax.vmap(run_one)(q, k, v, segment_ids, first_key)
        return jnp.swapaxes(out, 1, 2)

    return shard_map_attention(local)(q, k, v, segment_ids)


def skip_documents(
    mask_info: Any, first_key: Array, block: int, keys_outermost: bool = False
) -> Any:
    """Return the kernel's plan of blocks (MaskInfo) without those of other documents.

    Args:
        mask_info: the plan of causality and window. Its arrays are [1, queries, keys] in blocks, of
            which the axis that the kernel goes over first to last is shortened to what any turn
            needs; `data_next` is the block that an entry stands for.
        first_key: where the document of a block's first query starts, [T / block].
        block: tokens.
        keys_outermost: the shortened axis is that of queries, as for the gradients of k and v.
    """
    found = mask_info.data_next.astype(jnp.int32)
    if keys_outermost:
        queries, keys = found, jax.lax.broadcasted_iota(jnp.int32, found.shape, 2)
    else:
        queries, keys = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1), found
    is_seen = (keys + 1) * block > first_key[queries]
    block_mask = jnp.where(is_seen, mask_info.block_mask, 0)
    # what an entry that is skipped loads is what the next one needs
    order = (0, 2, 1) if keys_outermost else (0, 1, 2)
    loads = found.transpose(order)
    places = jnp.arange(found.size)
    is_run = block_mask.transpose(order).ravel() > 0
    next_run = jax.lax.cummin(jnp.where(is_run, places, found.size), reverse=True)
    next_run = jnp.minimum(next_run, jnp.max(jnp.where(is_run, places, 0)))
    loads = loads.ravel()[next_run].reshape(loads.shape).transpose(order)
    return mask_info._replace(
        block_mask=block_mask, data_next=loads.astype(mask_info.data_next.dtype)
    )


def choose_blocks(T: int) -> tuple[int, int]:
    """Return how many keys a block has, which divides T, and how many of them make scores at once.

    A block of queries is as large.
    """
    block = math.gcd(T, LARGE_BLOCK if T >= MIN_LARGE else BLOCK)
    return block, math.gcd(block, BLOCK)
