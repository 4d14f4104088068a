"""Causal attention within documents: one function, several backends.

`xla` runs everywhere, `splash` is JAX's TPU kernel, `cudnn` is NVIDIA's, through JAX. All three
attend to the same keys and give the same numbers (tests/test_attention.py). `choose_backend`
returns which one a run takes, and why.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxpt.config import Config
from jaxpt.sharding import LOGICAL_AXIS_RULES, logical_to_partition_spec, n_shards
from jaxpt.spec import ModelSpec, UserError

# Queries are processed this many at a time against the keys up to the end of their block, so that
# the upper triangle is hardly computed and a layer holds scores of size QUERY_CHUNK_SIZE x S rather
# than T x S.
QUERY_CHUNK_SIZE = 128
# A sequence has this many query blocks, each a loop over its chunks. Chunks unrolled one by one
# compute 52 % of the square at T = 4,096 where blocks compute 56 %, but take three times as long to
# compile (docs/performance.md).
N_QUERY_BLOCKS = 8

BACKENDS = ("xla", "splash", "cudnn")
PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}
ATTENTION_OUTPUT = "attention_output"  # the name by which remat policies know it
MAX_RELATIVE_DIFFERENCE = 0.05  # bfloat16 stays below a tenth of it, a leak between documents above


def attend(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None = None,
    backend: str = "xla",
) -> Array:
    """Return softmax attention of each query to the keys of its document at or before it.

    Args:
        q: [B, T, N, H], rotated.
        k: [B, T, K, H], rotated; N is a multiple of K, query head n reads kv head n // (N / K).
        v: [B, T, K, H].
        segment_ids: int32 [B, T]; a token attends to its own segment, whose tokens are adjacent.
        window: positions that a query sees, itself included; None: all.
        backend: one of BACKENDS, as `choose_backend` returned.

    Returns:
        [B, T, N, H] in q's dtype; the softmax is float32.
    """
    if backend == "splash":
        return splash_attention(q, k, v, segment_ids, window)
    if backend == "cudnn":
        return cudnn_attention(q, k, v, segment_ids, window)
    return xla_attention(q, k, v, segment_ids, window)


def choose_backend(spec: ModelSpec, config: Config, mesh: jax.sharding.Mesh) -> tuple[str, str]:
    """Return (backend, reason) that train.attention resolves to for a model on a mesh.

    Raises:
        UserError: a backend requested by name does not support the run.
    """
    requested = config.train.attention
    device = mesh.devices.flat[0]
    kernel = PLATFORM_KERNELS.get(device.platform)
    if requested == "xla":
        return "xla", "train.attention = xla"
    if requested not in ("auto", kernel):
        hardware = "TPU" if requested == "splash" else "NVIDIA GPU"
        raise UserError(
            f"train.attention: {requested} runs on {hardware}, but this is {device.device_kind}. "
            "Use auto."
        )
    if kernel is None:
        return "xla", f"the default on {device.device_kind}"
    reason = unsupported_reason(kernel, spec, config, mesh)
    if not reason and device in jax.devices():  # a device that is only compiled for cannot run
        dtype = config.train.compute_dtype
        local = mesh.local_devices[0]
        reason = check_against_reference(kernel, spec, config.pack.seq_len, dtype, local)
    if not reason:
        return kernel, f"the kernel for {device.device_kind}"
    if requested == "auto":
        return "xla", f"{kernel} does not support this run: {reason}; slower, and more memory"
    raise UserError(
        f"train.attention: {requested} does not support this run: {reason}. Use auto or xla, or "
        "change that."
    )


def unsupported_reason(
    kernel: str, spec: ModelSpec, config: Config, mesh: jax.sharding.Mesh
) -> str | None:
    """Return why a kernel does not support a run, with what would help; None if it does."""
    T, H = config.pack.seq_len, spec.d_head
    train = config.train
    n_context = n_shards(mesh, "position")
    if n_context > 1:
        return f"it needs whole sequences, the mesh shards them {n_context} ways (mesh.context = 1)"
    if T % 128:
        below = T - T % 128
        return f"pack.seq_len = {T} is no multiple of 128 ({below or 128} or {below + 128})"
    if kernel != "cudnn":
        return None
    device = mesh.devices.flat[0]
    kind = device.device_kind
    if "NVIDIA" not in kind:
        return f"{kind} is not NVIDIA's"
    if float(device.compute_capability) < 9:
        capability = device.compute_capability
        return f"packed documents need Hopper or newer (9.0), and {kind} is {capability}"
    if train.compute_dtype != "bfloat16":
        return f"train.compute_dtype = {train.compute_dtype} (bfloat16)"
    if H % 8 or H > 128:
        return f"model.d_head = {H} is no multiple of 8 up to 128"
    micro_batch = train.batch_size // train.grad_accum_steps
    batch = micro_batch // n_shards(mesh, "batch")
    width = spec.n_heads * H
    n_entries = batch * T * width // n_shards(mesh, "heads")
    if n_entries >= 2**31:
        return (
            f"{batch} sequences per device exceed its 32-bit offsets "
            f"(train.grad_accum_steps above {train.grad_accum_steps})"
        )
    return None


@functools.lru_cache(maxsize=64)
def check_against_reference(
    kernel: str, spec: ModelSpec, seq_len: int, dtype: str, device: Any
) -> str | None:
    """Return how a kernel's output or gradients differ from xla's; None if they agree.

    Run on two sequences before a run relies on it: the kernels are others', and no test here can
    run them on their hardware.
    """
    kind = device.device_kind
    inputs = jax.device_put(make_check_inputs(spec, seq_len, dtype), device)
    try:
        found = run_forward_and_backward(kernel, spec.sliding_window, inputs)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"it fails on {kind} ({lines[0][:200]})"
    reference = run_forward_and_backward("xla", spec.sliding_window, inputs)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    for name, got, expected in zip(names, found, reference, strict=True):
        # numpy's max: XLA's on a CPU ignores NaN
        largest = np.abs(expected).max()
        difference = np.abs(got - expected).max() / largest
        if not difference < MAX_RELATIVE_DIFFERENCE:
            size = f"{difference:.2g} x the largest entry"
            return f"its {name} on {kind} differs from xla's by {size}"
    return None


def make_check_inputs(spec: ModelSpec, seq_len: int, dtype: str) -> tuple[Array, ...]:
    """Return random q, k, v, segment ids and output gradient of two sequences."""
    arrays = []
    N, K = spec.n_heads, spec.n_kv_heads
    keys = jax.random.split(jax.random.key(0), 4)
    for key, n in zip(keys, (N, K, K, N), strict=True):
        shape = (2, seq_len, n, spec.d_head)
        arrays.append(jax.random.normal(key, shape, dtype))
    q, k, v, d_out = arrays
    # the last segment stands for padding
    first = [seq_len // 5, seq_len // 2, seq_len - 7]
    second = [1, seq_len // 3, seq_len]
    ends = jnp.array([first, second])
    has_ended = jnp.arange(seq_len) >= ends[..., None]
    segment_ids = jnp.sum(has_ended, axis=1) + 1
    return q, k, v, segment_ids.astype(jnp.int32), d_out


def run_forward_and_backward(
    backend: str, window: int | None, inputs: tuple[Array, ...]
) -> list[np.ndarray]:
    """Return output and gradients for q, k and v, float32 on the host."""

    @jax.jit
    def run(q: Array, k: Array, v: Array, ids: Array, d_out: Array) -> tuple[Array, ...]:
        def forward(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, ids, window, backend)

        out, pullback = jax.vjp(forward, q, k, v)
        return out, *pullback(d_out)

    found = jax.device_get(run(*inputs))
    return [np.asarray(x, np.float32) for x in found]


def attend_prefix_tree(q: Array, k: Array, v: Array, visible_until: Array) -> Array:
    """Return softmax attention of each query to the keys at or before it that are still visible.

    For trees of texts, see evaluate/prefix_trees.py. q, k and v are as for `attend`.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible_until: int32 [B, T], for each key the first position after it whose query does not
            see it; each position must see itself.
    """
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), visible_until.shape)
    inputs = Inputs(q, k, v, positions, visible_until)
    return blockwise_attention(inputs, QueryBlocks(is_visible=jnp.less))


# ---- xla


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
    before it, within the window, for which is_visible(query's id, key's id) is true.
    """

    window: int | None = None
    stride: int = 1
    is_visible: Callable[[Array, Array], Array] = jnp.equal

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


def xla_attention(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
    """Return attention in query blocks, each against the keys up to its own end."""
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else n_shards(mesh, "position")
    if n > 1 and q.shape[1] % n**2 == 0:
        blocks = QueryBlocks(window, stride=n)
        striped = functools.partial(striped_attention, blocks=blocks)
        return shard_map_attention(striped)(q, k, v, segment_ids)
    # where sequences cannot be striped evenly, XLA shards the blocks: right, but slower
    inputs = Inputs(q, k, v, segment_ids, segment_ids)
    return blockwise_attention(inputs, QueryBlocks(window))


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


# ---- on each device: part of the batch or of the positions, and of the heads


def shard_map_attention(local: Callable[..., Array]) -> Callable[..., Array]:
    """Return local(q, k, v, segment_ids) run by each device on its shard, if there is a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return local
    queries = logical_to_partition_spec(("batch", "position", "heads", None))
    keys = logical_to_partition_spec(("batch", "position", "kv_heads", None))
    ids = logical_to_partition_spec(("batch", "position"))
    in_specs = (queries, keys, keys, ids)
    return jax.shard_map(local, in_specs=in_specs, out_specs=queries, check_vma=False)


def splash_attention(
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
        block = math.gcd(T, 512)
        sizes = kernel.BlockSizes(block, block, block, block, block, block, block, block)
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


def cudnn_attention(q: Array, k: Array, v: Array, segment_ids: Array, window: int | None) -> Array:
    """Return attention by cuDNN's flash attention over packed documents.

    It is given where each document starts and its length. The list of documents has a fixed length,
    T / 128 per sequence and at least 8; with more (documents of under 128 tokens on average), a
    device that has such a sequence takes `xla` in that step.
    """
    packed = functools.partial(cudnn_packed_attention, window=window)
    plain = functools.partial(xla_attention, window=window)

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


def find_document_starts(segment_ids: Array) -> Array:
    """Return whether a document (or the padding) starts at a position, bool [B, T]."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


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
