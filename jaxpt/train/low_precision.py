"""Keep an optimizer's moments in bfloat16 or in int8 blocks. It computes in float32.

Rounding is stochastic: a mean that moves by less than the distance of two stored values, as Adam's
mean square does with b2 = 0.999, would otherwise stay where it is (2010.06192).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.growth.moments import GRADIENT_POWERS, ITERATES, MomentPath, PathEntries, find_moment

MAX_BLOCK = 256  # numbers that share a scale, at most: 4 / 256 bytes each (2110.02861 has 2,048)
MIN_BLOCK = 8  # with fewer, as of 32,003 ids, scales and codes take as much as bfloat16 or more
MAX_CODE = 127


class PackedState(NamedTuple):
    """An optimizer's state with its moments packed.

    Attributes:
        state: the state, its moments as bfloat16 or as int8 codes.
        scales: of codes, nested like the state: float32 [..., n_blocks], None for other leaves.
    """

    state: Any
    scales: Any


def pack_moments(
    tx: optax.GradientTransformation, dtype: str, n_updates: Any
) -> optax.GradientTransformation:
    """Return a transformation that packs its moments between updates.

    Args:
        tx: any transformation.
        dtype: "bfloat16" or "int8".
        n_updates: int32 scalar, updates since step 0: the seed of the rounding.
    """

    def init(params: Any) -> PackedState:
        return pack_state(tx.init(params), params, dtype, n_updates)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, PackedState]:
        directions, new = tx.update(updates, unpack_state(state), params)
        return directions, pack_state(new, updates, dtype, n_updates)

    return optax.GradientTransformation(init, update)


def pack_state(state: Any, params: Any, dtype: str, n_updates: Any) -> PackedState:
    """Return an optimizer's state with its moments packed.

    Parameters at another point (schedule-free's) are no moments and stay as they are.

    Args:
        state: the optimizer's.
        params: nested dict of arrays, or shapes, of the weights that train.
        dtype: "bfloat16" or "int8", which a moment has if its last axis has blocks of MIN_BLOCK.
        n_updates: the seed of the rounding.
    """
    weights = dict(jax.tree_util.tree_leaves_with_path(params))
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    packed, scales = [], []
    for i, (path, leaf) in enumerate(leaves):
        moment, scale = find_moment(path, leaf, weights), None
        if moment and moment.field not in ITERATES:
            bits = draw_bits(leaf.shape, n_updates, i)
            if dtype == "bfloat16" or find_block(leaf.shape) < MIN_BLOCK:
                leaf = round_to_bfloat16(leaf, bits)
            else:
                leaf, scale = encode_blocks(leaf, bits, find_power(path))
        packed.append(leaf)
        scales.append(scale)
    return PackedState(structure.unflatten(packed), structure.unflatten(scales))


def unpack_state(packed: Any) -> Any:
    """Return an optimizer's state with its moments in float32. One that is not packed stays."""
    if not isinstance(packed, PackedState):
        return packed

    def unpack(path: PathEntries, leaf: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is not None:
            return decode_blocks(leaf, scale, find_power(path))
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree_util.tree_map_with_path(unpack, packed.state, packed.scales)


def find_power(path: PathEntries) -> int:
    """Return the power of the gradients that the field of a state averages."""
    return GRADIENT_POWERS.get(MomentPath(path, ()).field, 1)


# ---- rounding


def draw_bits(shape: tuple[int, ...], seed: Any, salt: int) -> jax.Array:
    """Return uint32 random bits, the same on any mesh.

    A hash of the index: threefry's 20 rounds would cost several times as much, for bits that decide
    no more than a rounding.
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        index += jnp.uint32(stride % 2**32) * position
        stride *= shape[dim]
    key = mix_bits(jnp.asarray(seed).astype(jnp.uint32)) + jnp.uint32(salt)
    return mix_bits(index ^ mix_bits(key))


def mix_bits(x: jax.Array) -> jax.Array:
    """Return a hash of uint32 numbers. Source: lowbias32 of nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Return one of the two neighbors, by chance in proportion to how near they are."""
    raw = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    upper = (raw + (bits & 0xFFFF)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def encode_blocks(x: jax.Array, bits: jax.Array, power: int) -> tuple[jax.Array, jax.Array]:
    """Return int8 codes and the scales of blocks along the last axis.

    Codes are of square roots of means and of fourth roots of mean squares, so that both reach down
    to 1/16,000 of a block's largest gradient. A mean square above 0 keeps a code above 0: Adam
    divides by its root.

    Args:
        x: float32 [..., n].
        bits: uint32 [..., n], random.
        power: 1 for means, 2 for mean squares.

    Returns:
        int8 [..., n], and float32 [..., n_blocks]: the largest magnitude of each block.
    """
    blocks = split_blocks(x.astype(jnp.float32))
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    size = jnp.abs(blocks) / jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)
    root = jnp.sqrt(size)
    if power == 2:
        root = jnp.sqrt(root)
    low = jnp.clip(jnp.floor(MAX_CODE * root), 0, MAX_CODE - 1)
    below, above = code_to_size(low, power), code_to_size(low + 1, power)
    chance = 2.0**-24 * (split_blocks(bits) >> 8).astype(jnp.float32)
    code = low + (chance * (above - below) < size - below)
    if power == 2:
        code = jnp.maximum(code, size > 0)
    code = jnp.sign(blocks) * code
    return code.reshape(x.shape).astype(jnp.int8), scales[..., 0]


def decode_blocks(codes: jax.Array, scales: jax.Array, power: int) -> jax.Array:
    """Return float32 [..., n], of what `encode_blocks` returned."""
    code = split_blocks(codes).astype(jnp.float32)
    size = code_to_size(jnp.abs(code), power)
    blocks = jnp.sign(code) * size * scales[..., None]
    return blocks.reshape(codes.shape)


def code_to_size(code: jax.Array, power: int) -> jax.Array:
    """Return the share of the block's scale that a code from 0 to MAX_CODE stands for."""
    return (code / MAX_CODE) ** (2 * power)


def split_blocks(x: jax.Array) -> jax.Array:
    """Return [..., n] as [..., n_blocks, block], the largest equal blocks of at most MAX_BLOCK."""
    return x.reshape(*x.shape[:-1], -1, find_block(x.shape))


def find_block(shape: tuple[int, ...]) -> int:
    """Return the size of a block of an array: at most MAX_BLOCK, and it divides the last axis."""
    return max(size for size in range(1, MAX_BLOCK + 1) if shape[-1] % size == 0)
