"""Rotary position embedding, in Hugging Face's split-half layout.

Channel i rotates with channel i + H/2.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from jaxpt.spec import ModelSpec, RopeScaling

Rope = tuple[Array, Array]  # cos and sin, float32 [B, T, 1, H/2]


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
