"""Causal attention within documents, in blocks of queries: runs everywhere.

Query i sees the keys at or before it, of its own document and within the window. Each block of
queries meets the keys up to its own end, so that the upper triangle is hardly computed, and on
meshes that shard positions the queries are striped over the devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxpt.model.kernels.sharded import ATTENTION_OUTPUT, shard_map_attention
from jaxpt.model.softcap import apply_softcap, softcap_gradient
from jaxpt.sharding import LOGICAL_AXIS_RULES, n_shards

# Queries are processed this many at a time against the keys up to the end of their block, so that
# the upper triangle is hardly computed and a layer holds scores of size QUERY_CHUNK_SIZE x S rather
# than T x S.
QUERY_CHUNK_SIZE = 128
# A sequence has this many query blocks, each a loop over its chunks. Chunks unrolled one by one
# compute 52 % of the square at T = 4,096 where blocks compute 56 %, but take three times as long to
# compile (docs/performance.md).
N_QUERY_BLOCKS = 8


def blockwise_attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    softcap: float | None = None,
) -> Array:
    """Return attention in query blocks, each against the keys up to its own end."""
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else n_shards(mesh, "position")
    if n > 1 and q.shape[1] % n**2 == 0:
        blocks = QueryBlocks(window, stride=n, softcap=softcap)
        striped = functools.partial(striped_attention, blocks=blocks)
        return shard_map_attention(striped)(q, k, v, segment_ids)
    # where sequences cannot be striped evenly, XLA shards the blocks: right, but slower
    inputs = Inputs(q, k, v, segment_ids, segment_ids)
    return blockwise_attention(inputs, QueryBlocks(window, softcap=softcap))


def attend_prefix_tree(
    q: Array, k: Array, v: Array, visible_until: Array, softcap: float | None = None
) -> Array:
    """Return softmax attention of each query to the keys at or before it that are still visible.

    For trees of texts, see evaluate/prefix_trees.py. q, k and v are as for `attend`.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible_until: int32 [B, T], for each key the first position after it whose query does not
            see it; each position must see itself.
        softcap: scores s become softcap tanh(s / softcap).
    """
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), visible_until.shape)
    inputs = Inputs(q, k, v, positions, visible_until)
    blocks = QueryBlocks(is_visible=jnp.less, softcap=softcap)
    return blockwise_attention(inputs, blocks)


class Inputs(NamedTuple):
    """What `blockwise_attention` reads.

    Attributes:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        q_ids: int32 [B, T].
        k_ids: int32 [B, S].
        offset: position of the first query, less than the stride.
    """

    q: Array
    k: Array
    v: Array
    q_ids: Array
    k_ids: Array
    offset: Array | int = 0


class Block(NamedTuple):
    """Adjacent queries, in whole chunks, and the keys that they may see."""

    n_chunks: int
    queries: slice
    keys: slice


class QueryBlocks(NamedTuple):
    """How queries are split, and which keys they see.

    Query i is at position i * stride + offset of the keys, offset < stride. It sees the keys at or
    before it, within the window, for which is_visible(query's id, key's id) is true. A softcap c
    makes scores s into c tanh(s / c).
    """

    window: int | None = None
    stride: int = 1
    is_visible: Callable[[Array, Array], Array] = jnp.equal
    softcap: float | None = None

    def iterate_blocks(self, T: int) -> Iterator[Block]:
        """Yield at most N_QUERY_BLOCKS blocks of T queries, and a short one of what is left."""
        n_whole = T - T % QUERY_CHUNK_SIZE
        chunks_per_block = -(-T // (QUERY_CHUNK_SIZE * N_QUERY_BLOCKS))
        size = QUERY_CHUNK_SIZE * max(1, chunks_per_block)
        bounds = {*range(0, T, size), n_whole, T}
        for start, stop in itertools.pairwise(sorted(bounds)):
            first = 0
            if self.window is not None:
                before = start * self.stride - self.window
                first = max(0, before + 1)
            n_chunks = (stop - start) // QUERY_CHUNK_SIZE
            keys = slice(first, stop * self.stride)
            yield Block(max(1, n_chunks), slice(start, stop), keys)


class Queries(NamedTuple):
    """Queries grouped by kv head: [B, K, G, T, ...], 1 for an axis that a field has not.

    G query heads share a kv head.
    """

    q: Array
    ids: Array
    positions: Array


class Keys(NamedTuple):
    """Keys [B, K, S, H], values and ids [B, S], from position `first` on."""

    k: Array
    v: Array
    ids: Array
    first: int = 0

    def select(self, where: slice) -> Keys:
        """Return some of the keys."""
        k = self.k[:, :, where]
        v = self.v[:, :, where]
        return Keys(k, v, self.ids[:, where], where.start)


def striped_attention(
    q: Array, k: Array, v: Array, segment_ids: Array, blocks: QueryBlocks
) -> Array:
    """Return attention of sequences sharded over the mesh: striped context parallelism.

    Every device gathers all keys, and takes every n-th query instead of the n-th part of the
    sequence: otherwise the device with a sequence's end would see n times what the one with its
    start sees, and all would wait for it. Queries and outputs travel once each way.

    Source: 2311.09431.
    """
    axis = LOGICAL_AXIS_RULES["position"]
    n = jax.lax.axis_size(axis)
    index = jax.lax.axis_index(axis)
    B, part = segment_ids.shape

    def exchange(x: Array, split_axis: int, concat_axis: int) -> Array:
        return jax.lax.all_to_all(x, axis, split_axis, concat_axis, tiled=True)

    def stripe(x: Array) -> Array:  # position r here is position r * n + index of the sequence
        split = x.reshape(B, part // n, n, *x.shape[2:])
        striped = exchange(split, 2, 1)
        return striped.reshape(x.shape)

    def unstripe(x: Array) -> Array:
        split = exchange(x[:, :, None], 1, 2)
        return split.reshape(x.shape)

    def gather(x: Array) -> Array:
        return jax.lax.all_gather(x, axis, axis=1, tiled=True)

    k, v, k_ids = gather(k), gather(v), gather(segment_ids)
    inputs = Inputs(stripe(q), k, v, stripe(segment_ids), k_ids, index)
    out = blockwise_attention(inputs, blocks)
    return unstripe(out)


def attend_blockwise(inputs: Inputs, blocks: QueryBlocks) -> Array:
    """Return attention [B, T, N, H] in q's dtype.

    Backward keeps the output and each query's logsumexp, and recomputes the scores: they are the
    largest thing that a layer would otherwise keep.
    """
    return blockwise_attention_fwd(inputs, blocks)[0]


def blockwise_attention_fwd(inputs: Inputs, blocks: QueryBlocks) -> tuple[Array, Any]:
    """Return the output, and what backward needs."""
    q = inputs.q
    queries = group_queries(inputs, blocks)
    keys = group_keys(inputs)

    def attend_chunk(seen: Keys, chunk: Queries) -> tuple[Array, Array]:
        scores = compute_scores(chunk, seen, blocks)
        # every query sees itself, so it is finite
        row_max = jnp.max(scores, axis=-1, keepdims=True)
        probs = jnp.exp(scores - row_max)
        total = jnp.sum(probs, axis=-1, keepdims=True)
        probs = probs.astype(seen.v.dtype)
        out = einsum_float32("bkgts,bksh->bkgth", probs, seen.v)
        out = (out / total).astype(q.dtype)
        logsumexp = row_max + jnp.log(total)
        return out, logsumexp[..., 0]

    found = []
    for block in blocks.iterate_blocks(q.shape[1]):
        seen = keys.select(block.keys)
        attend_keys = functools.partial(attend_chunk, seen)
        chunks = split_query_chunks(queries, block)
        results = jax.lax.map(attend_keys, chunks)
        found.append(merge_query_chunks(results))
    out, logsumexp = concatenate_blocks(found)
    out = ungroup_queries(out, q)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    logsumexp = checkpoint_name(logsumexp, ATTENTION_OUTPUT)
    return out, (inputs, out, logsumexp)


def blockwise_attention_bwd(blocks: QueryBlocks, residuals: Any, d_out: Array) -> tuple[Inputs]:
    """Return the gradients for q, k and v.

    Scores and their gradients have heads first and keys last, as in forward, and each matmul is
    written so that none of them is transposed: on a CPU that would take as long as all else here.
    """
    inputs, out, logsumexp = residuals
    q, k = inputs.q, inputs.k
    B, S, K, H = k.shape
    queries = group_queries(inputs, blocks)
    keys = group_keys(inputs)
    scale = H**-0.5

    def chunk_gradients(seen: Keys, sums: Any, chunk: Any) -> tuple[Any, Array]:
        queries, d_out, logsumexp, d_mean = chunk
        d_keys, d_values = sums
        scores = compute_scores(queries, seen, blocks)
        probs = jnp.exp(scores - logsumexp[..., None])
        d_probs = einsum_float32("bkgth,bksh->bkgts", d_out, seen.v)
        d_scores = probs * (d_probs - d_mean[..., None])
        if blocks.softcap is not None:
            capped = jnp.where(probs > 0, scores, 0)  # -inf where a key is not seen
            d_scores *= softcap_gradient(capped, blocks.softcap)
        d_scores = (d_scores * scale).astype(q.dtype)
        probs = probs.astype(d_out.dtype)
        d_keys += einsum_float32("bkgth,bkgts->bkhs", queries.q, d_scores)
        d_values += einsum_float32("bkgth,bkgts->bkhs", d_out, probs)
        d_queries = einsum_float32("bkgts,bksh->bkgth", d_scores, seen.k)
        return (d_keys, d_values), d_queries.astype(q.dtype)

    # the mean of d_probs under probs, for each query
    products = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    d_mean = jnp.sum(products, axis=-1, keepdims=True)
    d_mean = move_heads_first(d_mean, K)[..., 0]
    d_heads = move_heads_first(d_out, K)
    rows = (queries, d_heads, logsumexp, d_mean)
    d_keys = jnp.zeros((B, K, H, S))
    d_values = jnp.zeros((B, K, H, S))
    d_queries = []
    for block in blocks.iterate_blocks(q.shape[1]):
        seen = keys.select(block.keys)
        add_chunk = functools.partial(chunk_gradients, seen)
        where = (..., block.keys)
        sums = d_keys[where], d_values[where]
        chunks = split_query_chunks(rows, block)
        sums, d_chunks = jax.lax.scan(add_chunk, sums, chunks)
        d_keys = d_keys.at[where].set(sums[0])
        d_values = d_values.at[where].set(sums[1])
        d_queries.append(merge_query_chunks(d_chunks))
    d_q = concatenate_blocks(d_queries)
    d_q = ungroup_queries(d_q, q)
    d_k = jnp.moveaxis(d_keys, 3, 1).astype(k.dtype)
    d_v = jnp.moveaxis(d_values, 3, 1).astype(k.dtype)
    no_gradients: Any = (None, None, None)
    return (Inputs(d_q, d_k, d_v, *no_gradients),)


blockwise_attention = jax.custom_vjp(attend_blockwise, nondiff_argnums=(1,))
blockwise_attention.defvjp(blockwise_attention_fwd, blockwise_attention_bwd)


def einsum_float32(letters: str, a: Array, b: Array) -> Array:
    """Return jnp.einsum, accumulated in float32."""
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def compute_scores(queries: Queries, keys: Keys, blocks: QueryBlocks) -> Array:
    """Return float32 scores [B, K, G, C, S] of C queries; -inf where one does not see a key."""
    key_positions = keys.first + jnp.arange(keys.k.shape[2])
    distance = queries.positions[..., None] - key_positions
    k_ids = keys.ids[:, None, None, None]
    is_visible = blocks.is_visible(queries.ids[..., None], k_ids)
    is_visible &= distance >= 0
    if blocks.window is not None:
        is_visible &= distance < blocks.window
    scores = einsum_float32("bkgth,bksh->bkgts", queries.q, keys.k)
    scores *= queries.q.shape[-1] ** -0.5
    scores = apply_softcap(scores, blocks.softcap)
    return jnp.where(is_visible, scores, -jnp.inf)


def group_queries(inputs: Inputs, blocks: QueryBlocks) -> Queries:
    """Return queries grouped by kv head, with ids and positions."""
    T, K = inputs.q.shape[1], inputs.k.shape[2]
    q = move_heads_first(inputs.q, K)
    ids = inputs.q_ids[:, None, None]
    positions = jnp.arange(T) * blocks.stride + inputs.offset
    return Queries(q, ids, positions[None, None, None])


def group_keys(inputs: Inputs) -> Keys:
    """Return keys and values with heads first."""
    k = jnp.swapaxes(inputs.k, 1, 2)
    v = jnp.swapaxes(inputs.v, 1, 2)
    return Keys(k, v, inputs.k_ids)


def move_heads_first(x: Array, K: int) -> Array:
    """Return [B, T, N, H] as [B, K, G, T, H]."""
    B, T, N, H = x.shape
    grouped = x.reshape(B, T, K, N // K, H)
    return jnp.moveaxis(grouped, 1, 3)


def ungroup_queries(x: Array, like: Array) -> Array:
    """Return [B, K, G, T, H] as [B, T, N, H], the shape of `like`."""
    grouped = jnp.moveaxis(x, 3, 1)
    return grouped.reshape(like.shape)


def split_query_chunks(rows: Any, block: Block) -> Any:
    """Return a block of the arrays [B, K, G, T, ...] as chunks: [n, B, K, G, C, ...]."""

    def split(x: Array) -> Array:
        chunks = x[:, :, :, block.queries]
        chunks = chunks.reshape(*x.shape[:3], block.n_chunks, -1, *x.shape[4:])
        return jnp.moveaxis(chunks, 3, 0)

    return jax.tree.map(split, rows)


def merge_query_chunks(chunks: Any) -> Any:
    """Return arrays [n, B, K, G, C, ...] as [B, K, G, n C, ...]."""

    def merge(x: Array) -> Array:
        n, *heads, C = x.shape[:5]
        chunks = jnp.moveaxis(x, 0, 3)
        return chunks.reshape(*heads, n * C, *x.shape[5:])

    return jax.tree.map(merge, chunks)


def concatenate_blocks(blocks: list[Any]) -> Any:
    """Return the blocks' arrays [B, K, G, C, ...] as [B, K, G, T, ...]."""

    def concatenate(*arrays: Array) -> Array:
        return jnp.concatenate(arrays, axis=3)

    return jax.tree.map(concatenate, *blocks)
