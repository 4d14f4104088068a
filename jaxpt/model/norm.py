"""Root-mean-square norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Return the root-mean-square norm over the scale's axes, the last ones, in float32."""
    y = x.astype(jnp.float32)
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))
    mean_square = jnp.mean(y * y, axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(mean_square + eps)
    y = y * scale.astype(jnp.float32)
    return y.astype(x.dtype)
