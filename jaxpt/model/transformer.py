"""The forward pass: embedding, layers, final norm, output head.

Parameters are a nested dict of arrays, described by `param_specs`. A layer's parameters are stacked
along a leading axis that one scan walks, for training, decoding and measuring alike; growth is a
`take` along it. The axis letters are those of jaxpt/spec.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from jaxpt.model import attention, complete_p, lora
from jaxpt.model.kernels.low_matmul import fits_low_matmul
from jaxpt.model.kernels.select import attend
from jaxpt.model.kernels.sharded import ATTENTION_OUTPUT
from jaxpt.model.mlp import SideOutputs
from jaxpt.model.norm import rms_norm
from jaxpt.model.param import (
    ParamSpec,
    ParamSpecs,
    list_param_specs,
    map_param_specs,
    matrix,
    norm_scale,
    normal,
    param_key,
    replace_subtree,
    subtree_like,
)
from jaxpt.model.rope import Rope, compute_ropes
from jaxpt.model.softcap import apply_softcap
from jaxpt.sharding import (
    check_model_divides,
    jit_once,
    make_logical_sharding,
    with_logical_constraint,
)
from jaxpt.spec import LayerKind, LoraSpec, ModelSpec

Params = dict[str, Any]  # nested dict of arrays: {"embed": ..., "blocks": {"q": ..., ...}, ...}

EMBED_STD = 0.02
POST_NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


@functools.lru_cache(maxsize=64)
def param_specs(spec: ModelSpec) -> ParamSpecs:
    """Return the description of every parameter, nested like the parameters."""
    V, D = spec.vocab_size, spec.d_model
    params: ParamSpecs = {
        "embed": ParamSpec(
            (V, D), ("vocab", "embed"), normal(EMBED_STD), "model.embed_tokens.weight"
        ),
        "blocks": {
            name: param.stack(spec.n_layers, "model.layers.{}.")
            for name, param in layer_params(spec).items()
        },
        "norm": residual_norm_scale(spec, "model.norm"),
    }
    if not spec.tie_embeddings:
        params["unembed"] = matrix((D, V), ("embed", "vocab"), D**-0.5, "lm_head")
    return complete_p.transfer(spec, params)


def layer_params(spec: ModelSpec) -> dict[str, ParamSpec]:
    """Return the parameters of one layer."""
    # every layer writes twice into the residual: the sum of 2L writes keeps its size (GPT-2)
    n_layers = spec.n_layers
    if spec.base_shape and spec.norm_placement != "pre":
        n_layers = spec.base_shape.n_layers  # CompleteP scales the norms that write there instead
    residual_scale = (2 * max(n_layers, 1)) ** -0.5
    params = {
        "attn_norm": residual_norm_scale(spec, "input_layernorm"),
        **attention.attention_params(spec, residual_scale),
        "mlp_norm": residual_norm_scale(spec, "post_attention_layernorm"),
        **feed_forward(spec).params(spec, residual_scale),
    }
    if spec.lora:
        params |= lora.adapter_params(spec.lora, params)
    if spec.norm_placement == "pre":
        return params
    # the norm after a part is what writes into the residual
    for name, param in params.items():
        params[name] = dataclasses.replace(param, writes_residual=False)
    if spec.norm_placement == "post":
        del params["attn_norm"], params["mlp_norm"]
    for name, hf_name in POST_NORMS.items():
        param = residual_norm_scale(spec, hf_name)
        params[name] = dataclasses.replace(param, writes_residual=True)
    return params


def list_low_matmuls(spec: ModelSpec, n_tokens: int) -> dict[str, ParamSpec]:
    """Return a layer's matrices that train.matmul_dtype multiplies with so many tokens."""

    def is_low(param: ParamSpec) -> bool:
        n_in = math.prod(param.shape[: param.n_in])
        return lora.is_large(param) and fits_low_matmul(n_tokens, n_in, param.size // n_in)

    return {name: param for name, param in layer_params(spec).items() if is_low(param)}


def trained_param_specs(spec: ModelSpec) -> ParamSpecs:
    """Return the description of what a run trains: every parameter, or the adapters alone."""
    specs = param_specs(spec)
    if spec.lora is None:
        return specs
    blocks = {name: param for name, param in specs["blocks"].items() if param.is_adapter}
    return {"blocks": blocks}


def residual_norm_scale(spec: ModelSpec, hf_name: str) -> ParamSpec:
    """Return the scale of a norm over the model's width."""
    return norm_scale((spec.d_model,), hf_name, adds_one=spec.norm_adds_one)


def feed_forward(spec: ModelSpec) -> Any:
    """Return the module of a layer's feed-forward part; model/mlp.py shows its two functions."""
    return importlib.import_module(f"jaxpt.model.{spec.feed_forward}")


# ---- forward


class Kernels(NamedTuple):
    """What runs a layer's attention, experts and matmuls with weights.

    Attributes:
        attention: as kernels.select.choose_backend returned.
        experts: as kernels.select_experts.choose_experts_kernel returned.
        matmul_dtype: of the large ones outside of experts, a key of kernels.low_matmul.MATMULS.
    """

    attention: str = "xla"
    experts: str = "scan"
    matmul_dtype: str = "compute"


def forward(
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    segment_ids: Array,
    positions: Array,
    dtype: Any = jnp.float32,
    remat: str = "none",
    unroll: int = 1,
    kernels: Kernels = Kernels(),
) -> tuple[Array, SideOutputs]:
    """Run tokens through the model.

    Args:
        spec: the architecture.
        params: the parameters.
        tokens: int32 [B, T], as segment_ids and positions; see spec.Batch.
        segment_ids: a token attends only to its own segment.
        positions: within the document.
        dtype: of activations.
        remat: activation checkpointing policy, a key of CHECKPOINT_POLICIES.
        unroll: layers per iteration of the scan.
        kernels: what runs its parts.

    Returns:
        Hidden states after the final norm, [B, T, D] in dtype, and what the layers give beside it
        (nothing in a dense model).
    """

    def attend_within(q: Array, k: Array, v: Array, window: int | None, state: Any) -> Any:
        heads = attend(q, k, v, segment_ids, window, kernels.attention, spec.attention_softcap)
        return heads, state

    is_token = segment_ids > 0
    return forward_with(
        attend_within,
        spec,
        params,
        tokens,
        positions,
        dtype,
        remat,
        unroll,
        is_token,
        kernels,
    )


def forward_with(
    attend: Attend,
    spec: ModelSpec,
    params: Params,
    tokens: Array,
    positions: Array,
    dtype: Any = jnp.float32,
    remat: str = "none",
    unroll: int = 1,
    is_token: Array | None = None,
    kernels: Kernels = Kernels(),
) -> tuple[Array, SideOutputs]:
    """Run tokens through the model like `forward`, with the caller's attention.

    Side outputs are over the positions of is_token, bool [B, T]; None: there are none.
    """

    def keep_side_outputs(before: Array, after: Array, inner: Intermediates, state: Any) -> Any:
        if inner.routing is None or is_token is None:
            return state, SideOutputs()
        return state, feed_forward(spec).measure_balance(spec, inner.routing, is_token)

    x = embed_tokens(spec, params, tokens, dtype)
    ropes = compute_ropes(spec, positions)
    blocks = params["blocks"]
    x, _, stacked = run_layers(
        spec,
        blocks,
        x,
        ropes,
        attend,
        observe=keep_side_outputs,
        remat=remat,
        unroll=unroll,
        kernels=kernels,
    )
    losses = jax.tree.map(jnp.sum, stacked.losses)
    scalars = jax.tree.map(jnp.mean, stacked.scalars)
    return final_norm(spec, params, x), SideOutputs(losses, scalars, stacked.loads)


def merge_adapters(spec: ModelSpec, params: Params) -> tuple[ModelSpec, Params]:
    """Return a model without adapters that computes the same. The parameters are donated."""
    if spec.lora is None:
        return spec, params
    blocks = lora.merge_adapters(spec, params["blocks"])
    return spec.replace(lora=None), {**params, "blocks": blocks}


def compute_logits(
    spec: ModelSpec, params: Params, tokens: Array, segment_ids: Array, positions: Array
) -> Array:
    """Return float32 logits of every position at once, [B, T, V]. For few tokens."""
    hidden, _ = forward(spec, params, tokens, segment_ids, positions)
    return apply_softcap(hidden @ lm_head(spec, params), spec.logit_softcap)


def embed_tokens(spec: ModelSpec, params: Params, tokens: Array, dtype: Any) -> Array:
    """Return the residual stream before the first layer, [B, T, D] in dtype."""
    # gathered along its width first: a lookup in an embedding sharded both ways makes XLA
    # replicate the result
    table = params["embed"].astype(dtype)
    table = with_logical_constraint(table, "vocab", None)
    x = table[tokens]
    if spec.embed_multiplier != 1:
        x = x * spec.embed_multiplier
    return constrain_residual(x)


def final_norm(spec: ModelSpec, params: Params, x: Array) -> Array:
    """Return the residual stream normed for the output head, and divided by logit_divisor."""
    scale = params["norm"]
    return rms_norm(x, scale, spec.norm_eps, spec.norm_adds_one, spec.logit_divisor)


def lm_head(spec: ModelSpec, params: Params, dtype: Any = jnp.float32) -> Array:
    """Return the output head [D, V]."""
    head = params["embed"].T if spec.tie_embeddings else params["unembed"]
    return head.astype(dtype)


class Intermediates(NamedTuple):
    """What a layer computes on its way. Under jit, what is not read is not kept.

    Attributes:
        attention_input: [B, T, D], normed if there is a norm before it.
        heads: [B, T, N, H], before `o`.
        mlp_input: [B, T, D], normed if there is a norm before it.
        activations: [B, T, F], before `down`.
        routing: of the feed-forward part.
    """

    attention_input: Array
    heads: Array
    mlp_input: Array
    activations: Array
    routing: Any


# (q, k, v, window, state) -> (heads [B, T, N, H], state)
Attend = Callable[[Array, Array, Array, int | None, Any], tuple[Array, Any]]
# (residual before the layer, after it, intermediates, state) -> (state, what to stack over layers)
Observe = Callable[[Array, Array, Intermediates, Any], tuple[Any, Any]]


def observe_nothing(before: Array, after: Array, inner: Intermediates, state: Any) -> Any:
    """Leave the state, stack nothing."""
    return state, None


def run_layers(
    spec: ModelSpec,
    blocks: Params | tuple[Params, ...],
    x: Array,
    ropes: dict[str, Rope],
    attend: Attend,
    state: Any = (),
    *,
    observe: Observe = observe_nothing,
    remat: str = "none",
    unroll: int = 1,
    kernels: Kernels = Kernels(),
) -> tuple[Array, Any, Any]:
    """Run all layers: the one pass of training, decoding and measuring.

    Args:
        spec: the architecture.
        blocks: parameters stacked over layers, or a tuple of each layer's own.
        x: residual stream [B, T, D].
        ropes: of the tokens' positions, as compute_ropes returned.
        attend: attention of the queries to the keys; reads and returns the state.
        state: carried from layer to layer: a cache, a counter, running sums.
        observe: called after each layer.
        remat: activation checkpointing policy.
        unroll: layers per iteration of the scan.
        kernels: of experts and matmuls; `attend` has its own.

    Returns:
        The residual stream, the state, and what `observe` stacked, [L, ...].
    """
    kinds = spec.layer_kinds or (LayerKind(),)
    distinct = list(dict.fromkeys(kinds))
    kind_ids = [distinct.index(kind) for kind in kinds][: spec.n_layers]
    run_any = functools.partial(run_layer, spec, attend, kernels)
    branches = [functools.partial(run_any, kind) for kind in distinct]

    def layer(carry: tuple[Array, Any], numbered: tuple[Any, Params]) -> tuple[Any, Any]:
        before, state = carry
        kind_id, params = numbered
        if len(branches) == 1:
            after, inner, state = branches[0](params, before, ropes, state)
        else:
            after, inner, state = jax.lax.switch(kind_id, branches, params, before, ropes, state)
        after = constrain_residual(after)
        state, observed = observe(before, after, inner, state)
        return (after, state), observed

    if isinstance(blocks, tuple):
        for numbered in zip(kind_ids, blocks, strict=True):
            (x, state), _ = layer((x, state), numbered)
        return x, state, None
    if remat != "none":
        # within a scan nothing merges the recomputation with the first computation, so no barrier
        # against that is needed
        policy = CHECKPOINT_POLICIES[remat]
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=unroll > 1)
    numbered = jnp.array(kind_ids, jnp.int32), blocks
    (x, state), observed = jax.lax.scan(layer, (x, state), numbered, unroll=unroll)
    return x, state, observed


def run_layer(
    spec: ModelSpec,
    attend: Attend,
    kernels: Kernels,
    kind: LayerKind,
    params: Params,
    x: Array,
    ropes: dict[str, Rope],
    state: Any,
) -> tuple[Array, Intermediates, Any]:
    """Run one layer: attention and MLP, each between its norms and with a residual connection."""

    def norm(name: str, x: Array) -> Array:
        if name not in params:
            return x
        return rms_norm(x, params[name], spec.norm_eps, spec.norm_adds_one)

    def add(x: Array, out: Array) -> Array:
        if spec.residual_multiplier != 1:
            out = out * spec.residual_multiplier
        return x + out

    attention_input = norm("attn_norm", x)
    rope = ropes[kind.rope] if kind.rope else None
    dtype = kernels.matmul_dtype
    q, k, v = attention.project_qkv(spec, params, attention_input, rope, dtype)
    heads, state = attend(q, k, v, kind.window, state)
    x = add(x, norm("attn_post_norm", attention.project_out(spec, params, heads, dtype)))
    mlp_input = norm("mlp_norm", x)
    found = feed_forward(spec).apply(spec, params, mlp_input, kernels.experts, dtype)
    x = add(x, norm("mlp_post_norm", found.out))
    inner = Intermediates(attention_input, heads, mlp_input, found.activations, found.routing)
    return x, inner, state


def constrain_residual(x: Array) -> Array:
    """Shard the residual stream [B, T, D] over batch and positions; one position stays whole."""
    position = "position" if x.shape[1] > 1 else None
    return with_logical_constraint(x, "batch", position, "act_embed")


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


# ---- parameters, derived from their descriptions


def count_params(spec: ModelSpec) -> int:
    """Return the number of parameters."""
    return sum(param.n_params for _, param in list_param_specs(param_specs(spec)))


def count_active_params(spec: ModelSpec) -> int:
    """Return the number of parameters that one token uses: all but those of experts not chosen."""
    return sum(param.n_active for _, param in list_param_specs(param_specs(spec)))


def describe_params(spec: ModelSpec) -> str:
    """Return the number of parameters as text, with that of active ones where it is another."""
    n_params = count_params(spec)
    n_active = count_active_params(spec)
    text = f"{n_params:,} parameters"
    return text if n_active == n_params else f"{text} ({n_active:,} active per token)"


def count_trained_params(spec: ModelSpec) -> int:
    """Return the number of parameters that a run trains."""
    return sum(param.n_params for _, param in list_param_specs(trained_param_specs(spec)))


def make_param_shardings(spec: ModelSpec, mesh: Mesh) -> dict[str, Any]:
    """Return a NamedSharding for every parameter. Raise UserError if the mesh does not divide."""
    check_model_divides(mesh, spec)

    def make(path: tuple[str, ...], param: ParamSpec) -> NamedSharding:
        return make_logical_sharding(mesh, param.axes)

    return map_param_specs(make, param_specs(spec))


def make_abstract_params(spec: ModelSpec, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """Return parameters as ShapeDtypeStructs with shardings. Raises as `make_param_shardings`."""
    check_model_divides(mesh, spec)

    def make(path: tuple[str, ...], param: ParamSpec) -> jax.ShapeDtypeStruct:
        place = make_logical_sharding(mesh, param.axes)
        return jax.ShapeDtypeStruct(param.shape, param.stored_dtype(dtype), sharding=place)

    return map_param_specs(make, param_specs(spec))


def init_params(spec: ModelSpec, seed: int, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """Return random parameters, initialized sharded; the values are equal on every mesh."""

    def draw(path: tuple[str, ...], param: ParamSpec) -> Array:
        return param.init.draw(param_key(seed, path), param.shape, dtype)

    def make() -> Params:
        return map_param_specs(draw, param_specs(spec))

    return jit_once(make, make_param_shardings(spec, mesh))()


def add_adapters(
    spec: ModelSpec, params: Params, adapters: LoraSpec, seed: int, mesh: Mesh
) -> tuple[ModelSpec, Params]:
    """Return the model with adapters that change nothing yet."""
    adapted = spec.replace(lora=adapters)
    specs = trained_param_specs(adapted)

    def draw(path: tuple[str, ...], param: ParamSpec) -> Array:
        return param.init.draw(param_key(seed, path), param.shape)

    shardings = subtree_like(specs, make_param_shardings(adapted, mesh))
    drawn = jit_once(lambda: map_param_specs(draw, specs), shardings)()
    return adapted, replace_subtree(params, drawn)
