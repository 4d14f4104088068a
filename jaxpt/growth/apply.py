"""Make the child's parameters: gathers along every axis that changes (moments.py: of moments).

They are jitted onto the child's shardings, layer by layer where a width changes: no device ever
holds more than one whole layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpt.growth import predict, vocabulary
from jaxpt.growth.growth import NO_SOURCE, AxisScales, Growth, Path
from jaxpt.growth.new_params import find_new_params, new_param_mask, source_axis
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, map_param_specs, param_key, subtree_like
from jaxpt.model.transformer import Params
from jaxpt.sharding import jit_once, with_logical_constraint
from jaxpt.spec import ModelSpec


def grow_params(growth: Growth, params: Params, mesh: Mesh) -> Params:
    """Return the child's parameters, on its shardings.

    Every weight that the operator does not touch is the parent's, the final norm included.
    """
    return compile_growth(growth, mesh)(params)


def compile_growth(growth: Growth, mesh: Mesh) -> Any:
    """Return the jitted map from the parent's parameters to the child's."""

    def make(params: Params) -> Params:
        predicted: Params = {}
        gaps = growth.predicted_gaps
        if gaps:
            predicted = predict.predict_layer_params(growth.spec, params["blocks"], gaps)

        def grow(path: Path, param: ParamSpec) -> jax.Array:
            leaf = find_leaf(params, path)
            if leaf is None and path[-1] in SHARED_SOURCES:
                return take_first_shard(growth, params["blocks"], SHARED_SOURCES[path[-1]])
            if leaf is None:  # the parent has no such weight
                key = param_key(growth.seed, path)
                new = param.init.draw(key, param.shape, params["embed"].dtype)
                return tie_groups(growth, param, new)
            mapping = growth.token_mapping
            if mapping and "vocab" in param.axes:
                axis = param.axes.index("vocab")
                return vocabulary.average_embeddings(leaf, mapping, axis)
            if path[-1] in predicted:
                leaf = jnp.concatenate([leaf, predicted[path[-1]]])
            scales = input_scales(growth, path, param)
            return LeafGrowth(growth, path, param).grow(leaf, scales)

        return map_param_specs(grow, transformer.param_specs(growth.child))

    shardings = transformer.make_param_shardings(growth.child, mesh)
    return jit_growth(growth, make, mesh, shardings)


# of a new shared expert, what it is a part of
SHARED_SOURCES = {"shared_gate": "gate", "shared_up": "up", "shared_down": "down"}


def take_first_shard(growth: Growth, blocks: Params, name: str) -> jax.Array:
    """Return the first part of a dense MLP's weight, [L, D, F / n_shards] or the like."""
    parent: ParamSpec = transformer.param_specs(growth.spec)["blocks"][name]
    return split_width(blocks[name], parent, growth.n_shards)[:, 0]


def split_width(leaf: jax.Array, param: ParamSpec, n_shards: int) -> jax.Array:
    """Return a dense MLP's weight [L, ...] as its parts along the width, [L, n_shards, ...]."""
    axis = param.axes.index("mlp")
    before, size, after = leaf.shape[:axis], leaf.shape[axis], leaf.shape[axis + 1 :]
    parts = leaf.reshape(*before, n_shards, size // n_shards, *after)
    return jnp.moveaxis(parts, axis, 1)


def tie_groups(growth: Growth, param: ParamSpec, router: jax.Array) -> jax.Array:
    """Return a new router that scores all experts of a group as its first one."""
    if "scores" not in param.axes or growth.group_size == 1:
        return router
    number = np.arange(growth.child.n_experts)
    first = number - number % growth.group_size
    return jnp.take(router, first, axis=param.axes.index("scores"))


def find_leaf(tree: Params, path: Path) -> Any:
    """Return the leaf of a nested dict at a path, None if there is none."""
    found: Any = tree
    for name in path:
        found = found.get(name)
        if found is None:
            return None
    return found


def jit_growth(growth: Growth, make: Callable, mesh: Mesh, shardings: Params) -> Any:
    """Return `make` jitted onto the child's shardings."""

    def make_on_mesh(tree: Params) -> Params:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return make(tree)

    return jit_once(make_on_mesh, shardings)


def map_child_params(child: ModelSpec, function: Callable, tree: Params) -> Params:
    """Return function(path, ParamSpec, leaf) for every parameter that the tree has."""
    specs = subtree_like(tree, transformer.param_specs(child))
    return map_param_specs(function, specs, tree)


def input_axis(growth: Growth, path: Path, param: ParamSpec) -> str | None:
    """Return the logical axis that a parameter sums over.

    Copies along it are divided by their number; along the others they are copied as they are.
    """
    # the final norm is scaled for a tied head: the embedding has to stay whole as an input
    if path == ("norm",) and growth.spec.tie_embeddings:
        return "embed"
    return param.axes[param.in_dims[0]] if param.in_dims else None


def input_scales(growth: Growth, path: Path, param: ParamSpec) -> AxisScales:
    """Return the factors that keep sums over copied inputs."""
    if param.writes_residual and growth.group_size > 1:
        # the experts of a group share the weight of one
        return {"experts": np.full(growth.child.n_experts, growth.group_size, np.float32)}
    axis = input_axis(growth, path, param)
    if not growth.divide_copies or axis not in growth.sources:
        return {}
    n_copies = count_copies(growth.sources[axis])
    return {axis: 1 / n_copies}


def count_copies(source: np.ndarray) -> np.ndarray:
    """Return how often each index's source occurs; float32, of the source's shape."""
    n_copies = np.bincount(source)
    return n_copies[source].astype(np.float32)


class LeafGrowth:
    """Grow one weight, or a moment of it: gather along every axis that changes, and scale.

    Args:
        growth: what becomes of the model.
        path: of the weight, ("blocks", "q").
        param: the child's.
        is_moment: what has no source is 0; else it is randomly initialized, noise is added and
            output layers are zeroed.
    """

    def __init__(self, growth: Growth, path: Path, param: ParamSpec, is_moment: bool = False):
        """Plan the gathers."""
        self.growth = growth
        self.path = path
        self.param = param
        self.is_moment = is_moment
        self.is_stacked = param.is_layered
        self.axes = param.axes
        self.n_layers = 1
        if self.is_stacked:
            self.axes = param.axes[1:]
            self.n_layers = param.shape[0]
        layer_map = growth.sources.get("layers", np.arange(self.n_layers))
        is_missing = layer_map == NO_SOURCE
        if growth.predicted_gaps and not is_moment:
            # the predicted layers were appended to the parent's
            appended = growth.spec.n_layers + np.cumsum(is_missing) - 1
            layer_map = np.where(is_missing, appended, layer_map)
        self.layer_map = layer_map
        is_random = layer_map == NO_SOURCE
        self.has_missing = self.is_stacked and is_random.any()
        self.wide_axes = []
        for i, axis in enumerate(map(source_axis, self.axes)):
            if axis in growth.sources:
                self.wide_axes.append((i, axis))
        self.is_new = new_param_mask(param, find_new_params(growth))
        has_new = self.is_new is not None or growth.divide_copies
        takes_noise = growth.noise_std > 0 and param.init.std > 0
        self.has_noise = not is_moment and takes_noise and has_new
        has_zeros = bool(growth.zero_output_layers) and param.writes_residual
        self.zeroes_output = not is_moment and has_zeros
        is_expert = "experts" in param.axes and "mlp" in param.axes
        self.redraws = not is_moment and is_expert and growth.drop_frac > 0
        self.key = param_key(growth.seed, path)

    def grow(self, leaf: jax.Array, scales: AxisScales) -> jax.Array:
        """Return the child's weight. Layers are made one at a time."""
        leaf = self.add_axes(leaf)
        if self.is_stacked and not len(leaf):
            # a parent without layers: every layer is random, yet a gather needs one to point at
            leaf = jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        changes = self.has_missing or self.has_noise or self.zeroes_output
        if not changes and not self.wide_axes:
            if self.is_stacked and "layers" in self.growth.sources:
                return jnp.take(leaf, self.layer_map, axis=0)
            return leaf

        def grow_layer(layer: Any) -> jax.Array:
            return self.grow_layer(leaf, layer, scales)

        if not self.is_stacked:
            return grow_layer(0)
        return jax.lax.map(grow_layer, jnp.arange(self.n_layers))

    def add_axes(self, leaf: jax.Array) -> jax.Array:
        """Return the parent's weight with every axis of the child's: its parts are experts."""
        parent_specs = transformer.param_specs(self.growth.spec)
        parent: ParamSpec = find_leaf(parent_specs, self.path)
        if "experts" not in self.axes or "experts" in parent.axes:
            return leaf
        return split_width(leaf, parent, self.growth.n_shards)

    def grow_layer(self, leaf: jax.Array, layer: Any, scales: AxisScales) -> jax.Array:
        """Return one layer of the child's weight."""
        source = jnp.asarray(self.layer_map)[layer]
        x = leaf
        if self.is_stacked:
            x = leaf[jnp.maximum(source, 0)]
        for i, axis in self.wide_axes:
            x = self.gather(x, i, axis, source, scales)
        key = jax.random.fold_in(self.key, layer)
        if self.has_missing:
            new = self.make_new(key, x)
            x = jnp.where(source == NO_SOURCE, new, x)
        if self.has_noise:
            noise_key = jax.random.fold_in(key, 1)
            noise = self.make_noise(noise_key, x.shape, layer)
            x = (x + noise).astype(x.dtype)
        if self.redraws:
            x = self.redraw_channels(x, layer)
        if self.zeroes_output:
            is_kept = np.ones(self.n_layers, bool)
            is_kept[list(self.growth.zero_output_layers)] = False
            x = jnp.where(jnp.asarray(is_kept)[layer], x, 0.0 - self.param.offset)
        return with_logical_constraint(x, *self.axes)

    def gather(self, x: jax.Array, i: int, axis: str, layer: Any, scales: AxisScales) -> jax.Array:
        """Return x with its dimension i taken from the axis's sources, and scaled there."""
        sources = self.growth.sources[axis]
        index = jnp.asarray(sources)
        if sources.ndim == 2:  # per layer: chosen, never copied
            chosen = jnp.maximum(index[layer], 0)
            return jnp.take(x, chosen, axis=i)
        x = jnp.take(x, jnp.maximum(index, 0), axis=i)
        scale = scales.get(axis, np.float32(1))
        factor = scale * (sources != NO_SOURCE)
        if (factor == 1).all():
            return x
        n_inner = x.ndim - i - 1
        factor = factor.reshape(-1, *[1] * n_inner)
        factor = factor.astype(x.dtype)
        offset = self.param.offset
        if offset and not self.is_moment:
            return (x + offset) * factor - offset
        return x * factor

    def redraw_channels(self, x: jax.Array, layer: Any) -> jax.Array:
        """Return x [E, ...] with some channels of each expert drawn anew, as its others are spread.

        They are the same channels in all matrices of an expert. Source: 2502.19261.
        """
        axis = self.axes.index("mlp")
        E, F = x.shape[0], x.shape[axis]
        key = jax.random.fold_in(param_key(self.growth.seed, ("redrawn",)), layer)
        draws = jax.random.uniform(key, (E, F))
        rank = jnp.argsort(jnp.argsort(draws))
        is_redrawn = rank < round(self.growth.drop_frac * F)
        is_redrawn = jnp.expand_dims(is_redrawn, 3 - axis)
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        std = jnp.std(x, axis=(1, 2), keepdims=True)
        normal = jax.random.normal(jax.random.fold_in(self.key, layer), x.shape, x.dtype)
        return jnp.where(is_redrawn, mean + std * normal, x)

    def make_new(self, key: jax.Array, like: jax.Array) -> jax.Array:
        """Return what stands where there is no source: initial values, 0 for a moment."""
        if self.is_moment:
            return jnp.zeros_like(like)
        return self.param.init.draw(key, like.shape, like.dtype)

    def make_noise(self, key: jax.Array, shape: tuple[int, ...], layer: Any) -> jax.Array:
        """Return noise on what is new, or noise that cancels over copies."""
        growth = self.growth
        std = growth.noise_std * self.param.init.std
        noise = std * jax.random.normal(key, shape)
        if growth.divide_copies:
            return self.cancel_noise(noise)
        is_new = self.is_new
        assert is_new is not None  # has_noise
        if self.is_stacked:
            is_per_layer = len(is_new) > 1
            is_new = is_new[layer if is_per_layer else 0]
        return jnp.where(is_new, noise, 0)

    def cancel_noise(self, noise: jax.Array) -> jax.Array:
        """Return noise whose sum over the copies of each input is 0; all 0 if no input is copied.

        It tells the copies apart and keeps the function. Each copy takes its own draw less the
        next copy's; only gathers, so that every mesh gives the same bits.
        """
        axis = input_axis(self.growth, self.path, self.param)
        dims = [i for i, wide_axis in self.wide_axes if wide_axis == axis]
        if axis is None or not dims:
            return jnp.zeros_like(noise)
        sources = self.growth.sources[axis]
        next_copy = np.empty_like(sources)
        for index in range(sources.max() + 1):
            copies = np.flatnonzero(sources == index)
            next_copy[copies] = np.roll(copies, -1)
        next_noise = jnp.take(noise, next_copy, axis=dims[0])
        difference = noise - next_noise
        return difference * np.float32(0.5**0.5)
