"""Run a function on each device's shards of its arguments, given their logical axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpt.sharding import LogicalAxis, find_mesh_axes, logical_to_partition_spec, n_shards

ATTENTION_OUTPUT = "attention_output"  # the name by which remat policies know it

Axes = tuple[LogicalAxis, ...]  # of one array


def shard_map_attention(local: Callable[..., Array]) -> Callable[..., Array]:
    """Return local(q, k, v, segment_ids) run by each device on its shard, if there is a mesh.

    `local` gets whole sequences: where positions are sharded, they are exchanged for heads
    (Ulysses, 2309.14509), so that every device has a part of the heads and the same work.
    """

    def attend(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        n = count_shards("position")
        if n == 1:
            return local(q, k, v, segment_ids)
        n_repeats = n // math.gcd(n, k.shape[2])  # of kv heads, until they divide too
        k, v = jnp.repeat(k, n_repeats, axis=2), jnp.repeat(v, n_repeats, axis=2)
        q, k, v = (exchange_shards(x, "position", 2, 1) for x in (q, k, v))
        out = local(q, k, v, gather_shards(segment_ids, "position", 1))
        return exchange_shards(out, "position", 1, 2)

    queries: Axes = ("batch", "position", "heads", None)
    keys: Axes = ("batch", "position", "kv_heads", None)
    return shard_map_axes(attend, [queries, keys, keys, ("batch", "position")], [queries])


def shard_map_axes(
    local: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Sequence[Axes]
) -> Callable[..., Any]:
    """Return `local` run by each device on its shards, if there is a mesh.

    Args:
        local: of arrays; returns one array, or a tuple of several.
        in_axes: logical axes of each argument.
        out_axes: logical axes of each result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return local
    in_specs = tuple(map(logical_to_partition_spec, in_axes))
    out_specs = tuple(map(logical_to_partition_spec, out_axes))
    if len(out_specs) == 1:
        (out_specs,) = out_specs
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over_shards(x: Array, *axes: str, but: tuple[str, ...] = ()) -> Array:
    """Return the sum over all shards of these logical axes, within `shard_map_axes`.

    Not over the mesh axes of those named by `but`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    left_out = find_mesh_axes(*but)
    return jax.lax.psum(x, [axis for axis in find_mesh_axes(*axes) if axis not in left_out])


# ---- within `shard_map_axes`, over one logical axis


def count_shards(axis: str) -> int:
    """Return the number of shards; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else n_shards(mesh, axis)


def find_shard_index(axis: str) -> Array | int:
    """Return which of the shards this device holds."""
    return jax.lax.axis_index(find_mesh_axes(axis)) if count_shards(axis) > 1 else 0


def gather_shards(x: Array, axis: str, dimension: int = 0) -> Array:
    """Return all shards, joined along a dimension.

    They are stacked before they are joined: XLA gathers along the outermost dimension of memory,
    and would lay out anew, for all layers, what is gathered along another.
    """
    if count_shards(axis) == 1:
        return x
    shards = jax.lax.all_gather(x, find_mesh_axes(axis))
    shape = list(x.shape)
    shape[dimension] *= len(shards)
    return jnp.moveaxis(shards, 0, dimension).reshape(shape)


def exchange_shards(x: Array, axis: str, split: int, join: int) -> Array:
    """Return a part of dimension `split` for a whole dimension `join`, by an all-to-all."""
    return jax.lax.all_to_all(x, find_mesh_axes(axis), split, join, tiled=True)


def scatter_sum(x: Array, axis: str, dimension: int = 0) -> Array:
    """Return this device's part, along a dimension, of the sum over all shards."""
    n = count_shards(axis)
    if n == 1:
        return x
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    parts = x.reshape(*before, n, x.shape[dimension] // n, *after)
    return jax.lax.psum_scatter(jnp.moveaxis(parts, dimension, 0), find_mesh_axes(axis))
