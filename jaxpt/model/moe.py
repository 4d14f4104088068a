"""The mixture of experts, a layer's feed-forward part: a router sends each token to k of E MLPs.

No token is dropped. kernels/mixture.py runs the experts; this file describes their parameters,
chooses them and measures how evenly.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import entr

from jaxpt.model import mlp
from jaxpt.model.kernels.mixture import Activation, Experts, run_experts
from jaxpt.model.mlp import ACTIVATIONS, FeedForward, LayerParams, SideOutputs
from jaxpt.model.param import ZEROS, ParamSpec, matrix
from jaxpt.spec import ModelSpec


def params(spec: ModelSpec, residual_scale: float) -> dict[str, ParamSpec]:
    """Return the parameters of one layer's router and experts.

    Args:
        spec: the architecture.
        residual_scale: of the initial std of what writes into the residual.
    """
    D, F, E = spec.d_model, spec.d_ff, spec.n_experts
    std = D**-0.5
    down_std = F**-0.5 * residual_scale
    expert = functools.partial(matrix, active_frac=spec.n_experts_per_token / E)
    reads, writes = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    name = "mlp.experts.{}."
    found = {
        "router": matrix((D, E), ("embed", "scores"), std, "mlp.gate"),
        "gate": expert((E, D, F), reads, std, name + "gate_proj"),
        "up": expert((E, D, F), reads, std, name + "up_proj"),
        "down": expert((E, F, D), writes, down_std, name + "down_proj", writes_residual=True),
    }
    if spec.has_router_bias:
        # no gradient reaches it: the step moves it by the experts' loads
        name = "mlp.gate.e_score_correction_bias"
        found["router_bias"] = ParamSpec((E,), ("scores",), ZEROS, name, is_state=True)
    if spec.d_shared:
        found |= shared_params(spec, residual_scale)
    return found


def shared_params(spec: ModelSpec, residual_scale: float) -> dict[str, ParamSpec]:
    """Return the parameters of the MLP that every token takes beside its experts."""
    D, F = spec.d_model, spec.d_shared
    std = D**-0.5
    down_std = F**-0.5 * residual_scale
    reads, writes = ("embed", "shared_mlp"), ("shared_mlp", "embed")
    name = "mlp.shared_expert."
    found = {
        "shared_gate": matrix((D, F), reads, std, name + "gate_proj"),
        "shared_up": matrix((D, F), reads, std, name + "up_proj"),
        "shared_down": matrix((F, D), writes, down_std, name + "down_proj", writes_residual=True),
    }
    if spec.has_shared_switch:
        found["shared_switch"] = matrix((D, 1), ("embed", "switch"), std, "mlp.shared_expert_gate")
    return found


def apply(
    spec: ModelSpec,
    params: LayerParams,
    x: Array,
    experts_kernel: str = "scan",
    matmul_dtype: str = "compute",
) -> FeedForward:
    """Return what the chosen experts, and the shared one, add to the residual."""
    routing = route(spec, params, x)
    experts = Experts(*(params[name].astype(x.dtype) for name in Experts._fields))
    activate = ACTIVATIONS[spec.activation]
    out = run_experts(activate, experts_kernel, x, routing.experts, routing.weights, experts)
    if spec.d_shared:
        out = out + run_shared_expert(spec, params, x, matmul_dtype)
    activations = mix_activations(activate, jax.lax.stop_gradient((x, routing, experts)))
    return FeedForward(out, activations, routing)


def run_shared_expert(
    spec: ModelSpec, params: LayerParams, x: Array, matmul_dtype: str = "compute"
) -> Array:
    """Return what the shared expert adds, times a share of 0 to 1 where there is a switch."""
    shared = {name: params[f"shared_{name}"] for name in Experts._fields}
    out = mlp.apply(spec, shared, x, matmul_dtype=matmul_dtype).out
    if not spec.has_shared_switch:
        return out
    switch = params["shared_switch"].astype(x.dtype)
    return jax.nn.sigmoid(x @ switch) * out


# ---- the router


class Routing(NamedTuple):
    """Where the tokens go.

    Attributes:
        logits: float32 [B, T, E].
        probs: the experts' scores as shares that sum to 1.
        experts: int32 [B, T, k], the chosen ones.
        weights: float32 [B, T, k], of their outputs.
    """

    logits: Array
    probs: Array
    experts: Array
    weights: Array


def route(spec: ModelSpec, params: LayerParams, x: Array) -> Routing:
    """Choose each token's experts, in float32 whatever the compute dtype.

    A router's bias counts in the choice, not in the weights (2408.15664).
    """
    x, router = x.astype(jnp.float32), params["router"].astype(jnp.float32)
    logits = jnp.einsum("btd,de->bte", x, router, precision="highest")
    if spec.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    else:
        scores = probs = jax.nn.softmax(logits)
    biased = scores
    if spec.has_router_bias:
        biased = scores + params["router_bias"].astype(jnp.float32)
    experts = choose_experts(biased, spec.n_experts_per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if spec.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routing(logits, probs, experts, spec.routed_scale * weights)


def choose_experts(scores: Array, k: int) -> Array:
    """Return the k experts of the highest scores, int32 [B, T, k]."""
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(scores), k)
    return experts


# ---- balance


def measure_balance(spec: ModelSpec, routing: Routing, is_token: Array) -> SideOutputs:
    """Return a layer's weighted auxiliary losses, scalars to report, and loads.

    The balance loss is transformers': E times the sum over experts of load and mean probability,
    k at perfect balance. It is a layer's own, over the tokens of all devices (2501.11873), and the
    layers' mean. The z-loss (2202.08906) keeps logits small.

    Args:
        spec: the architecture.
        routing: of the layer.
        is_token: bool [B, T], False where there is padding.
    """
    E = spec.n_experts
    weight = is_token.astype(jnp.float32)
    n_tokens = jnp.maximum(jnp.sum(weight), 1)

    def mean(values: Array) -> Array:
        """Return the mean of [B, T, ...] over tokens."""
        return jnp.tensordot(weight, values, axes=2) / n_tokens

    is_chosen = jnp.sum(jax.nn.one_hot(routing.experts, E), axis=2)
    load = mean(is_chosen)  # sums to k
    balance = E * jnp.sum(load * mean(routing.probs))
    log_z = jax.nn.logsumexp(routing.logits, axis=-1)
    entropy = jnp.sum(entr(routing.probs), axis=-1)
    losses = {
        "balance": spec.router_aux_loss_coef / spec.n_layers * balance,
        "router_z": spec.router_z_loss_coef / spec.n_layers * mean(log_z**2),
    }
    scalars = {
        "balance_loss": balance,  # before its coefficient
        "router_entropy": mean(jax.lax.stop_gradient(entropy)),  # nats
    }
    return SideOutputs(losses, scalars, n_tokens * load)


def measure_routers(blocks: LayerParams, loads: Array) -> dict[str, Array]:
    """Return scalars to report of all layers' routers.

    Args:
        blocks: the parameters of all layers.
        loads: float32 [L, E], tokens of each expert.
    """
    _, E = loads.shape
    total = jnp.maximum(jnp.sum(loads, axis=1), 1)
    fullest = E * jnp.max(loads, axis=1) / total
    scalars = {
        "load_imbalance": jnp.mean(fullest),  # of the fullest expert, in mean loads
        "dead_experts": jnp.mean(loads == 0),  # share of them
    }
    if "router_bias" in blocks:
        norm = jnp.linalg.norm(blocks["router_bias"], axis=1)
        scalars["router_bias_norm"] = jnp.mean(norm)
    return scalars


def move_router_bias(spec: ModelSpec, bias: Array, loads: Array) -> Array:
    """Return the bias [L, E] after a step: higher where the load [L, E] is below the mean.

    Source: 2408.15664, algorithm 1.
    """
    mean = jnp.mean(loads, axis=1, keepdims=True)
    return bias + spec.router_bias_rate * jnp.sign(mean - loads).astype(bias.dtype)


# ---- measuring


def mix_activations(activate: Activation, inputs: tuple[Array, Routing, Experts]) -> Array:
    """Return the weighted sum [B, T, F] of the chosen experts' activations.

    It runs all experts, where it is read.
    """
    x, routing, experts = inputs
    E, _, F = experts.gate.shape

    def add(total: Array, numbered: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, gate, up = numbered
        is_chosen = routing.experts == number
        weight = jnp.sum(routing.weights * is_chosen, axis=-1, keepdims=True)
        activations = activate(x @ gate) * (x @ up)
        return total + weight.astype(x.dtype) * activations, None

    zeros = jnp.zeros((*x.shape[:2], F), x.dtype)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(E), experts.gate, experts.up))
    return total
