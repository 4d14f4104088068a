"""Large matmuls in float8 or int8, scaled as they come; train.matmul_dtype names which.

qwix has such matmuls, but quantizes Flax modules by interception and keeps its differentiable
product private (qwix/_src/core/dot_general_qt.py); parameters here are plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt import hardware
from jaxpt.hardware import Chip
from jaxpt.model.kernels.cpu_matmul import flatten_features, matmul, matmul_bwd
from jaxpt.spec import UserError

# cuBLASLt's float8 needs dimensions that are multiples of it; XLA would pad others
DIMENSION_MULTIPLE = 16
MAX_INT8 = 127


class Float8(NamedTuple):
    """A float8 dtype, and the exponent to which the largest entry is scaled."""

    dtype: Any
    exponent: int


# the largest entry becomes less than 2^8 of at most 448, or less than 2^15 of at most 57,344
E4M3 = Float8(jnp.float8_e4m3fn, 8)  # of activations and weights: a finer grid
E5M2 = Float8(jnp.float8_e5m2, 15)  # of gradients: a wider range


def choose_matmul(dtype: str, x: Array, weight: Array) -> Callable[[Array, Array], Array]:
    """Return the matmul of x [B, T, ...in] with weight [...in, ...out] in a dtype of MATMULS.

    It is that of the compute dtype where a dimension of a product is no multiple of 16.
    """
    B, T, *in_dims = x.shape
    n_in = math.prod(in_dims)
    fits = fits_low_matmul(B * T, n_in, weight.size // n_in)
    return MATMULS[dtype if fits else "compute"]


def fits_low_matmul(*dims: int) -> bool:
    """Return whether matmuls of these dimensions are done in another dtype."""
    return all(n % DIMENSION_MULTIPLE == 0 for n in dims)


# ---- float8


@jax.custom_vjp
def float8_matmul(x: Array, weight: Array) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], forward and backward in float8.

    Each tensor has one scale, of its largest entry now. It is a power of two, so scaling rounds
    nothing, and micro-batches or documents that differ in it give the same numbers.

    Source: FP8 formats (2209.05433) and torchao's float8 with tensorwise dynamic scaling.
    """
    y, _ = float8_fwd(x, weight)
    return y


def float8_fwd(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return the result, and what backward needs: no more than in the compute dtype."""
    x_flat, matrix = flatten(x, weight)
    y = multiply_float8(E4M3, x_flat, E4M3, matrix, ((2,), (0,)))
    return y.reshape(*x.shape[:2], *weight.shape[x.ndim - 2 :]), (x, weight)


def float8_bwd(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    """Return the gradients for x and weight.

    In the highest precision cuBLASLt adds up in float32; else in 14 bits, as forward does (flax's
    fp8_ops; DeepSeek-V3, 2412.19437, section 3.3.2).
    """
    x_flat, matrix = flatten(*residuals)
    d_y = flatten_features(d_y)
    d_x = multiply_float8(E5M2, d_y, E4M3, matrix, ((2,), (1,)), "highest")
    d_weight = multiply_float8(E4M3, x_flat, E5M2, d_y, ((0, 1), (0, 1)), "highest")
    x, weight = residuals
    return d_x.reshape(x.shape), d_weight.reshape(weight.shape)


float8_matmul.defvjp(float8_fwd, float8_bwd)


def multiply_float8(
    left_type: Float8,
    left: Array,
    right_type: Float8,
    right: Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    precision: str = "default",
) -> Array:
    """Return a product of float8 roundings in left's dtype, summed over the axes contracted.

    The scales come after the product, so that its operands are float8 arrays whatever XLA makes of
    what surrounds it, and float8 is what devices exchange.
    """
    left_rounded, left_scale = round_to_float8(left, left_type)
    right_rounded, right_scale = round_to_float8(right, right_type)
    y = jax.lax.dot_general(
        left_rounded,
        right_rounded,
        (contracted, ((), ())),
        precision=precision,
        preferred_element_type=left.dtype,
    )
    return y / left_scale / right_scale


def round_to_float8(x: Array, float8: Float8) -> tuple[Array, Array]:
    """Return x in float8 and its scale: what x was multiplied by, a power of two in x's dtype."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x)).astype(jnp.float32))
    shift = jnp.clip(float8.exponent - exponent, -126, 126)  # float32's normal numbers
    scale = jnp.ldexp(jnp.float32(1), shift).astype(x.dtype)
    return (x * scale).astype(float8.dtype), scale


def flatten(x: Array, weight: Array) -> tuple[Array, Array]:
    """Return x as [B, T, in] and weight as [in, out]."""
    x_flat = flatten_features(x)
    return x_flat, weight.reshape(x_flat.shape[2], -1)


# ---- int8


@jax.custom_vjp
def int8_matmul(x: Array, weight: Array) -> Array:
    """Return x [B, T, ...in] times weight [...in, ...out], forward in int8.

    Each token and each output channel has a scale of its own. Rounding counts as the identity in
    backward, whose products are in the compute dtype: gradients have a wider range than int8 (so
    does MaxText's int8 for weights).
    """
    y, _ = int8_fwd(x, weight)
    return y


def int8_fwd(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return the result, and what backward needs."""
    x_flat, matrix = flatten(x, weight)
    x_rounded, x_scale = round_to_int8(x_flat, axis=2)
    rounded, scale = round_to_int8(matrix, axis=0)
    contracted = ((2,), (0,))
    total = jax.lax.dot_general(
        x_rounded, rounded, (contracted, ((), ())), preferred_element_type=jnp.int32
    )
    y = total.astype(jnp.float32) * x_scale * scale
    y = y.astype(x.dtype)
    return y.reshape(*x.shape[:2], *weight.shape[x.ndim - 2 :]), (x, weight)


def round_to_int8(x: Array, axis: int) -> tuple[Array, Array]:
    """Return x in int8, and its float32 scales: what those are to be multiplied by."""
    x = x.astype(jnp.float32)
    # where all entries are 0 so is the scale, and a product is 0 whatever 0 / 0 becomes in int8
    scale = jnp.max(jnp.abs(x), axis, keepdims=True) / MAX_INT8
    return jnp.round(x / scale).astype(jnp.int8), scale


int8_matmul.defvjp(int8_fwd, matmul_bwd)


# ---- choosing

MATMULS = {"compute": matmul, "float8": float8_matmul, "int8": int8_matmul}


def check_matmul_dtype(dtype: str, device: Any) -> None:
    """Raise UserError unless a jax.Device has units for train.matmul_dtype, or is a CPU."""
    kind = device.device_kind
    chip = hardware.find_chip(kind)
    if chip:
        check_chip(dtype, chip)
    elif dtype == "float8" and "NVIDIA" in kind:  # of which the table has not every card
        if float(device.compute_capability) < 8.9:
            refuse(dtype, kind)
    elif dtype != "compute" and device.platform != "cpu":
        refuse(dtype, kind)


def check_chip(dtype: str, chip: Chip) -> None:
    """Raise UserError unless a chip has units for train.matmul_dtype; a CPU emulates them."""
    if dtype != "compute" and chip.platform != "cpu" and not chip.has_units(dtype):
        refuse(dtype, chip.name)


def refuse(dtype: str, name: str) -> None:
    """Raise the UserError for a device without the units."""
    names = ", ".join(chip.name for chip in hardware.CHIP_TABLE if chip.has_units(dtype))
    raise UserError(
        f"train.matmul_dtype: {name} has no higher peak in {dtype} than in bfloat16; {names} have. "
        "Use compute."
    )
