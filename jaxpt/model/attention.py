"""Causal attention within documents: one function, several backends.

`xla` runs everywhere. `splash` is JAX's own TPU kernel; `cudnn` is NVIDIA's, by way of JAX. All three see the same keys and give
the same numbers, which tests/test_attention.py holds them to. `choose` says which one a run takes and why.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxpt.config import Config
from jaxpt.sharding import LOGICAL_AXIS_RULES, logical_to_partition_spec, n_shards
from jaxpt.spec import ModelSpec, UserError

# Queries are taken this many at a time and see only the keys up to the end of their band, so that the upper triangle is hardly
# computed and a layer holds scores of size QUERY_CHUNK x S rather than T x S.
QUERY_CHUNK_SIZE = 128
# A row is cut into so many bands, and each is a loop over its chunks. Chunks written out one by one compute 52 % of the square at
# T = 4,096 where bands compute 56 %, but take three times as long to compile (docs/performance.md).
N_QUERY_BLOCKS = 8

BACKENDS = ("xla", "splash", "cudnn")
ATTENTION_OUTPUT = "attended"  # the name that remat policies know attention's result by


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    window: int | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Softmax attention of each query to the keys of its own document at or before it.

    q         [B, T, N, H]   rotated
    k, v      [B, T, K, H]   N is a multiple of K; query head n reads kv head n // (N / K)
    segments  [B, T]         int32; a token sees only tokens of its own segment, whose places are neighbours
    window    a query sees this many positions, itself included; None sees all
    backend   one of NAMES, as `choose` answered

    Returns [B, T, N, H] in q's dtype; the softmax is float32.
    """
    return {"xla": xla_attention, "splash": splash_attention, "cudnn": cudnn_attention}[backend](
        q, k, v, segment_ids, window
    )


def choose_backend(spec: ModelSpec, settings: Config, mesh) -> tuple[str, str]:
    """(backend, reason): what train.attention comes to for a model on a mesh, and why, for the console.

    Raises UserError when a backend that was asked for by name cannot do it.
    """
    asked, device = settings.train.attention, mesh.devices.flat[0]
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(device.platform)
    if asked == "xla":
        return "xla", "train.attention = xla"
    if asked not in ("auto", kernel):
        raise UserError(
            f"train.attention: {asked} runs on {'TPU' if asked == 'splash' else 'NVIDIA GPU'}, and this is {device.device_kind}. Use auto."
        )
    if kernel is None:
        return "xla", f"the way for {device.device_kind}"
    hindrance = unsupported_reason(kernel, spec, settings, mesh)
    if (
        not hindrance and device in jax.devices()
    ):  # a device that is only compiled for cannot be asked
        hindrance = check_against_reference(
            kernel, spec, settings.pack.seq_len, settings.train.compute_dtype, mesh.local_devices[0]
        )
    if hindrance and asked != "auto":
        raise UserError(
            f"train.attention: {asked} cannot do this run: {hindrance}. Set it to auto or xla, or change that."
        )
    if hindrance:
        return "xla", f"{kernel} cannot do this run: {hindrance}; slower, and more memory"
    return kernel, f"the kernel for {device.device_kind}"


def unsupported_reason(kernel: str, spec: ModelSpec, settings: Config, mesh) -> str | None:
    """What keeps a kernel from doing this run, as half a sentence with what would help; None when nothing does."""
    T, H, N, train = settings.pack.seq_len, spec.d_head, spec.n_heads, settings.train
    device = mesh.devices.flat[0]
    if n_shards(mesh, "position") > 1:
        return f"it needs whole rows on a device, and the mesh cuts them into {n_shards(mesh, 'position')} (mesh.context = 1)"
    if T % 128:
        return f"pack.seq_len = {T} is no multiple of 128 ({T // 128 * 128 or 128} or {(T // 128 + 1) * 128})"
    if kernel == "cudnn":
        if "NVIDIA" not in device.device_kind:
            return f"{device.device_kind} is not NVIDIA's"
        if float(device.compute_capability) < 9:
            return f"packed documents need Hopper or newer (9.0), and {device.device_kind} is {device.compute_capability}"
        if train.compute_dtype != "bfloat16":
            return f"train.compute_dtype = {train.compute_dtype} (bfloat16)"
        if H % 8 or H > 128:
            return f"model.d_head = {H} is no multiple of 8 up to 128"
        rows = train.batch_size // train.grad_accum_steps // n_shards(mesh, "batch")
        if rows * T * N * H // n_shards(mesh, "heads") >= 2**31:
            return f"{rows} rows a device are more than its 32-bit offsets count (train.grad_accum_steps = {train.grad_accum_steps} or more)"
    return None


@functools.lru_cache(maxsize=64)
def check_against_reference(
    kernel: str, spec: ModelSpec, seq_len: int, dtype: str, device
) -> str | None:
    """How a kernel's results or gradients on a device are not those of xla, or how it fails; None when they agree.

    Tried on two rows before a run relies on it, because the kernels belong to others and no test here can run them on their hardware.
    """
    shape = lambda heads: (2, seq_len, heads, spec.d_head)  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, shape(n), dtype)
        for key, n in zip(
            keys, (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads, spec.n_heads), strict=True
        )
    )
    ends = jnp.array([[seq_len // 5, seq_len // 2, seq_len - 7], [1, seq_len // 3, seq_len]])
    segments = (jnp.sum(jnp.arange(seq_len) >= ends[..., None], axis=1) + 1).astype(
        jnp.int32
    )  # the last piece stands for padding

    def results(backend):
        def both(q, k, v, segments, g):
            mixed, pull = jax.vjp(
                lambda q, k, v: attend(q, k, v, segments, spec.sliding_window, backend), q, k, v
            )
            return {"result": mixed, **dict(zip(("q", "k", "v"), pull(g), strict=True))}

        return jax.device_get(jax.jit(both)(*jax.device_put((q, k, v, segments, g), device)))

    try:
        ours = results(kernel)
    except Exception as error:
        return f"it fails on {device.device_kind} ({str(error).strip().splitlines()[0][:200]})"
    theirs = results("xla")
    for name in ("result", "q", "k", "v"):
        got, wanted = (np.asarray(each[name], np.float32) for each in (ours, theirs))
        apart = (
            np.abs(got - wanted).max() / np.abs(wanted).max()
        )  # numpy's max: XLA's on a CPU passes over NaN
        if (
            not apart < 0.05
        ):  # bfloat16's roundings stay below a tenth of that, a leak between documents is above it
            what = "result" if name == "result" else f"gradient of {name}"
            return f"its {what} on {device.device_kind} is {apart:.2g} x the largest entry away from xla's"
    return None


def attend_prefix_tree(
    q: jax.Array, k: jax.Array, v: jax.Array, visible_until: jax.Array
) -> jax.Array:
    """Softmax attention of each query to the keys at or before it that are not closed yet: ends, int32 [B, T], says for each key the first place
    after it whose query does not see it. q, k, v as for `attend`; each place must see itself. For trees of texts, see evaluate/prefix_trees.py.
    """
    places = jnp.broadcast_to(jnp.arange(q.shape[1]), visible_until.shape)
    return blockwise_attention(q, k, v, places, visible_until, 0, QueryBlocks(is_visible=jnp.less))


# ---- xla


class QueryBlocks(NamedTuple):
    """How a row's queries are cut, and whom they see: query i stands at place i * stride + offset of the keys, offset < stride, and sees
    those of the keys at or before it, inside the window, of which sees(query's segment, key's segment) is true.
    """

    window: int | None = None
    stride: int = 1
    is_visible: Callable = jnp.equal

    def iterate_blocks(self, T: int) -> Iterator[tuple[int, slice, slice]]:
        """(chunks, queries, keys) of each of at most BANDS bands of T queries: whole chunks, but for a short last band of one."""
        band = QUERY_CHUNK_SIZE * max(1, -(-T // (QUERY_CHUNK_SIZE * N_QUERY_BLOCKS)))
        for start, stop in itertools.pairwise(
            sorted({*range(0, T, band), T // QUERY_CHUNK_SIZE * QUERY_CHUNK_SIZE, T})
        ):
            first = 0 if self.window is None else max(0, start * self.stride - self.window + 1)
            yield (
                max(1, (stop - start) // QUERY_CHUNK_SIZE),
                slice(start, stop),
                slice(first, stop * self.stride),
            )


def xla_attention(q, k, v, segments, window):
    """Bands of queries, each against the keys up to its own end."""
    mesh = jax.sharding.get_abstract_mesh()
    n = 1 if mesh.empty else n_shards(mesh, "position")
    bands = QueryBlocks(window)
    if n > 1 and q.shape[1] % n**2 == 0:
        return shard_map_attention(
            functools.partial(striped_attention, query_blocks=bands._replace(stride=n))
        )(q, k, v, segments)
    # where rows are cut into pieces that cannot be dealt evenly, XLA places the bands: right, but slower
    return blockwise_attention(q, k, v, segments, segments, 0, bands)


def striped_attention(q, k, v, segments, query_blocks):
    """Attention of rows that the mesh cuts: every device gathers all keys, and has every n-th query instead of n-th part of the row.

    Were the queries left where they are, the device with a row's end would see n times what the one with its start sees, and all
    would wait for it. Queries and results travel once each way, keys and values to all.
    """
    axis = LOGICAL_AXIS_RULES["position"]
    n, which = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    B, part = segments.shape

    def deal(x):  # place r here is place r * n + which of the row
        cut = x.reshape(B, part // n, n, *x.shape[2:])
        return jax.lax.all_to_all(cut, axis, split_axis=2, concat_axis=1, tiled=True).reshape(
            x.shape
        )

    def undeal(x):
        return jax.lax.all_to_all(
            x[:, :, None], axis, split_axis=1, concat_axis=2, tiled=True
        ).reshape(x.shape)

    k, v, all_segments = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v, segments))
    return undeal(
        blockwise_attention(deal(q), k, v, deal(segments), all_segments, which, query_blocks)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def blockwise_attention(q, k, v, q_segments, k_segments, offset, bands):
    """Attention of q [B, T, N, H] to k and v [B, S, K, H], as `bands` says. Backward keeps the result and the logarithm of each query's sum, and
    computes the scores again: they are the largest thing a layer would otherwise keep.
    """
    return blockwise_attention_fwd(q, k, v, q_segments, k_segments, offset, bands)[0]


def blockwise_attention_fwd(q, k, v, q_segments, k_segments, offset, bands):
    T, K = q.shape[1], k.shape[2]
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

    def one(seen, _, chunk):
        scores = compute_scores(*chunk, keys[:, :, seen], k_segments[:, seen], seen.start, bands)
        top = jnp.max(scores, axis=-1, keepdims=True)  # every query sees itself, so it is finite
        shares = jnp.exp(scores - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        mixed = (
            jnp.einsum(
                "bkgts,bksh->bkgth",
                shares.astype(v.dtype),
                values[:, :, seen],
                preferred_element_type=jnp.float32,
            )
            / total
        )
        return None, (mixed.astype(q.dtype), (top + jnp.log(total))[..., 0])

    asked = (move_heads_first(q, K), *query_ids_and_positions(q_segments, offset, bands))
    found = [
        jax.lax.scan(functools.partial(one, seen), None, split_query_chunks(asked, n, at))[1]
        for n, at, seen in bands.cuts(T)
    ]
    mixed, logs = (
        jnp.concatenate([merge_query_chunks(x) for x in each], axis=3)
        for each in zip(*found, strict=True)
    )
    mixed, logs = (
        checkpoint_name(jnp.moveaxis(mixed, 3, 1).reshape(q.shape), ATTENTION_OUTPUT),
        checkpoint_name(logs, ATTENTION_OUTPUT),
    )
    return mixed, (q, k, v, q_segments, k_segments, offset, mixed, logs)


def blockwise_attention_bwd(bands, kept, g):
    """Scores and their gradients lie heads first and keys last, as in forward, and each product is written so that none of them is transposed:
    on a CPU that would take as long as all else here.
    """
    q, k, v, q_segments, k_segments, offset, mixed, logs = kept
    (B, T, _, H), (_, S, K, _) = q.shape, k.shape
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(seen, sums, chunk):
        queries, g, logs, means, *asked = chunk
        shares = jnp.exp(
            compute_scores(
                queries, *asked, keys[:, :, seen], k_segments[:, seen], seen.start, bands
            )
            - logs[..., None]
        )
        by_share = product("bkgth,bksh->bkgts", g, values[:, :, seen])
        by_score = (shares * (by_share - means[..., None]) * H**-0.5).astype(q.dtype)
        by_key = product("bkgth,bkgts->bkhs", queries, by_score)
        by_value = product("bkgth,bkgts->bkhs", g, shares.astype(g.dtype))
        by_query = product("bkgts,bksh->bkgth", by_score, keys[:, :, seen]).astype(q.dtype)
        return (sums[0] + by_key, sums[1] + by_value), by_query

    means = jnp.sum(
        g.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True
    )  # of each query's gradient by its shares
    asked = (
        move_heads_first(q, K),
        move_heads_first(g, K),
        logs,
        move_heads_first(means, K)[..., 0],
        *query_ids_and_positions(q_segments, offset, bands),
    )
    by_keys, by_values, by_queries = jnp.zeros((B, K, H, S)), jnp.zeros((B, K, H, S)), []
    for n, at, seen in bands.cuts(T):
        sums = by_keys[..., seen], by_values[..., seen]
        sums, by_query = jax.lax.scan(
            functools.partial(one, seen), sums, split_query_chunks(asked, n, at)
        )
        by_keys, by_values = (
            by_keys.at[..., seen].set(sums[0]),
            by_values.at[..., seen].set(sums[1]),
        )
        by_queries.append(merge_query_chunks(by_query))
    by_queries = jnp.moveaxis(jnp.concatenate(by_queries, axis=3), 3, 1).reshape(q.shape)
    return (
        by_queries,
        *(jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in (by_keys, by_values)),
        None,
        None,
        None,
    )


blockwise_attention.defvjp(blockwise_attention_fwd, blockwise_attention_bwd)


def compute_scores(queries, q_segments, places, keys, k_segments, first, bands):
    """Float32 [B, K, G, C, S] of C queries to S keys from place `first` on; -inf where a query does not see a key."""
    distance = places[..., None] - (first + jnp.arange(keys.shape[2]))
    sees = (distance >= 0) & bands.sees(q_segments[..., None], k_segments[:, None, None, None])
    if bands.window is not None:
        sees &= distance < bands.window
    scores = (
        jnp.einsum("bkgth,bksh->bkgts", queries, keys, preferred_element_type=jnp.float32)
        * queries.shape[-1] ** -0.5
    )
    return jnp.where(sees, scores, -jnp.inf)


# What belongs to queries lies as [B, K, G, T, ...], with 1 for an axis that it does not depend on; G query heads share a kv head.


def move_heads_first(x, K):
    B, T, N, H = x.shape
    return jnp.moveaxis(x.reshape(B, T, K, N // K, H), 1, 3)


def query_ids_and_positions(q_segments, offset, bands):
    """Segments and places of the queries."""
    return q_segments[:, None, None], (jnp.arange(q_segments.shape[1]) * bands.stride + offset)[
        None, None, None
    ]


def split_query_chunks(xs, n, at):
    """The queries `at`, as n chunks: [n, B, K, G, T / n, ...]."""
    return [
        jnp.moveaxis(x[:, :, :, at].reshape(*x.shape[:3], n, -1, *x.shape[4:]), 3, 0) for x in xs
    ]


def merge_query_chunks(chunks):
    """[n, B, K, G, C, ...] -> [B, K, G, n C, ...]"""
    n, *heads, C = chunks.shape[:5]
    return jnp.moveaxis(chunks, 0, 3).reshape(*heads, n * C, *chunks.shape[5:])


# ---- on each device: some of the rows, or of their positions, and some of the heads


def shard_map_attention(local):
    """local(q, k, v, segments) run by each device on its own part of the mesh in force; as it is where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return local
    queries, keys = (
        logical_to_partition_spec(("batch", "position", heads, None))
        for heads in ("heads", "kv_heads")
    )
    return jax.shard_map(
        local,
        in_specs=(queries, keys, keys, logical_to_partition_spec(("batch", "position"))),
        out_specs=queries,
        check_vma=False,
    )


def splash_attention(q, k, v, segments, window, interpret=False):
    """JAX's Splash kernel (jax.experimental.pallas.ops.tpu.splash_attention): skips blocks that causality or the window hides, compares
    segments inside the others, and holds no scores outside the chip's vector memory.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def local(q, k, v, segments):
        T, N, H = q.shape[1:]
        mask = (
            masks.CausalMask((T, T))
            if window is None
            else masks.LocalMask((T, T), (window - 1, 0), 0)
        )
        block = next(size for size in (512, 256, 128) if T % size == 0)
        sizes = kernel.BlockSizes(*[block] * 8)
        run = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * N),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION_OUTPUT,
            interpret=interpret,
        )
        heads_first = [jnp.swapaxes(x, 1, 2) for x in ((q * H**-0.5).astype(q.dtype), k, v)]
        mixed = jax.vmap(
            lambda q, k, v, ids: run(q, k, v, segment_ids=kernel.SegmentIds(ids, ids))
        )(*heads_first, segments)
        return jnp.swapaxes(mixed, 1, 2)

    return shard_map_attention(local)(q, k, v, segments)


def cudnn_attention(q, k, v, segments, window):
    """CuDNN's flash attention over packed documents: it is given where each begins and how long it is, and never looks across.

    The list of documents has a fixed length, T / 128 a row and 8 at least. A step whose rows hold more (documents of under 128 tokens on average)
    takes `xla` on the device that has such a row.
    """

    def local(q, k, v, segments):
        fits = jnp.max(jnp.sum(find_document_starts(segments), axis=1)) <= max_documents(segments)
        return either(fits, q, k, v, segments)

    def packed(q, k, v, segments):
        return cudnn_packed_attention(q, k, v, segments, window)

    def plain(q, k, v, segments):
        return xla_attention(q, k, v, segments, window)

    # cuDNN's statistics are [B x documents, N, T] float32, several times the layer's input, so they are made again in backward:
    # one more forward of attention for keeping nothing but q, k and v. It also keeps lax.cond from storing for both ways.
    @jax.custom_vjp
    def either(fits, q, k, v, segments):
        return jax.lax.cond(fits, packed, plain, q, k, v, segments)

    def backward(kept, g):
        fits, *inputs, segments = kept
        way = lambda attend: (
            lambda q, k, v, g: jax.vjp(lambda *x: attend(*x, segments), q, k, v)[1](g)
        )
        return (None, *jax.lax.cond(fits, way(packed), way(plain), *inputs, g), None)

    either.defvjp(lambda *inputs: (either(*inputs), inputs), backward)
    return checkpoint_name(shard_map_attention(local)(q, k, v, segments), ATTENTION_OUTPUT)


def cudnn_packed_attention(q, k, v, segments, window):
    from jax._src.cudnn import (
        fused_attention_stablehlo as fused,
    )  # jax.nn's own way in has no packed documents

    N, K, H = q.shape[2], k.shape[2], q.shape[3]
    # JAX reckons the offsets of keys with the number of query heads, which is wrong for fewer kv heads: they are repeated
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    starts, lengths = compute_document_offsets(segments)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return fused.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=H**-0.5, mask_type=fused.MaskType.PADDING_CAUSAL, sliding_window_length=window,
    )  # fmt: skip


def find_document_starts(segments):
    """Whether a document (or the padding) begins at a place, bool [B, T]."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def max_documents(segments) -> int:
    return max(8, segments.shape[1] // 128)


def compute_document_offsets(segments):
    """Where each document of a row begins and how many tokens it has, padding being one too; int32 [B, most_documents], -1 where there is none."""
    M, T = max_documents(segments), segments.shape[1]
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=M, fill_value=T)[0])(
        find_document_starts(segments)
    ).astype(jnp.int32)
    lengths = jnp.diff(starts, axis=1, append=T)
    there = starts < T
    return jnp.where(there, starts, -1), jnp.where(there, lengths, -1)
