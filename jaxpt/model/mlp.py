"""The gated MLP (SwiGLU or GeGLU), a layer's feed-forward part.

Another feed-forward part is a module of the same two functions, `params` and `apply`, named by
ModelSpec.feed_forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import Array

from jaxpt.model.lora import linear
from jaxpt.model.param import ParamSpec, bias, matrix
from jaxpt.spec import ModelSpec

LayerParams = dict[str, Array]  # of one layer
# by the names of Hugging Face; jax.nn.gelu is the tanh form
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": jax.nn.gelu}


class FeedForward(NamedTuple):
    """What a feed-forward part returns.

    Attributes:
        out: [B, T, D], added to the residual.
        activations: [B, T, F], before the projection down.
        routing: what its `measure_balance` reads; None in a dense model.
    """

    out: Array
    activations: Array
    routing: Any = None


class SideOutputs(NamedTuple):
    """What the feed-forward parts give beside their output, of one layer or of all.

    Attributes:
        losses: auxiliary losses by name, nats per token, weighted; summed over layers.
        scalars: to report, by name, means over tokens and layers.
        loads: float32 [E] or [L, E], tokens of each expert.
    """

    losses: dict[str, Array] = {}
    scalars: dict[str, Array] = {}
    loads: Array | None = None


def params(spec: ModelSpec, residual_scale: float) -> dict[str, ParamSpec]:
    """Return the parameters of one layer's MLP.

    Args:
        spec: the architecture.
        residual_scale: of the initial std of what writes into the residual.
    """
    D, F = spec.d_model, spec.d_ff
    std = D**-0.5
    down_std = F**-0.5 * residual_scale
    found = {
        "gate": matrix((D, F), ("embed", "mlp"), std, "mlp.gate_proj"),
        "up": matrix((D, F), ("embed", "mlp"), std, "mlp.up_proj"),
        "down": matrix((F, D), ("mlp", "embed"), down_std, "mlp.down_proj", writes_residual=True),
    }
    if spec.mlp_bias:
        found["gate_bias"] = bias((F,), ("mlp",), "mlp.gate_proj")
        found["up_bias"] = bias((F,), ("mlp",), "mlp.up_proj")
        found["down_bias"] = bias((D,), ("norm",), "mlp.down_proj", writes_residual=True)
    return found


def apply(
    spec: ModelSpec,
    params: LayerParams,
    x: Array,
    experts_kernel: str = "scan",
    matmul_dtype: str = "compute",
) -> FeedForward:
    """Return what the MLP adds to the residual; it has no experts for a kernel to run."""
    gate = linear(spec.lora, "btd,df->btf", x, params, "gate", matmul_dtype)
    up = linear(spec.lora, "btd,df->btf", x, params, "up", matmul_dtype)
    activations = ACTIVATIONS[spec.activation](gate) * up
    out = linear(spec.lora, "btf,fd->btd", activations, params, "down", matmul_dtype)
    return FeedForward(out, activations)
