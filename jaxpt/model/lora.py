"""Low-rank adapters (LoRA, 2106.09685): W becomes W + alpha / rank x A B; only A and B train.

An adapter's two parameters, NAME_lora_a and NAME_lora_b, are derived from the ParamSpec of the
matrix that they adapt. Axis letters as in jaxpt/spec.py; R is the rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.model.kernels import cpu_matmul
from jaxpt.model.kernels.low_matmul import choose_matmul
from jaxpt.model.param import ZEROS, ParamSpec, normal
from jaxpt.spec import LoraSpec, ModelSpec, UserError

LayerParams = dict[str, Array]  # of one layer
# the matrices over these axes are applied by `linear`: those of attention and of the dense MLP
ADAPTED_AXES = {"embed", "heads", "kv_heads", "head", "mlp"}


def can_adapt(param: ParamSpec) -> bool:
    """Return whether a layer's parameter can have an adapter."""
    axes = {axis for axis in param.axes if axis != "layers"}
    return param.n_in > 0 and axes <= ADAPTED_AXES


def is_large(param: ParamSpec) -> bool:
    """Return whether a layer's parameter is a matrix that `linear` applies."""
    axes = {axis for axis in param.axes if axis != "layers"}
    return param.n_in > 0 and axes <= ADAPTED_AXES | {"shared_mlp"}


def adapter_params(lora: LoraSpec, params: dict[str, ParamSpec]) -> dict[str, ParamSpec]:
    """Return the adapters of a layer, given its parameters.

    Raises:
        UserError: a target is no matrix that can have one.
    """
    known = list_targets(params)
    adapters = {}
    for target in lora.targets:
        if target not in known:
            raise UserError(
                f"lora.targets: expected matrices of this model that take adapters "
                f"({', '.join(known)}), got {target!r}. Leave it out."
            )
        a_name, b_name = adapter_names(target)
        adapters[a_name], adapters[b_name] = factor(params[target], lora.rank)
    return adapters


def list_targets(params: dict[str, ParamSpec]) -> list[str]:
    """Return the names of a layer's matrices that can have adapters, given its parameters."""
    return [name for name, param in params.items() if can_adapt(param) and not param.is_adapter]


def adapter_names(target: str) -> tuple[str, str]:
    """Return the names of a matrix's two adapter parameters."""
    return f"{target}_lora_a", f"{target}_lora_b"


def factor(param: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """Return A [...in, R] and B [R, ...out] of a matrix [...in, ...out]: A B is 0 at first.

    Source: PEFT's LoraLayer.reset_lora_parameters, whose A is uniform with this variance.
    """
    n_in = param.n_in
    in_shape, out_shape = param.shape[:n_in], param.shape[n_in:]
    in_axes, out_axes = param.axes[:n_in], param.axes[n_in:]
    module = param.hf_name.removesuffix(".weight")
    a = dataclasses.replace(
        param,
        shape=(*in_shape, rank),
        axes=(*in_axes, "rank"),
        init=normal((3 * math.prod(in_shape)) ** -0.5),
        hf_name=f"{module}.lora_A.weight",
        writes_residual=False,
        is_adapter=True,
    )
    b = dataclasses.replace(
        param,
        shape=(rank, *out_shape),
        axes=("rank", *out_axes),
        init=ZEROS,
        hf_name=f"{module}.lora_B.weight",
        n_in=1,
        is_adapter=True,
    )
    return a, b


def linear(
    lora: LoraSpec | None,
    letters: str,
    x: Array,
    params: LayerParams,
    name: str,
    matmul_dtype: str = "compute",
) -> Array:
    """Return x [B, T, ...in] times a layer's matrix, with its bias and its adapter if it has them.

    Args:
        lora: the model's adapters.
        letters: the einsum with the matrix, "btd,dnh->btnh".
        x: activations.
        params: of the layer.
        name: of the matrix.
        matmul_dtype: of the product with the matrix, not of its adapter's.
    """
    multiply = choose_matmul(matmul_dtype, x, params[name])
    y = cpu_matmul.linear(letters, x, params[name], params.get(f"{name}_bias"), multiply)
    if lora is None or name not in lora.targets:
        return y
    x_letters, weight, y_letters = re.split(",|->", letters)
    n_in = x.ndim - 2
    ins, outs = weight[:n_in], weight[n_in:]
    a, b = adapter_names(name)
    low = cpu_matmul.linear(f"{x_letters},{ins}r->btr", x, params[a])
    return y + cpu_matmul.linear(f"btr,r{outs}->{y_letters}", low * lora.scale, params[b])


def merge_adapters(spec: ModelSpec, params: dict[str, Array]) -> dict[str, Array]:
    """Return stacked layer parameters with the adapters added to their matrices, in float32.

    The matrices that are adapted are donated: the parameters given are not to be used again.
    """
    assert spec.lora
    merged = dict(params)
    for target in spec.lora.targets:
        a, b = (merged.pop(name) for name in adapter_names(target))
        merged[target] = merge_matrix(merged[target], a, b, spec.lora.scale)
    return merged


@functools.partial(jax.jit, donate_argnums=0)
def merge_matrix(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """Return weight [L, ...in, ...out] + scale x a [L, ...in, R] b [L, R, ...out], by layers."""

    def merge_layer(layer: tuple[Array, Array, Array]) -> Array:
        weight, a, b = layer
        product = jnp.tensordot(a, b, axes=1, precision="highest")
        return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

    return jax.lax.map(merge_layer, (weight, a, b))
