"""Rotary position embedding.

Channel i of a head rotates with channel i + H/2, Hugging Face's split-half layout, or 2i with
2i + 1. R is the number of channels that rotate, H for most models.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from jaxpt.spec import ModelSpec, RopeScaling

Rope = tuple[Array, Array]  # cos and sin, float32 [B, T, 1, R/2]


def compute_ropes(spec: ModelSpec, positions: Array) -> dict[str, Rope]:
    """Return (cos, sin) by LayerKind.rope, each float32 [B, T, 1, R/2], per pair of channels."""
    # float32: at long T bf16 positions above 256 collide (8 significand bits), so angles repeat
    positions = positions.astype(jnp.float32)[..., None]

    def compute(theta: float | Array, scaling: RopeScaling | None) -> Rope:
        angles = positions * compute_rope_frequencies(spec, theta, scaling)
        cos = jnp.cos(angles)[:, :, None]
        sin = jnp.sin(angles)[:, :, None]
        if scaling is None or scaling.amplitude == 1:
            return cos, sin
        return cos * scaling.amplitude, sin * scaling.amplitude

    ropes = {"full": compute(spec.rope_theta, spec.rope_scaling)}
    if spec.window_rope_theta is not None:
        ropes["window"] = compute(spec.window_rope_theta, None)
    return ropes


def compute_rope_frequencies(
    spec: ModelSpec, theta: float | Array, scaling: RopeScaling | None
) -> Array:
    """Return radians per position for each pair of channels, float32 [R/2]."""
    channels = jnp.arange(0, spec.d_rotary, 2, dtype=jnp.float32)
    exponents = channels / spec.d_rotary
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        return scale_yarn_frequencies(frequencies, theta, scaling)
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


def scale_yarn_frequencies(frequencies: Array, theta: float | Array, scaling: RopeScaling) -> Array:
    """Keep fast pairs, divide slow ones by the factor, go from one to the other pair by pair.

    Source: YaRN (2309.00071), transformers' _compute_yarn_parameters.
    """
    n_pairs = len(frequencies)

    def find_pair(turns: float) -> Array:
        # the pair that makes so many full turns within the original context
        radians = scaling.original_max_seq_len / (2 * math.pi * turns)
        return n_pairs * math.log(radians) / jnp.log(theta)

    first = jnp.maximum(jnp.floor(find_pair(scaling.beta_fast)), 0)
    last = jnp.minimum(jnp.ceil(find_pair(scaling.beta_slow)), 2 * n_pairs - 1)
    width = jnp.where(first == last, 0.001, last - first)
    slowness = jnp.clip((jnp.arange(n_pairs) - first) / width, 0.0, 1.0)
    return frequencies * (1 - slowness + slowness / scaling.factor)


def apply_rope(x: Array, rope: Rope, interleaved: bool = False) -> Array:
    """Rotate the first R channels of x [B, T, heads, H], in float32; return it in x's dtype."""
    cos, sin = rope
    d_rotary = 2 * cos.shape[-1]
    y = x[..., :d_rotary].astype(jnp.float32)
    if interleaved:
        first, second = y[..., 0::2], y[..., 1::2]
    else:
        first, second = jnp.split(y, 2, axis=-1)
    new_first = first * cos - second * sin
    new_second = second * cos + first * sin
    if interleaved:
        rotated = jnp.stack([new_first, new_second], axis=-1).reshape(y.shape)
    else:
        rotated = jnp.concatenate([new_first, new_second], axis=-1)
    rotated = rotated.astype(x.dtype)
    if d_rotary == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., d_rotary:]], axis=-1)
