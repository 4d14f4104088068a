"""Causal attention within documents, in blocks of queries and keys: runs everywhere.

Query i sees the keys at or before it, of its own document and within the window. Each block of
queries walks over the blocks of keys that it may see and over no others, so a sequence of short
documents costs what they cost, not what one document of its length would. On meshes that shard
positions the queries are striped over the devices.

Source: the running softmax is that of FlashAttention (2205.14135, 2307.08691).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxpt.model.kernels.sharded import ATTENTION_OUTPUT, Axes, count_shards, shard_map_axes
from jaxpt.model.softcap import apply_softcap, softcap_gradient
from jaxpt.sharding import LOGICAL_AXIS_RULES, is_on_cpu

MAX_QUERY_BLOCK = 128
# Keys at a time. On a CPU the scores then stay in its caches (512: 0.6 to 0.9 x as fast); an
# accelerator starts its kernels anew in each turn, which must be worth it.
CPU_KEY_BLOCK = 256
ACCELERATOR_KEY_BLOCK = 512
# A CPU takes sequences of this length one by one, so that none waits for another's documents.
# Blocks of a single shorter one would be too little work for its cores.
MIN_TOKENS_ALONE = 2048
# Up to this length a CPU's loops over blocks are unrolled: blocks run side by side then, which is
# worth more than to skip those of other documents.
MAX_UNROLLED_TOKENS = 512
LOWEST = float(jnp.finfo(jnp.float32).min)  # exp(-inf - LOWEST) is 0; exp(-inf - -inf) is NaN


class Visibility(NamedTuple):
    """Which keys a query sees.

    Query i is at position i * stride + Inputs.offset of the keys. It sees the keys at or before it,
    within the window, for which is_visible(query's id, key's id) is true. A softcap c makes scores
    s into c tanh(s / c).
    """

    window: int | None = None
    stride: int = 1
    is_visible: Callable[[Array, Array], Array] = jnp.equal
    softcap: float | None = None


class Ids(NamedTuple):
    """What `Visibility` compares, int32 [B, T] each.

    Attributes:
        queries: each query's id.
        keys: each key's.
        first_key: the position before which a query sees no key.
    """

    queries: Array
    keys: Array
    first_key: Array


class Inputs(NamedTuple):
    """What `blockwise_attention` reads.

    Attributes:
        q: [B, T, N, H].
        k: [B, S, K, H].
        v: [B, S, K, H].
        ids: of T queries and S keys.
        offset: position of the first query.
    """

    q: Array
    k: Array
    v: Array
    ids: Ids
    offset: Array | int = 0


def blockwise_attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None,
    softcap: float | None = None,
) -> Array:
    """Return attention within documents, each device that of its own sequences and heads."""
    visibility = Visibility(window, softcap=softcap)
    return shard_attention(q, k, v, make_document_ids(segment_ids), visibility)


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
    ids = Ids(positions, visible_until, jnp.zeros_like(positions))
    return shard_attention(q, k, v, ids, Visibility(is_visible=jnp.less, softcap=softcap))


def make_document_ids(segment_ids: Array) -> Ids:
    """Return what keeps documents apart, given their segment ids [B, T]."""
    positions = jnp.arange(segment_ids.shape[1])
    starts = jnp.where(find_document_starts(segment_ids), positions, 0)
    return Ids(segment_ids, segment_ids, jax.lax.cummax(starts, axis=1))


def find_document_starts(segment_ids: Array) -> Array:
    """Return whether a document (or the padding) starts at a position, bool [B, T]."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def shard_attention(q: Array, k: Array, v: Array, ids: Ids, visibility: Visibility) -> Array:
    """Return attention, by each device on its shard if there is a mesh.

    Sequences that the mesh does not divide, as when one is decoded, run whole on every device.
    """

    def find_axis(name: str, size: int) -> str | None:
        return name if size % count_shards(name) == 0 else None

    B, T = ids.queries.shape
    tokens: Axes = (find_axis("batch", B), find_axis("position", T))
    is_split = tokens[1] and count_shards("position") > 1
    local = functools.partial(attend_striped if is_split else attend_whole, visibility=visibility)
    queries: Axes = (*tokens, "heads", None)
    keys: Axes = (*tokens, "kv_heads", None)
    return shard_map_axes(local, [queries, keys, keys, tokens], [queries])(q, k, v, ids)


def attend_whole(q: Array, k: Array, v: Array, ids: Ids, visibility: Visibility) -> Array:
    """Return attention of whole sequences on one device."""
    return blockwise_attention(Inputs(q, k, v, ids), visibility)


def attend_striped(q: Array, k: Array, v: Array, ids: Ids, visibility: Visibility) -> Array:
    """Return attention of a device's queries; it gathers the keys that other devices hold.

    Sequences sharded over n devices are striped, if their shards are multiples of n: every device
    takes every n-th query instead of the n-th part of the sequence. Otherwise the device with a
    sequence's end would see n times what the one with its start sees, and all would wait for it.
    Queries and outputs travel once each way.

    Source: 2311.09431.
    """
    n = count_shards("position")
    axis = LOGICAL_AXIS_RULES["position"]
    index = jax.lax.axis_index(axis)
    B, part = ids.queries.shape

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

    k, v, k_ids = gather(k), gather(v), gather(ids.keys)
    if part % n:
        ids = ids._replace(keys=k_ids)
        return blockwise_attention(Inputs(q, k, v, ids, index * part), visibility)
    ids = Ids(stripe(ids.queries), k_ids, stripe(ids.first_key))
    inputs = Inputs(stripe(q), k, v, ids, index)
    return unstripe(blockwise_attention(inputs, visibility._replace(stride=n)))


# ---- attention of one device


class Queries(NamedTuple):
    """Blocks of C queries: in front of each shape, [groups of sequences, blocks].

    The B sequences of a group are processed together; G query heads share a kv head.

    Attributes:
        q: [B, K, G, C, H].
        ids: [B, 1, 1, C, 1].
        positions: [C, 1].
        first_block: of the keys that a query here sees; a scalar.
        end_block: the one after the last.
    """

    q: Array
    ids: Array
    positions: Array
    first_block: Array
    end_block: Array


class Keys(NamedTuple):
    """Blocks of C keys: in front of each shape, [groups of sequences, blocks].

    Attributes:
        k: [B, K, C, H].
        v: [B, K, C, H].
        ids: [B, 1, 1, 1, C].
        positions: [C].
    """

    k: Array
    v: Array
    ids: Array
    positions: Array


def attend_blockwise(inputs: Inputs, visibility: Visibility) -> Array:
    """Return attention [B, T, N, H] in q's dtype.

    Backward keeps the output and each query's logsumexp, and recomputes the scores: they are the
    largest thing that a layer would otherwise keep.
    """
    return blockwise_attention_fwd(inputs, visibility)[0]


def blockwise_attention_fwd(inputs: Inputs, visibility: Visibility) -> tuple[Array, Any]:
    """Return the output, and what backward needs."""
    q = inputs.q
    key_ranges = find_key_ranges(inputs, visibility)

    def attend_group(group: tuple[Queries, Keys]) -> tuple[Array, Array]:
        queries, keys = group

        def attend_next(_: None, blocks: Queries, seen: range | None) -> tuple[None, Any]:
            return None, attend_keys(keys, blocks, seen)

        return scan_blocks(attend_next, None, queries, key_ranges)[1]

    def attend_keys(keys: Keys, queries: Queries, seen: range | None) -> tuple[Array, Array]:
        def add_keys(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            out, total, row_max = sums
            near = take_block(keys, block)
            scores = compute_scores(queries, near, visibility)
            new_max = jnp.maximum(row_max, jnp.max(scores, axis=-1, keepdims=True))
            decay = jnp.exp(row_max - new_max)
            probs = jnp.exp(scores - new_max)
            total = total * decay + jnp.sum(probs, axis=-1, keepdims=True)
            probs = probs.astype(near.v.dtype)
            out = out * decay + einsum_float32("bkgts,bksh->bkgth", probs, near.v)
            return out, total, new_max

        zeros = jnp.zeros(queries.q.shape)
        column = zeros[..., :1]
        sums = zeros, column, column + LOWEST
        out, total, row_max = loop_over_keys(add_keys, queries, seen, sums)
        # At least exp(0), of the largest score. With a window, a query that pads the last block may
        # lie too far behind the last key to see any: without a bound its logsumexp would be -inf,
        # and NaN in backward.
        total = jnp.maximum(total, 1)
        logsumexp = row_max + jnp.log(total)
        return (out / total).astype(q.dtype), logsumexp

    groups = split_queries(inputs, visibility), split_keys(inputs)
    out, logsumexp = jax.lax.map(attend_group, groups)
    out = merge_blocks(out, q)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    logsumexp = checkpoint_name(logsumexp[..., 0], ATTENTION_OUTPUT)
    return out, (inputs, out, logsumexp)


def blockwise_attention_bwd(visibility: Visibility, residuals: Any, d_out: Array) -> tuple[Inputs]:
    """Return the gradients for q, k and v.

    Scores and their gradients have heads first and keys last, as in forward, and each matmul is
    written so that none of them is transposed: on a CPU that would take as long as all else here.
    """
    inputs, out, logsumexp = residuals
    q, k = inputs.q, inputs.k
    scale = q.shape[-1] ** -0.5
    key_ranges = find_key_ranges(inputs, visibility)

    def group_gradients(group: Any) -> tuple[Array, ...]:
        blocks, keys = group
        zeros = jnp.zeros(jnp.swapaxes(keys.k, -1, -2).shape)
        add_queries = functools.partial(block_gradients, keys)
        sums = zeros, zeros
        (d_keys, d_values), d_queries = scan_blocks(add_queries, sums, blocks, key_ranges)
        return d_queries, d_keys, d_values

    def block_gradients(
        keys: Keys, key_sums: Any, blocks: Any, seen: range | None
    ) -> tuple[Any, Array]:
        queries, d_out, logsumexp, d_mean = blocks

        def add_keys(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            d_queries, d_keys, d_values = sums
            near = take_block(keys, block)
            scores = compute_scores(queries, near, visibility)
            probs = jnp.exp(scores - logsumexp[..., None])
            d_probs = einsum_float32("bkgth,bksh->bkgts", d_out, near.v)
            d_scores = probs * (d_probs - d_mean)
            if visibility.softcap is not None:
                capped = jnp.where(probs > 0, scores, 0)  # -inf where a key is not seen
                d_scores *= softcap_gradient(capped, visibility.softcap)
            d_scores = (d_scores * scale).astype(q.dtype)
            probs = probs.astype(d_out.dtype)
            d_queries += einsum_float32("bkgts,bksh->bkgth", d_scores, near.k)
            by_scores = einsum_float32("bkgth,bkgts->bkhs", queries.q, d_scores)
            by_probs = einsum_float32("bkgth,bkgts->bkhs", d_out, probs)
            d_keys = add_to_block(d_keys, block, by_scores)
            return d_queries, d_keys, add_to_block(d_values, block, by_probs)

        sums = jnp.zeros(queries.q.shape), *key_sums
        d_queries, *key_sums = loop_over_keys(add_keys, queries, seen, sums)
        return tuple(key_sums), d_queries.astype(q.dtype)

    # the mean of d_probs under probs, for each query
    products = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    d_mean = jnp.sum(products, axis=-1, keepdims=True)
    d_blocks = split_heads(d_out, inputs), logsumexp, split_heads(d_mean, inputs)
    blocks = split_queries(inputs, visibility), *d_blocks
    d_q, d_k, d_v = jax.lax.map(group_gradients, (blocks, split_keys(inputs)))
    no_gradients: Any = (None, None)
    d_qkv = merge_blocks(d_q, q), merge_blocks(d_k, k), merge_blocks(d_v, k)
    return (Inputs(*d_qkv, *no_gradients),)


blockwise_attention = jax.custom_vjp(attend_blockwise, nondiff_argnums=(1,))
blockwise_attention.defvjp(blockwise_attention_fwd, blockwise_attention_bwd)


def find_key_ranges(inputs: Inputs, visibility: Visibility) -> list[range] | None:
    """Return the blocks of keys that each block of queries may see, None where that is for a loop.

    They are known before the data is, in short sequences on a CPU.
    """
    T = inputs.q.shape[1]
    size, key_size, _ = find_block_sizes(inputs)
    is_whole = visibility.stride == 1 and isinstance(inputs.offset, int)
    if not (is_on_cpu() and is_whole and inputs.k.shape[1] <= MAX_UNROLLED_TOKENS):
        return None
    ranges = []
    for start in range(0, T, size):
        last = inputs.offset + min(start + size, T) - 1
        window = visibility.window
        first = 0 if window is None else max(0, inputs.offset + start - window + 1)
        ranges.append(range(first // key_size, last // key_size + 1))
    return ranges


def scan_blocks(
    add: Callable[..., tuple[Any, Any]], sums: Any, blocks: Any, key_ranges: list[range] | None
) -> tuple[Any, Any]:
    """Return jax.lax.scan of add(sums, block of queries, its blocks of keys), or None for these.

    It is unrolled where the blocks of keys are known.
    """
    if key_ranges is None:
        return jax.lax.scan(lambda sums, block: add(sums, block, None), sums, blocks)
    found = []
    for i, seen in enumerate(key_ranges):
        sums, result = add(sums, jax.tree.map(lambda x, i=i: x[i], blocks), seen)
        found.append(result)
    return sums, jax.tree.map(lambda *results: jnp.stack(results), *found)


def loop_over_keys(
    add_keys: Callable[..., Any], queries: Queries, seen: range | None, sums: Any
) -> Any:
    """Return add_keys(block, sums) run over the blocks of keys that a block of queries sees.

    Blocks that are known are taken as one.
    """
    if seen is None:
        return jax.lax.fori_loop(queries.first_block, queries.end_block, add_keys, sums)
    return add_keys(seen, sums)


def take_block(keys: Keys, block: Array | range) -> Keys:
    """Return one of the blocks of a group, or adjacent ones as one."""
    if not isinstance(block, range):
        return jax.tree.map(lambda x: x[block], keys)

    def join(x: Array, axis: int) -> Array:
        return jnp.concatenate([x[i] for i in block], axis)

    return Keys(join(keys.k, 2), join(keys.v, 2), join(keys.ids, -1), join(keys.positions, -1))


def add_to_block(sums: Array, block: Array | range, added: Array) -> Array:
    """Return the sums with those of one block, or of adjacent ones, increased."""
    if not isinstance(block, range):  # in place within a loop
        return jax.lax.dynamic_update_index_in_dim(sums, sums[block] + added, block, 0)
    parts = jnp.stack(jnp.split(added, len(block), axis=-1))
    return sums.at[block.start : block.stop].add(parts)


def einsum_float32(letters: str, a: Array, b: Array) -> Array:
    """Return jnp.einsum, accumulated in float32."""
    return jnp.einsum(letters, a, b, preferred_element_type=jnp.float32)


def compute_scores(queries: Queries, keys: Keys, visibility: Visibility) -> Array:
    """Return float32 scores [B, K, G, C, S] of C queries; -inf where one does not see a key."""
    distance = queries.positions - keys.positions
    is_visible = visibility.is_visible(queries.ids, keys.ids) & (distance >= 0)
    if visibility.window is not None:
        is_visible &= distance < visibility.window
    scores = einsum_float32("bkgth,bksh->bkgts", queries.q, keys.k)
    scores *= queries.q.shape[-1] ** -0.5
    scores = apply_softcap(scores, visibility.softcap)
    return jnp.where(is_visible, scores, -jnp.inf)


# ---- blocks


class BlockSizes(NamedTuple):
    """How many queries and keys a block has, and in how many groups sequences are processed."""

    n_queries: int
    n_keys: int
    n_groups: int


def choose_block_sizes(T: int, S: int, batch_size: int, on_cpu: bool) -> BlockSizes:
    """Return the sizes for T queries and S keys per sequence; blocks are as even as they can be."""
    max_keys = CPU_KEY_BLOCK if on_cpu else ACCELERATOR_KEY_BLOCK

    def divide(n: int, largest: int) -> int:
        n_blocks = math.ceil(n / largest)
        return math.ceil(n / n_blocks)

    if on_cpu and S <= MAX_UNROLLED_TOKENS:
        max_keys = MAX_QUERY_BLOCK
    is_alone = on_cpu and S >= MIN_TOKENS_ALONE
    n_groups = batch_size if is_alone else 1
    return BlockSizes(divide(T, MAX_QUERY_BLOCK), divide(S, max_keys), n_groups)


def count_mean_key_blocks(seq_len: int, window: int | None, n_shards: int, on_cpu: bool) -> float:
    """Return how many blocks of keys a block of queries visits in a sequence of one document.

    Args:
        seq_len: tokens.
        window: positions that a query sees, or None.
        n_shards: devices that a sequence is striped over.
        on_cpu: where it runs.
    """
    T = seq_len // n_shards
    size, key_size, _ = choose_block_sizes(T, seq_len, 1, on_cpu)
    n_visits = []
    for start in range(0, T, size):
        first = start * n_shards
        last = min(first + size * n_shards, seq_len) - 1
        first_key = 0 if window is None else max(0, first - window + 1)
        n_visits.append(last // key_size - first_key // key_size + 1)
    return sum(n_visits) / len(n_visits)


def find_block_sizes(inputs: Inputs) -> BlockSizes:
    """Return the sizes for a device's inputs."""
    B, T = inputs.q.shape[:2]
    return choose_block_sizes(T, inputs.k.shape[1], B, is_on_cpu())


def split_queries(inputs: Inputs, visibility: Visibility) -> Queries:
    """Return the queries in blocks, each with the blocks of keys that it sees."""
    size, key_size, n_groups = find_block_sizes(inputs)
    ids = split_blocks(inputs.ids.queries, size, n_groups, pad="edge")
    first_key = split_blocks(inputs.ids.first_key, size, n_groups, pad="edge")
    first_key = jnp.min(first_key, axis=(2, 3))
    _, n_blocks = first_key.shape
    positions = jnp.arange(n_blocks * size) * visibility.stride + inputs.offset
    positions = positions.reshape(n_blocks, size)
    if visibility.window is not None:
        first_key = jnp.maximum(first_key, positions[:, 0] - visibility.window + 1)
    last_key = jnp.minimum(positions[:, -1], inputs.k.shape[1] - 1)
    end_block = last_key // key_size + 1
    return Queries(
        split_heads(inputs.q, inputs),
        ids[:, :, :, None, None, :, None],
        jnp.broadcast_to(positions[..., None], (n_groups, n_blocks, size, 1)),
        first_key // key_size,
        jnp.broadcast_to(end_block, first_key.shape),
    )


def split_keys(inputs: Inputs) -> Keys:
    """Return the keys in blocks."""
    _, size, n_groups = find_block_sizes(inputs)
    ids = split_blocks(inputs.ids.keys, size, n_groups, pad="edge")
    k, v = (split_blocks(x, size, n_groups) for x in (inputs.k, inputs.v))
    n_blocks = k.shape[1]
    positions = jnp.arange(n_blocks * size).reshape(n_blocks, size)
    return Keys(
        jnp.swapaxes(k, 3, 4),
        jnp.swapaxes(v, 3, 4),
        ids[:, :, :, None, None, None],
        jnp.broadcast_to(positions, (n_groups, n_blocks, size)),
    )


def split_heads(x: Array, inputs: Inputs) -> Array:
    """Return [B, T, N, H] in blocks of queries: [groups, blocks, B / groups, K, G, C, H]."""
    size, _, n_groups = find_block_sizes(inputs)
    B, T, N, H = x.shape
    K = inputs.k.shape[2]
    blocks = split_blocks(x.reshape(B, T, K, N // K, H), size, n_groups)
    return jnp.moveaxis(blocks, 3, 5)


def split_blocks(x: Array, size: int, n_groups: int, pad: str = "constant") -> Array:
    """Return [B, T, ...] as [groups, blocks, B / groups, C, ...], the last block padded."""
    _, T, *others = x.shape
    n_blocks = math.ceil(T / size)
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, n_blocks * size - T)
    blocks = jnp.pad(x, padding, mode=pad).reshape(n_groups, -1, n_blocks, size, *others)
    return jnp.moveaxis(blocks, 2, 1)


def merge_blocks(x: Array, like: Array) -> Array:
    """Return blocks as `like`, an array [B, T, ...] and its dtype.

    Args:
        x: [groups, blocks, B / groups, K, G, C, H], or [..., K, H, C] for keys.
        like: what was split.
    """
    B, T, *others = like.shape
    x = jnp.moveaxis(x, (1, 5), (2, 3))
    return x.reshape(B, -1, *others)[:, :T].astype(like.dtype)
