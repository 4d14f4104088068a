"""The soft limit of Gemma 2's scores and logits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def apply_softcap(x: Array, cap: float | None) -> Array:
    """Return cap tanh(x / cap); x where there is no cap."""
    if cap is None:
        return x
    return cap * jnp.tanh(x / cap)


def softcap_gradient(capped: Array, cap: float | None) -> Array | float:
    """Return the derivative of `apply_softcap`, given its result."""
    if cap is None:
        return 1.0
    return 1 - (capped / cap) ** 2
