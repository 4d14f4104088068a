"""Attention on TPUs by JAX's Splash kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

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

    It skips blocks hidden by causality or the window, compares segments within the others, and
    holds no scores outside the chip's vector memory.
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

        def run_one(q: Array, k: Array, v: Array, ids: Array) -> Any:  # Array, by its options
            return run(q, k, v, segment_ids=kernel.SegmentIds(ids, ids))

        scaled = q * H**-0.5
        q = jnp.swapaxes(scaled.astype(q.dtype), 1, 2)
        k = jnp.swapaxes(k, 1, 2)
        v = jnp.swapaxes(v, 1, 2)
        out = jax.vmap(run_one)(q, k, v, segment_ids)
        return jnp.swapaxes(out, 1, 2)

    return shard_map_attention(local)(q, k, v, segment_ids)


def choose_blocks(T: int) -> tuple[int, int]:
    """Return how many keys a block has, which divides T, and how many of them make scores at once.

    A block of queries is as large.
    """
    block = math.gcd(T, LARGE_BLOCK if T >= MIN_LARGE else BLOCK)
    return block, math.gcd(block, BLOCK)
