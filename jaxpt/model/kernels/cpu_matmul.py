"""The matmul of activations with a weight, laid out for the CPU; accelerators do not mind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.sharding import is_on_cpu


def linear(
    letters: str,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    multiply: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], plus bias, in x's dtype.

    Args:
        letters: the einsum that this is, "btd,dnh->btnh"; checked while tracing.
        x: activations.
        weight: cast to x's dtype.
        bias: [...out], added if there is one.
        multiply: a form of `matmul`; None: that itself.
    """
    check_letters(letters, x.ndim, weight.ndim)
    y = (multiply or matmul)(x, weight.astype(x.dtype))
    if bias is None:
        return y
    return y + bias.astype(x.dtype)


def check_letters(letters: str, x_ndim: int, weight_ndim: int) -> None:
    """Raise ValueError unless the letters describe `matmul` of arrays with these dimensions."""
    x, weight, y = re.split(",|->", letters)
    n_in = x_ndim - 2
    is_matmul = x[2:] == weight[:n_in] and y == x[:2] + weight[n_in:]
    if not is_matmul or (len(x), len(weight)) != (x_ndim, weight_ndim):
        raise ValueError(f"linear: {letters} is no matmul of {x_ndim} with {weight_ndim} axes")


@jax.custom_vjp
def matmul(x: Array, weight: Array) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], with a backward of its own.

    A matmul that sums over tokens is fast on a CPU with tokens last on its left side and first on
    its right, so one side is transposed. JAX's gradient transposes the output's, the wider side for
    most weights; this one transposes the narrower side, the residual's, once for all that read it.
    Whole steps are 1.08 to 1.2 x as fast (docs/performance.md).
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
        d_weight = keep_form(jnp.einsum("ibt,bto->io", x_first, d_y_flat))
    else:
        d_y_first = jnp.moveaxis(d_y_flat, 2, 0)
        d_weight = keep_form(jnp.einsum("obt,bti->oi", d_y_first, x_flat)).T
    matrix = weight.reshape(d_weight.shape)
    d_x = jnp.einsum("bto,io->bti", d_y_flat, matrix)
    return d_x.reshape(x.shape), d_weight.reshape(weight.shape)


matmul.defvjp(matmul_fwd, matmul_bwd)


def keep_form(d_weight: Array) -> Array:
    """Return a weight's gradient such that XLA on a CPU does not swap its matmul's sides.

    It would, to save a transposition of this small result; the left side then has tokens first, and
    the matmul runs at half the speed.
    """
    return jax.lax.optimization_barrier(d_weight) if is_on_cpu() else d_weight


def flatten_features(x: Array) -> Array:
    """Return [B, T, ...] as [B, T, features]."""
    return x.reshape(*x.shape[:2], -1)
