"""Root-mean-square norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(
    x: Array, scale: Array, eps: float, adds_one: bool = False, divisor: float = 1.0
) -> Array:
    """Return the root-mean-square norm of x, computed in float32.

    Args:
        x: [..., *features]; the mean is over as many of the last axes as scale has.
        scale: [*features], by which what is normed is multiplied.
        eps: added to the mean square.
        adds_one: the factor is 1 + scale (Gemma).
        divisor: of the result.
    """
    y = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    mean_square = jnp.mean(y * y, axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + eps)
    factor = scale.astype(jnp.float32)
    if adds_one:
        factor = factor + 1
    if divisor != 1:
        factor = factor / divisor
    y = y * factor
    return y.astype(x.dtype)
