"""The Llama family's forward pass. Every weight is one row: name, shape, axes, std.

Sharding, initialisation, parameter count and conversion are all derived from these rows. A block's weights carry a
leading layer axis, always: `lax.scan` hands the body one layer, and growth is a `take` along that axis.
The axis letters are those of jaxpt/spec.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpt.model.attention import ATTENTION_OUTPUT, attend
from jaxpt.sharding import make_logical_sharding, with_logical_constraint
from jaxpt.spec import ModelSpec, RopeScaling

nnx.use_eager_sharding(False)  # rows name logical axes; sharding.py turns them into a mesh's


class Llama(nnx.Module):
    """tokens -> hidden states after the final norm; `head()` turns those into logits."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        V, D = spec.vocab_size, spec.d_model
        self.spec = spec
        self.embed = make_param(rngs, (V, D), ("vocab", "embed"), std=0.02)
        self.blocks = Block(spec, rngs)
        self.norm = make_param(rngs, (D,), ("norm",), ones=True)
        if not spec.tie_embeddings:
            self.unembed = make_param(rngs, (D, V), ("embed", "vocab"), std=D**-0.5)

    def __call__(
        self,
        tokens,
        segment_ids,
        positions,
        dtype=jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        backend: str = "xla",
    ):
        """tokens, segments, positions: int32 [B, T], as in spec.Batch. Returns hidden states [B, T, D] in dtype.

        remat    what backward keeps of a layer, a name of REMAT
        unroll   layers that one turn of the scan holds
        backend  attention's, as attention.choose answered
        """
        window = self.spec.sliding_window
        return self.run_layers(
            tokens,
            positions,
            lambda q, k, v: attend(q, k, v, segment_ids, window, backend),
            dtype,
            remat,
            unroll,
        )

    def run_layers(self, tokens, positions, attend, dtype, remat: str = "none", unroll: int = 1):
        """Like __call__, with attend(q, k, v) -> [B, T, N, H] in place of segments: who sees whom is the caller's."""
        # gathered along its width first: a lookup in a table cut both ways makes XLA replicate the result
        table = with_logical_constraint(self.embed[...].astype(dtype), "vocab", None)
        x = with_logical_constraint(table[tokens], "batch", "position", "act_embed")
        rope = compute_rope(self.spec, positions)
        blocks, stacked = nnx.split(self.blocks)

        def layer(x, one):
            block = nnx.merge(blocks, one)
            x = block(x, rope, attend)
            return with_logical_constraint(x, "batch", "position", "act_embed"), None

        if remat != "none":
            # inside a scan nothing merges the second computation with the first, so no barrier is needed against that
            layer = jax.checkpoint(layer, policy=CHECKPOINT_POLICIES[remat], prevent_cse=unroll > 1)
        x, _ = jax.lax.scan(layer, x, stacked, unroll=unroll)
        return rms_norm(x, self.norm[...], self.spec.norm_eps)

    def lm_head(self, dtype=jnp.float32):
        """The output head [D, V]."""
        return (self.embed[...].T if self.spec.tie_embeddings else self.unembed[...]).astype(dtype)


class Block(nnx.Module):
    """Attention and gated feed-forward, each behind a norm and beside the residual. The rows are stacked over L layers;
    __call__ runs one of them, after scan took the layer axis off.
    """

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        L, D, F, N, K, H = (
            spec.n_layers,
            spec.d_model,
            spec.d_ff,
            spec.n_heads,
            spec.n_kv_heads,
            spec.d_head,
        )
        self.eps = spec.norm_eps
        self.attn_norm = make_param(rngs, (L, D), ("layers", "norm"), ones=True)
        self.q = make_param(rngs, (L, D, N, H), ("layers", "embed", "heads", "head"), std=D**-0.5)
        self.k = make_param(
            rngs, (L, D, K, H), ("layers", "embed", "kv_heads", "head"), std=D**-0.5
        )
        self.v = make_param(
            rngs, (L, D, K, H), ("layers", "embed", "kv_heads", "head"), std=D**-0.5
        )
        # the two that write into the residual: their sum over 2L writes keeps the residual's size (GPT-2's rule)
        self.o = make_param(
            rngs,
            (L, N, H, D),
            ("layers", "heads", "head", "embed"),
            std=(N * H * 2 * max(L, 1)) ** -0.5,
        )
        self.mlp_norm = make_param(rngs, (L, D), ("layers", "norm"), ones=True)
        self.gate = make_param(rngs, (L, D, F), ("layers", "embed", "mlp"), std=D**-0.5)
        self.up = make_param(rngs, (L, D, F), ("layers", "embed", "mlp"), std=D**-0.5)
        self.down = make_param(
            rngs, (L, F, D), ("layers", "mlp", "embed"), std=(F * 2 * max(L, 1)) ** -0.5
        )
        if spec.qkv_bias:
            self.q_bias = make_param(rngs, (L, N, H), ("layers", "heads", "head"), std=0.0)
            self.k_bias = make_param(rngs, (L, K, H), ("layers", "kv_heads", "head"), std=0.0)
            self.v_bias = make_param(rngs, (L, K, H), ("layers", "kv_heads", "head"), std=0.0)
        if spec.out_bias:
            self.o_bias = make_param(rngs, (L, D), ("layers", "norm"), std=0.0)
        if spec.mlp_bias:
            self.gate_bias = make_param(rngs, (L, F), ("layers", "mlp"), std=0.0)
            self.up_bias = make_param(rngs, (L, F), ("layers", "mlp"), std=0.0)
            self.down_bias = make_param(rngs, (L, D), ("layers", "norm"), std=0.0)
        if spec.qk_norm:
            self.q_norm = make_param(rngs, (L, H), ("layers", "head"), ones=True)
            self.k_norm = make_param(rngs, (L, H), ("layers", "head"), ones=True)

    def __call__(self, x, rope, attend):
        """X [B, T, D]; rope: (cos, sin) of `rotation`; attend(q, k, v) -> [B, T, N, H]. Returns [B, T, D]."""
        x = x + self.attention(rms_norm(x, self.attn_norm[...], self.eps), rope, attend)
        return x + self.mlp(rms_norm(x, self.mlp_norm[...], self.eps))

    def attention(self, x, rope, attend):
        q = linear(x, self.q, getattr(self, "q_bias", None))
        k = linear(x, self.k, getattr(self, "k_bias", None))
        v = linear(x, self.v, getattr(self, "v_bias", None))
        if hasattr(self, "q_norm"):
            q, k = rms_norm(q, self.q_norm[...], self.eps), rms_norm(k, self.k_norm[...], self.eps)
        mixed = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        return linear(mixed, self.o, getattr(self, "o_bias", None))

    def mlp(self, x):
        return linear(self.compute_mlp_activations(x), self.down, getattr(self, "down_bias", None))

    def compute_mlp_activations(self, x):
        """What `down` reads, [B, T, F]."""
        gate = linear(x, self.gate, getattr(self, "gate_bias", None))
        up = linear(x, self.up, getattr(self, "up_bias", None))
        return jax.nn.silu(gate) * up


# What backward keeps of a layer beside its input; everything else is computed again. Products with weights have no batch dimensions,
# attention's own have, and are never kept: its result is, by name.
policies = jax.checkpoint_policies
save_attention_output = policies.save_only_these_names(ATTENTION_OUTPUT)
offload_dots = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
offload_attention_output = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[ATTENTION_OUTPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
CHECKPOINT_POLICIES = {
    "none": policies.everything_saveable,
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, save_attention_output
    ),
    "offload": lambda primitive, *a, **k: (
        offload_attention_output if primitive.name == "name" else offload_dots
    )(primitive, *a, **k),
    "minimal": save_attention_output,
    "full": policies.nothing_saveable,
}


def make_param(rngs: nnx.Rngs, shape, axes, *, std: float = 0.0, ones: bool = False) -> nnx.Param:
    """One row. Normal with the stated std, or ones. The std is stated because initialisers that read it off the shape
    count the layer axis too (lecun_normal on (16, 256, 256) gives 0.0156 instead of 0.0626).
    """
    value = jnp.ones(shape) if ones else jax.random.normal(rngs.params(), shape) * std
    return nnx.Param(value, out_sharding=axes, std=std, ones=ones)


def linear(x, matrix, bias=None):
    y = matmul(x, matrix[...].astype(x.dtype))
    return y if bias is None else y + bias[...].astype(x.dtype)


@jax.custom_vjp
def matmul(x, weight):
    """X [B, T, ...reads] times matrix [...reads, ...writes]: [B, T, ...writes], with a backward of its own for the matrix.

    A product that sums over tokens is fast on a CPU with tokens last on its left side and first on its right, so one side is turned. In JAX's
    gradient it is the result's, which most matrices make the wider one; here it is the narrower one, which is the residual's and
    turned once for all that read it. Whole steps are 1.08 to 1.2 x as fast (docs/performance.md); an accelerator does not mind.
    """
    return matmul_fwd(x, weight)[0]


def matmul_fwd(x, matrix):
    B, T, *reads = x.shape
    y = flatten_features(x) @ matrix.reshape(math.prod(reads), -1)
    return y.reshape(B, T, *matrix.shape[len(reads) :]), (x, matrix)


def matmul_bwd(kept, g):
    x, matrix = kept
    tokens, results, turned = (
        flatten_features(x),
        flatten_features(g),
        lambda y: jnp.moveaxis(y, 2, 0),
    )
    if tokens.shape[2] <= results.shape[2]:
        by_matrix = jnp.einsum("rbt,btw->rw", turned(tokens), results)
    else:
        by_matrix = jnp.einsum("wbt,btr->wr", turned(results), tokens).T
    by_x = jnp.einsum("btw,rw->btr", results, matrix.reshape(by_matrix.shape))
    return by_x.reshape(x.shape), by_matrix.reshape(matrix.shape)


matmul.defvjp(matmul_fwd, matmul_bwd)


def flatten_features(x):
    return x.reshape(*x.shape[:2], -1)


def rms_norm(x, scale, eps: float):
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


# ---- rotary positions, in Hugging Face's split-half layout: channel i turns with channel i + H/2


def compute_rope(spec: ModelSpec, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [B, T, 1, H/2], of the angle of each pair of channels at each position."""
    # float32: at long rows bf16 positions above 256 collide (8 significand bits), so angles would repeat
    angles = positions.astype(jnp.float32)[..., None] * compute_rope_frequencies(spec)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def compute_rope_frequencies(spec: ModelSpec) -> jax.Array:
    """Radians a position for each pair of channels, float32 [H/2]."""
    plain = 1.0 / spec.rope_theta ** (
        jnp.arange(0, spec.d_head, 2, dtype=jnp.float32) / spec.d_head
    )
    scaling = spec.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    return scale_llama3_frequencies(plain, scaling)


def scale_llama3_frequencies(plain: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Source: transformers' _compute_llama3_parameters. Fast pairs stay, slow pairs are divided by factor, smoothly between."""
    turns = (
        scaling.original_max_seq_len * plain / (2 * math.pi)
    )  # full turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """X [B, T, heads, H] turned by its positions' angles; in float32, returned in x's dtype."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


# ---- what the rows say: shapes, axes, counts; and parameters as a plain nested dict


class ParamSpec(NamedTuple):
    """One weight: shape, logical axes (one a dimension), std of its first values (0 and ones: a norm)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    ones: bool


@functools.lru_cache(maxsize=64)
def make_abstract_model(spec: ModelSpec) -> tuple[Any, Any]:
    """(graph definition, state of shapes) of a model of this spec; nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: Llama(spec, nnx.Rngs(0))))


def param_specs(spec: ModelSpec) -> dict[str, Any]:
    """Every weight's Row, in the nested shape of the parameters: {"embed": Row, "blocks": {"q": Row, ...}, ...}."""
    _, state = make_abstract_model(spec)
    as_row = lambda v: ParamSpec(
        tuple(v.shape),
        tuple(v.get_metadata("out_sharding")),
        v.get_metadata("std"),
        v.get_metadata("ones"),
    )
    return unflatten_paths({path: as_row(variable) for path, variable in nnx.to_flat_state(state)})


def count_params(spec: ModelSpec) -> int:
    """Number of parameters."""
    return sum(
        math.prod(row.shape) for row in jax.tree.leaves(param_specs(spec), is_leaf=is_param_spec)
    )


def is_param_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def make_param_shardings(spec: ModelSpec, mesh) -> dict[str, Any]:
    """A NamedSharding for every weight, in the nested shape of the parameters."""
    return jax.tree.map(
        lambda row: make_logical_sharding(mesh, row.axes), param_specs(spec), is_leaf=is_param_spec
    )


def make_abstract_params(spec: ModelSpec, mesh, dtype=jnp.float32) -> dict[str, Any]:
    """Parameters as ShapeDtypeStructs that carry their shardings."""
    return jax.tree.map(
        lambda row: jax.ShapeDtypeStruct(
            row.shape, dtype, sharding=make_logical_sharding(mesh, row.axes)
        ),
        param_specs(spec),
        is_leaf=is_param_spec,
    )


def init_params(spec: ModelSpec, seed: int, mesh, dtype=jnp.float32) -> dict[str, Any]:
    """Random parameters, each device making only its own pieces; the values are the same on every mesh."""

    def make():
        _, state = nnx.split(Llama(spec, nnx.Rngs(seed)))
        return jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(state))

    return jax.jit(make, out_shardings=make_param_shardings(spec, mesh))()


def bind_params(spec: ModelSpec, params: dict[str, Any]) -> Llama:
    """The module over these parameters (a nested dict of arrays or tracers)."""
    graph, state = make_abstract_model(spec)
    state = jax.tree.map(lambda x: x, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def unflatten_paths(flat: dict[tuple, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        inner = nested
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return nested
