"""Grow an optimizer's moments with their weights, whatever the optimizer.

A moment is a leaf of an optimizer's state whose path ends in a weight's and which has its shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpt.growth.apply import (
    LeafGrowth,
    count_copies,
    grow_params,
    input_axis,
    jit_growth,
    map_child_params,
)
from jaxpt.growth.growth import AxisScales, Growth, Path
from jaxpt.growth.new_params import find_new_params, new_param_mask, source_axis
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, subtree_like
from jaxpt.model.transformer import Params

PathEntries = tuple[Any, ...]  # of a leaf in a pytree, as JAX gives it

# How growth maps the fields of optax's states. The power of the gradients that a field averages, 1
# unless it is named here; and fields that hold the parameters at another point (schedule-free's).
GRADIENT_POWERS = {"nu": 2, "nu_max": 2, "sum_of_squares": 2, "v": 2}
ITERATES = frozenset({"z"})


class MomentPath(NamedTuple):
    """Where a moment lies in an optimizer's state: `tree` then `param`.

    Attributes:
        tree: path of the moments of all weights.
        param: path of its weight among the parameters.
    """

    tree: PathEntries
    param: PathEntries

    @property
    def field(self) -> str:
        """Name of the state's field that holds the moments, such as mu."""
        names = [entry.name for entry in self.tree if isinstance(entry, jax.tree_util.GetAttrKey)]
        return names[-1] if names else ""


def find_moment(path: PathEntries, leaf: Any, weights: dict[PathEntries, Any]) -> MomentPath | None:
    """Return whose moment a leaf of an optimizer's state is; None for a count and the like.

    A moment's path ends in its weight's, and it has its weight's shape.

    Args:
        path: of the leaf.
        leaf: anything with a shape.
        weights: path -> anything with a shape.
    """
    found = find_weight(path, weights)
    if found and weights[found.param].shape == leaf.shape:
        return found
    return None


def find_weight(path: PathEntries, weights: dict[PathEntries, Any]) -> MomentPath | None:
    """Return to which weight a leaf of an optimizer's state belongs; None: to none."""
    for start in range(len(path)):
        if path[start:] in weights:
            return MomentPath(path[:start], path[start:])
    return None


def find_sharded(
    path: PathEntries, leaf: Any, weights: dict[PathEntries, Any]
) -> PathEntries | None:
    """Return the path of the weight as which a leaf of an optimizer's state is sharded.

    A moment is, and so are the scales of its blocks: they have its axes.
    """
    found = find_weight(path, weights)
    if found and weights[found.param].ndim == leaf.ndim:
        return found.param
    return None


def grow_all_moments(
    leaves: dict[PathEntries, jax.Array], growth: Growth, policy: str, mesh: Mesh
) -> dict[PathEntries, jax.Array]:
    """Return path -> moment of the child, given path -> leaf of the parent's optimizer state."""
    weights = dict(
        jax.tree_util.tree_leaves_with_path(transformer.make_abstract_params(growth.spec, mesh))
    )
    trees: dict[PathEntries, Params] = {}
    fields: dict[PathEntries, str] = {}
    for path, leaf in leaves.items():
        moment = find_moment(path, leaf, weights)
        if moment:
            tree = trees.setdefault(moment.tree, {})
            insert_leaf(tree, moment.param, leaf)
            fields[moment.tree] = moment.field
    moments = {}
    for start, tree in trees.items():
        child = grow_moment_tree(tree, fields[start], growth, policy, mesh)
        for path, leaf in jax.tree_util.tree_leaves_with_path(child):
            moments[(*start, *path)] = leaf
    return moments


def grow_moment_tree(tree: Params, field: str, growth: Growth, policy: str, mesh: Mesh) -> Params:
    """Return the child's moments of one field of an optimizer's state."""
    if field in ITERATES:
        return grow_params(growth, tree, mesh)
    power = GRADIENT_POWERS.get(field, 1)
    return grow_moments(growth, tree, policy, power, mesh)


def insert_leaf(tree: Params, path: PathEntries, leaf: jax.Array) -> None:
    """Put a leaf into a nested dict."""
    for entry in path[:-1]:
        tree = tree.setdefault(entry.key, {})
    tree[path[-1].key] = leaf


def grow_moments(growth: Growth, tree: Params, policy: str, power: int, mesh: Mesh) -> Params:
    """Return Adam's moments of the child's gradients, from the parent's.

    What has no source (a random or predicted layer, an averaged embedding) starts at 0 under every
    policy; a weight that the parent has not is left out.

    Args:
        growth: what became of the parent.
        tree: Adam's mean or mean square, or Muon's momentum; may hold some of the weights only.
        policy: what becomes of a moment:
            copy: it is copied.
            copy_scaled: it becomes what the gradient of a widened model truly is. The loss reaches
                an output that is copied c times through c copies of 1/c each, so its gradient is
                1/c of the parent's (power 2: 1/c^2). Depth has no such law: each copy of a layer
                sees its own input, and its moments are copied.
            reset_new: copied, 0 for whatever is new.
            fresh: 0.
        power: 1 for means, 2 for mean squares.
        mesh: of the tree.
    """
    is_scaled = policy == "copy_scaled" and growth.divide_copies
    flags = find_new_params(growth)

    def grow(path: Path, param: ParamSpec, leaf: jax.Array) -> jax.Array:
        if policy == "fresh":
            return jnp.zeros(param.shape, leaf.dtype)
        scales: AxisScales = {}
        if is_scaled:
            scales = output_scales(growth, path, param, power)
        leaf_growth = LeafGrowth(growth, path, param, is_moment=True)
        grown = leaf_growth.grow(leaf, scales)
        if policy != "reset_new":
            return grown
        is_new = new_param_mask(param, flags)
        if is_new is None:
            return grown
        is_kept = jnp.where(is_new, 0, 1)
        return grown * is_kept.astype(leaf.dtype)

    def make(tree: Params) -> Params:
        return map_child_params(growth.child, grow, tree)

    shardings = transformer.make_param_shardings(growth.child, mesh)
    shardings = subtree_like(tree, shardings)
    return jit_growth(growth, make, mesh, shardings)(tree)


def output_scales(growth: Growth, path: Path, param: ParamSpec, power: int) -> AxisScales:
    """Return the factors of a gradient along copied outputs."""
    excluded = {"layers", "vocab", input_axis(growth, path, param)}
    scales = {}
    for axis in map(source_axis, param.axes):
        if axis in growth.sources and axis not in excluded:
            n_copies = count_copies(growth.sources[axis])
            scales[axis] = n_copies ** -float(power)
    return scales
