"""The forward pass of the Llama family.

Each parameter is stated once: name, shape, axes, std. Sharding, initialization, parameter count
and conversion are derived from that. A block's parameters always have a leading layer axis:
`lax.scan` passes the body one layer, and growth is a `take` along that axis. The axis letters are
those of jaxpt/spec.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from jaxpt.model.attention import ATTENTION_OUTPUT, attend
from jaxpt.sharding import make_logical_sharding, with_logical_constraint
from jaxpt.spec import ModelSpec, RopeScaling

nnx.use_eager_sharding(False)  # parameters name logical axes; sharding.py maps them to a mesh

Params = dict[str, Any]  # nested dict of arrays: {"embed": ..., "blocks": {"q": ..., ...}, ...}
Attend = Callable[[Array, Array, Array], Array]  # q, k, v -> [B, T, N, H]
Rope = tuple[Array, Array]  # cos and sin, float32 [B, T, 1, H/2]


class Llama(nnx.Module):
    """tokens -> hidden states after the final norm; `lm_head()` maps those to logits."""

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
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        dtype: Any = jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        backend: str = "xla",
    ) -> Array:
        """Return hidden states [B, T, D] in dtype.

        Args:
            tokens: int32 [B, T], as segment_ids and positions; see spec.Batch.
            segment_ids: a token attends only to its own segment.
            positions: within the document.
            dtype: of activations.
            remat: activation checkpointing policy, a key of CHECKPOINT_POLICIES.
            unroll: layers per iteration of the scan.
            backend: of attention, as attention.choose_backend returned.
        """
        window = self.spec.sliding_window

        def attend_segments(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, segment_ids, window, backend)

        return self.run_layers(tokens, positions, attend_segments, dtype, remat, unroll)

    def run_layers(
        self,
        tokens: Array,
        positions: Array,
        attend: Attend,
        dtype: Any,
        remat: str = "none",
        unroll: int = 1,
    ) -> Array:
        """Return hidden states like __call__, with the caller's attention."""
        # gathered along its width first: a lookup in an embedding sharded both ways makes XLA
        # replicate the result
        embed = self.embed[...].astype(dtype)
        embed = with_logical_constraint(embed, "vocab", None)
        x = constrain_residual(embed[tokens])
        rope = compute_rope(self.spec, positions)
        graph, stacked = nnx.split(self.blocks)

        def layer(x: Array, params: Any) -> tuple[Array, None]:
            block = nnx.merge(graph, params)
            x = block(x, rope, attend)
            return constrain_residual(x), None

        if remat != "none":
            # within a scan nothing merges the recomputation with the first computation, so no
            # barrier against that is needed
            policy = CHECKPOINT_POLICIES[remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=unroll > 1)
        x, _ = jax.lax.scan(layer, x, stacked, unroll=unroll)
        return rms_norm(x, self.norm[...], self.spec.norm_eps)

    def lm_head(self, dtype: Any = jnp.float32) -> Array:
        """Return the output head [D, V]."""
        head = self.embed[...].T if self.spec.tie_embeddings else self.unembed[...]
        return head.astype(dtype)


def constrain_residual(x: Array) -> Array:
    """Shard the residual stream [B, T, D] over batch and positions."""
    return with_logical_constraint(x, "batch", "position", "act_embed")


class Block(nnx.Module):
    """Attention and gated MLP, each after a norm and with a residual connection.

    Parameters are stacked over L layers; __call__ runs one of them, once the scan has removed the
    layer axis.
    """

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        L, D, F = spec.n_layers, spec.d_model, spec.d_ff
        N, K, H = spec.n_heads, spec.n_kv_heads, spec.d_head
        std = D**-0.5
        # the two that write into the residual: their sum over 2L writes keeps its size (GPT-2)
        n_writes = 2 * max(L, 1)
        out_std = (N * H * n_writes) ** -0.5
        down_std = (F * n_writes) ** -0.5
        q_axes = ("layers", "embed", "heads", "head")
        o_axes = ("layers", "heads", "head", "embed")
        kv_axes = ("layers", "embed", "kv_heads", "head")
        mlp_axes = ("layers", "embed", "mlp")

        def param(shape: tuple[int, ...], *axes: str, **init: Any) -> nnx.Param:
            return make_param(rngs, (L, *shape), axes, **init)

        self.eps = spec.norm_eps
        self.attn_norm = param((D,), "layers", "norm", ones=True)
        self.q = param((D, N, H), *q_axes, std=std)
        self.k = param((D, K, H), *kv_axes, std=std)
        self.v = param((D, K, H), *kv_axes, std=std)
        self.o = param((N, H, D), *o_axes, std=out_std)
        self.mlp_norm = param((D,), "layers", "norm", ones=True)
        self.gate = param((D, F), *mlp_axes, std=std)
        self.up = param((D, F), *mlp_axes, std=std)
        self.down = param((F, D), "layers", "mlp", "embed", std=down_std)
        if spec.qkv_bias:
            self.q_bias = param((N, H), "layers", "heads", "head")
            self.k_bias = param((K, H), "layers", "kv_heads", "head")
            self.v_bias = param((K, H), "layers", "kv_heads", "head")
        if spec.out_bias:
            self.o_bias = param((D,), "layers", "norm")
        if spec.mlp_bias:
            self.gate_bias = param((F,), "layers", "mlp")
            self.up_bias = param((F,), "layers", "mlp")
            self.down_bias = param((D,), "layers", "norm")
        if spec.qk_norm:
            self.q_norm = param((H,), "layers", "head", ones=True)
            self.k_norm = param((H,), "layers", "head", ones=True)

    def __call__(self, x: Array, rope: Rope, attend: Attend) -> Array:
        """Return the residual stream [B, T, D] after this layer."""
        normed = rms_norm(x, self.attn_norm[...], self.eps)
        x = x + self.attention(normed, rope, attend)
        normed = rms_norm(x, self.mlp_norm[...], self.eps)
        return x + self.mlp(normed)

    def attention(self, x: Array, rope: Rope, attend: Attend) -> Array:
        """Return what attention adds to the residual, [B, T, D]."""
        q = self.project("q", x)
        k = self.project("k", x)
        v = self.project("v", x)
        if hasattr(self, "q_norm"):
            q = rms_norm(q, self.q_norm[...], self.eps)
            k = rms_norm(k, self.k_norm[...], self.eps)
        q = apply_rope(q, rope)
        k = apply_rope(k, rope)
        heads = attend(q, k, v)
        return self.project("o", heads)

    def mlp(self, x: Array) -> Array:
        """Return what the MLP adds to the residual, [B, T, D]."""
        activations = self.compute_mlp_activations(x)
        return self.project("down", activations)

    def compute_mlp_activations(self, x: Array) -> Array:
        """Return what `down` reads, [B, T, F]."""
        gate = self.project("gate", x)
        up = self.project("up", x)
        return jax.nn.silu(gate) * up

    def project(self, name: str, x: Array) -> Array:
        """Return x times the weight of this name, plus its bias if the model has one."""
        weight = getattr(self, name)
        bias = getattr(self, f"{name}_bias", None)
        return linear(x, weight, bias)


# What backward keeps of a layer besides its input; everything else is recomputed. Matmuls with
# weights have no batch dimensions. Attention's own matmuls have, and are never kept: its output is,
# by name.
policies = jax.checkpoint_policies
save_attention_output = policies.save_only_these_names(ATTENTION_OUTPUT)
offload_dots = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
offload_attention_output = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[ATTENTION_OUTPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
save_dots_and_attention = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, save_attention_output
)


def offload_dots_and_attention(primitive: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep what "dots" keeps, in host memory."""
    is_name = primitive.name == "name"
    policy = offload_attention_output if is_name else offload_dots
    return policy(primitive, *args, **kwargs)


CHECKPOINT_POLICIES = {
    "none": policies.everything_saveable,
    "dots": save_dots_and_attention,
    "offload": offload_dots_and_attention,
    "minimal": save_attention_output,
    "full": policies.nothing_saveable,
}


def make_param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    std: float = 0.0,
    ones: bool = False,
) -> nnx.Param:
    """Return a parameter, normal with the stated std, or ones.

    The std is stated because initializers that infer it from the shape count the layer axis too
    (lecun_normal on (16, 256, 256) gives 0.0156 instead of 0.0626).
    """
    if ones:
        value = jnp.ones(shape)
    else:
        value = jax.random.normal(rngs.params(), shape) * std
    return nnx.Param(value, out_sharding=axes, std=std, ones=ones)


def linear(x: Array, weight: nnx.Param, bias: nnx.Param | None = None) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], plus bias, in x's dtype."""
    y = matmul(x, weight[...].astype(x.dtype))
    if bias is None:
        return y
    return y + bias[...].astype(x.dtype)


@jax.custom_vjp
def matmul(x: Array, weight: Array) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], with a backward of its own.

    A matmul that sums over tokens is fast on a CPU with tokens last on its left side and first on
    its right, so one side is transposed. JAX's gradient transposes the output's, the wider side for
    most weights; this one transposes the narrower side, the residual's, once for all that read it.
    Whole steps are 1.08 to 1.2 x as fast (docs/performance.md); accelerators do not mind.
    """
    y, _ = matmul_fwd(x, weight)
    return y


def matmul_fwd(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return the result, and what backward needs."""
    B, T, *in_dims = x.shape
    matrix = weight.reshape(math.prod(in_dims), -1)
    y = flatten_features(x) @ matrix
    out_dims = weight.shape[len(in_dims) :]
    return y.reshape(B, T, *out_dims), (x, weight)


def matmul_bwd(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    """Return the gradients for x and weight."""
    x, weight = residuals
    x_flat = flatten_features(x)
    d_y_flat = flatten_features(d_y)
    if x_flat.shape[2] <= d_y_flat.shape[2]:
        x_first = jnp.moveaxis(x_flat, 2, 0)
        d_weight = jnp.einsum("ibt,bto->io", x_first, d_y_flat)
    else:
        d_y_first = jnp.moveaxis(d_y_flat, 2, 0)
        d_weight = jnp.einsum("obt,bti->oi", d_y_first, x_flat).T
    matrix = weight.reshape(d_weight.shape)
    d_x = jnp.einsum("bto,io->bti", d_y_flat, matrix)
    return d_x.reshape(x.shape), d_weight.reshape(weight.shape)


matmul.defvjp(matmul_fwd, matmul_bwd)


def flatten_features(x: Array) -> Array:
    """Return [B, T, ...] as [B, T, features]."""
    return x.reshape(*x.shape[:2], -1)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Return the root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    mean_square = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + eps)
    y = y * scale.astype(jnp.float32)
    return y.astype(x.dtype)


# ---- rotary embedding in Hugging Face's split-half layout: channel i rotates with channel i + H/2


def compute_rope(spec: ModelSpec, positions: Array) -> Rope:
    """Return (cos, sin), each float32 [B, T, 1, H/2], per pair of channels and position."""
    # float32: at long T bf16 positions above 256 collide (8 significand bits), so angles repeat
    positions = positions.astype(jnp.float32)[..., None]
    angles = positions * compute_rope_frequencies(spec)
    cos = jnp.cos(angles)[:, :, None]
    sin = jnp.sin(angles)[:, :, None]
    return cos, sin


def compute_rope_frequencies(spec: ModelSpec) -> Array:
    """Return radians per position for each pair of channels, float32 [H/2]."""
    channels = jnp.arange(0, spec.d_head, 2, dtype=jnp.float32)
    exponents = channels / spec.d_head
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return scale_llama3_frequencies(frequencies, scaling)


def scale_llama3_frequencies(frequencies: Array, scaling: RopeScaling) -> Array:
    """Keep fast pairs, divide slow ones by the factor, blend smoothly in between.

    Source: transformers' _compute_llama3_parameters.
    """
    # full turns within the original context
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    slow = (1 - kept) * frequencies / scaling.factor
    return slow + kept * frequencies


def apply_rope(x: Array, rope: Rope) -> Array:
    """Rotate x [B, T, heads, H] by its positions' angles, in float32; return it in x's dtype."""
    cos, sin = rope
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    rotated = jnp.concatenate([new_first, new_second], axis=-1)
    return rotated.astype(x.dtype)


# ---- shapes, axes, counts; and parameters as a plain nested dict


class ParamSpec(NamedTuple):
    """A parameter before it exists.

    Attributes:
        shape: of the array.
        axes: logical axis of each dimension.
        std: of the initial values; 0 with ones unset: zeros.
        ones: initialized to 1 (a norm).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    ones: bool


@functools.lru_cache(maxsize=64)
def make_abstract_model(spec: ModelSpec) -> tuple[Any, Any]:
    """Return (graph definition, state of shapes) of a model; nothing is computed."""

    def make() -> Llama:
        return Llama(spec, nnx.Rngs(0))

    model = nnx.eval_shape(make)
    return nnx.split(model)


def param_specs(spec: ModelSpec) -> dict[str, Any]:
    """Return every ParamSpec, nested like the parameters."""
    _, state = make_abstract_model(spec)
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        axes = tuple(variable.get_metadata("out_sharding"))
        std = variable.get_metadata("std")
        ones = variable.get_metadata("ones")
        flat[path] = ParamSpec(tuple(variable.shape), axes, std, ones)
    return unflatten_paths(flat)


def map_param_specs(make: Callable[[ParamSpec], Any], spec: ModelSpec) -> dict[str, Any]:
    """Return make(ParamSpec) for every parameter, nested like the parameters."""
    return jax.tree.map(make, param_specs(spec), is_leaf=is_param_spec)


def count_params(spec: ModelSpec) -> int:
    """Return the number of parameters."""
    specs = jax.tree.leaves(param_specs(spec), is_leaf=is_param_spec)
    return sum(math.prod(param.shape) for param in specs)


def is_param_spec(x: Any) -> bool:
    """Return whether a node of a tree is a ParamSpec."""
    return isinstance(x, ParamSpec)


def make_param_shardings(spec: ModelSpec, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return a NamedSharding for every parameter."""

    def make(param: ParamSpec) -> NamedSharding:
        return make_logical_sharding(mesh, param.axes)

    return map_param_specs(make, spec)


def make_abstract_params(
    spec: ModelSpec, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32
) -> Params:
    """Return parameters as ShapeDtypeStructs with shardings."""

    def make(param: ParamSpec) -> jax.ShapeDtypeStruct:
        place = make_logical_sharding(mesh, param.axes)
        return jax.ShapeDtypeStruct(param.shape, dtype, sharding=place)

    return map_param_specs(make, spec)


def init_params(
    spec: ModelSpec, seed: int, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32
) -> Params:
    """Return random parameters, initialized sharded; the values are equal on every mesh."""

    def make() -> Params:
        model = Llama(spec, nnx.Rngs(seed))
        _, state = nnx.split(model)
        params = nnx.to_pure_dict(state)
        return jax.tree.map(lambda x: x.astype(dtype), params)

    shardings = make_param_shardings(spec, mesh)
    return jax.jit(make, out_shardings=shardings)()


def bind_params(spec: ModelSpec, params: Params) -> Llama:
    """Return the module with these parameters (arrays or tracers)."""
    graph, state = make_abstract_model(spec)
    state = jax.tree.map(lambda x: x, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def unflatten_paths(flat: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Return {("blocks", "q"): x} as {"blocks": {"q": x}}."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        inner = nested
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return nested
