"""AdamW or Muon as an optax chain, weight decay by name, and learning rates by group and step."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, MuonState

from jaxpt.config import OptimConfig
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, is_param_spec
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.records import AxisRanges, NewParamsRecord
from jaxpt.weights import growth
from jaxpt.weights.measure import Params

PathEntries = tuple[Any, ...]

# By name: "decay what has two dimensions" would decay stacked norm scales, which are [L, D].
DECAYED_PARAMS = frozenset({"q", "k", "v", "o", "gate", "up", "down", "unembed"})
# What Muon orthogonalizes, layer by layer, and the input and output axes of a stacked weight.
# Embedding, head, norms and biases stay with Adam (kellerjordan.github.io/posts/muon).
QKV_DIMS = MuonDimensionNumbers(1, (2, 3))
MLP_DIMS = MuonDimensionNumbers(1, 2)
MATRIX_DIMS = {
    **dict.fromkeys(("q", "k", "v"), QKV_DIMS),
    "o": MuonDimensionNumbers((1, 2), 3),
    **dict.fromkeys(("gate", "up", "down"), MLP_DIMS),
}
MUON_RMS = 0.2  # of an update: Adam's (Moonlight, 2502.16982)


class NewParams(NamedTuple):
    """What the last growth added, and how it learns.

    Attributes:
        new: logical axis -> bool array, True where an index is new; see `growth.find_new_params`.
        adam_count: Adam's count when the model grew.
        rewarm: parameters that started from zero moments under a schedule that continues, and
            warm up over optim.warmup_steps: "none", "new" or "all".
    """

    new: growth.AxisFlags = {}
    adam_count: int = 0
    rewarm: str = "none"

    def to_record(self) -> NewParamsRecord:
        """Return the record for a checkpoint."""
        axes = {}
        for axis, flags in self.new.items():
            axes[axis] = flags_to_ranges(flags)
        return NewParamsRecord(axes, self.adam_count, self.rewarm)

    @classmethod
    def from_record(cls, record: NewParamsRecord) -> NewParams:
        """Return what `to_record` recorded."""
        new = {}
        for axis, ranges in record.axes.items():
            new[axis] = ranges_to_flags(ranges)
        return cls(new, record.adam_count, record.rewarm)


def flags_to_ranges(flags: np.ndarray) -> AxisRanges:
    """Return the ranges of True in a bool array."""
    padded = np.concatenate([[False], flags, [False]])
    changes = np.diff(padded.astype(np.int8))
    edges = np.flatnonzero(changes).reshape(-1, 2)
    ranges = tuple((int(start), int(stop)) for start, stop in edges)
    return AxisRanges(len(flags), ranges)


def ranges_to_flags(ranges: AxisRanges) -> np.ndarray:
    """Return the bool array that `flags_to_ranges` encoded."""
    flags = np.zeros(ranges.size, bool)
    for start, stop in ranges.new:
        flags[start:stop] = True
    return flags


# ---- updates


class AdamState(NamedTuple):
    """Adam's moments, and the updates that they have seen."""

    count: jax.Array  # int32
    mu: Params  # running mean of gradients
    nu: Params  # running mean of their squares


class AdamTransform(NamedTuple):
    """An optax transformation whose state is Adam's; see `scale_by_adam` for its arguments."""

    init: Callable[..., AdamState]
    update: Callable[..., tuple[Params, AdamState]]


def make_optimizer(
    optim: OptimConfig,
    spec: ModelSpec,
    new_params: NewParams = NewParams(),
) -> optax.GradientTransformationExtraArgs:
    """Return the map from gradients to update directions.

    The train step multiplies them by -learning_rate(step) and the group's multiplier. The learning
    rate stays outside so that it follows the run's step even when an update is skipped.
    """
    core = scale_by_adam(optim)
    if optim.name == "muon":
        core = split_muon_adam(core)
    if new_params.rewarm != "none":
        core = rewarm_new_params(core, optim, spec, new_params)
    decay = optax.identity()
    if optim.weight_decay:
        decay = optax.add_decayed_weights(optim.weight_decay, mask=decay_mask)
    transform = optax.GradientTransformationExtraArgs(*core)
    return optax.chain(transform, decay)


def scale_by_adam(optim: OptimConfig) -> AdamTransform:
    """Return optax's scale_by_adam with gradients times `scale`, and a no-op unless `good`.

    It is bound by memory where a step has few tokens: each moment is read by one loop that writes
    it in place, and directions are read from the new ones (the barrier). Optax's form makes XLA
    copy both moments first, as three loops read the old ones.
    """
    b1, b2, eps = optim.b1, optim.b2, optim.eps

    def init(params: Params) -> AdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(grads: Params, state: AdamState, params=None, *, scale, good):
        def update_mu(g, mu):
            new = (1 - b1) * (scale * g) + b1 * mu
            kept = jnp.where(good, new, mu)
            return kept.astype(mu.dtype)

        def update_nu(g, nu):
            new = (1 - b2) * (scale * g) ** 2 + b2 * nu
            kept = jnp.where(good, new, nu)
            return kept.astype(nu.dtype)

        count = state.count + good
        mu = jax.tree.map(update_mu, grads, state.mu)
        nu = jax.tree.map(update_nu, grads, state.nu)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        mu_scale = 1 / (1 - b1**count)
        mu_scale = mu_scale.astype(jnp.float32)
        nu_scale = 1 / (1 - b2**count)
        nu_scale = nu_scale.astype(jnp.float32)

        def direction(mu, nu):
            corrected = mu_scale * mu
            return corrected / (jnp.sqrt(nu_scale * nu) + eps)

        updates = jax.tree.map(direction, mu, nu)
        return updates, AdamState(count, mu, nu)

    return AdamTransform(init, update)


def split_muon_adam(adam: AdamTransform) -> AdamTransform:
    """Return Muon on the matrices of each layer (MATRIX_DIMS) and Adam on the rest.

    The state is Adam's; its nu holds the rest alone. Updates are scaled to the size of Adam's, so
    that learning rate and decay keep their meaning. Source: optax.contrib.
    """

    def is_matrix(path: PathEntries) -> bool:
        return path[-1].key in MATRIX_DIMS

    def dimension_numbers(tree: Params) -> Params:
        def one(path: PathEntries, _: Any) -> MuonDimensionNumbers:
            return MATRIX_DIMS[path[-1].key]

        return jax.tree_util.tree_map_with_path(one, tree)

    def scale_like_adam(path: PathEntries, update: jax.Array) -> jax.Array:
        dims = MATRIX_DIMS[path[-1].key]
        fans = []
        for axes in dims:
            sizes = [update.shape[axis] for axis in np.atleast_1d(axes)]
            fans.append(math.prod(sizes))
        return MUON_RMS * max(fans) ** 0.5 * update

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=cast(Any, dimension_numbers))

    def init(params: Params) -> AdamState:
        _, rest = split_tree(params, is_matrix)
        nu = adam.init(rest).nu
        return adam.init(params)._replace(nu=nu)

    def update(grads: Params, state: AdamState, params=None, *, scale, good):
        matrices, rest = split_tree(grads, is_matrix)
        momenta, mu = split_tree(state.mu, is_matrix)
        initial = cast(MuonState, muon.init(momenta))
        muon_state = initial._replace(count=state.count, mu=momenta)
        scaled = jax.tree.map(lambda g: scale * g, matrices)
        orthogonal, new_state = muon.update(scaled, muon_state)
        new_momenta = cast(MuonState, new_state).mu
        select = functools.partial(jnp.where, good)
        momenta = jax.tree.map(select, new_momenta, momenta)
        orthogonal = jax.tree_util.tree_map_with_path(scale_like_adam, orthogonal)
        adam_state = state._replace(mu=mu)
        updates, adam_state = adam.update(rest, adam_state, scale=scale, good=good)
        mu = merge_trees(momenta, adam_state.mu)
        updates = merge_trees(orthogonal, updates)
        return updates, adam_state._replace(mu=mu)

    return AdamTransform(init, update)


def split_tree(tree: Params, is_chosen: Callable[[PathEntries], bool]) -> tuple[Params, Params]:
    """Return (leaves whose path is chosen, the others) as nested dicts without empty branches."""
    chosen: Params = {}
    others: Params = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        inner = chosen if is_chosen(path) else others
        for part in path[:-1]:
            inner = inner.setdefault(part.key, {})
        inner[path[-1].key] = leaf
    return chosen, others


def merge_trees(a: Params, b: Params) -> Params:
    """Return the tree that `split_tree` split."""
    merged = {**a, **b}
    for name in a.keys() & b.keys():
        merged[name] = merge_trees(a[name], b[name])
    return {name: merged[name] for name in sorted(merged)}


def rewarm_new_params(
    adam: AdamTransform, optim: OptimConfig, spec: ModelSpec, new_params: NewParams
) -> AdamTransform:
    """Return Adam whose new parameters count their own updates.

    Their moments were 0 when the model grew, so their bias is corrected by their own count, and
    their updates warm up over optim.warmup_steps. eps is that of the old count, which matters
    below 1e-8.
    """

    def update(grads: Params, state: AdamState, params=None, **extra):
        updates, state = adam.update(grads, state, params, **extra)
        count = state.count.astype(jnp.float32)
        own = state.count - new_params.adam_count
        own = own.astype(jnp.float32)
        nu_ratio = (1 - optim.b2**own) / (1 - optim.b2**count)
        bias_factor = jnp.sqrt(nu_ratio) * (1 - optim.b1**count)
        bias_factor = bias_factor / (1 - optim.b1**own)
        warmup = jnp.minimum(own / max(optim.warmup_steps, 1), 1)

        def rewarm(path: PathEntries, param: ParamSpec, update: jax.Array) -> jax.Array:
            is_new: Any = True
            if new_params.rewarm == "new":
                is_new = growth.new_param_mask(param, new_params.new)
            if is_new is None:
                return update
            # an orthogonalized update has one size whatever its momentum's: no bias to correct
            is_muon = optim.name == "muon" and path[-1].key in MATRIX_DIMS
            factor = warmup if is_muon else bias_factor * warmup
            warmed = factor.astype(update.dtype) * update
            return jnp.where(is_new, warmed, update)

        updates = map_param_specs(rewarm, spec, updates)
        return updates, state

    return AdamTransform(adam.init, update)


def map_param_specs(function: Callable, spec: ModelSpec, *trees: Params) -> Params:
    """Return function(path, ParamSpec, leaves...) for every weight."""
    specs = transformer.param_specs(spec)
    return jax.tree_util.tree_map_with_path(function, specs, *trees, is_leaf=is_param_spec)


def decay_mask(params: Params) -> Params:
    """Return True for each weight that decays."""

    def decays(path: PathEntries, _: Any) -> bool:
        return path[-1].key in DECAYED_PARAMS

    return jax.tree_util.tree_map_with_path(decays, params)


# ---- learning rates


def lr_multiplier_tree(optim: OptimConfig, spec: ModelSpec, new_params: NewParams) -> Params | None:
    """Return each weight's multiplier of the learning rate, broadcastable to it. Use under jit.

    Returns:
        None without optim.lr_multipliers.

    Raises:
        UserError: this model has no such group.
    """
    if not optim.lr_multipliers:
        return None
    paths = jax.tree_util.tree_leaves_with_path(
        transformer.param_specs(spec), is_leaf=is_param_spec
    )
    names = {path[-1].key for path, _ in paths}
    has_new = any(flags.any() for flags in new_params.new.values())
    for group, _ in optim.lr_multipliers:
        if group in ("old", "new"):
            check_has_new(group, has_new)
        elif group not in names:
            parse_layer_group(group, spec)

    def multiply(path: PathEntries, param: ParamSpec) -> jax.Array:
        result = jnp.float32(1)
        for group, multiplier in optim.lr_multipliers:
            if group in ("old", "new"):
                is_new = growth.new_param_mask(param, new_params.new)
                if is_new is None:
                    is_new = jnp.bool_(False)
                is_member = is_new if group == "new" else ~is_new
                result *= jnp.where(is_member, multiplier, 1)
            elif group in names:
                is_member = path[-1].key == group
                result *= multiplier if is_member else 1
            elif param.axes[0] == "layers":
                is_member = layer_group_mask(group, spec, len(param.shape))
                result *= jnp.where(is_member, multiplier, 1)
        return result

    return map_param_specs(multiply, spec)


def check_has_new(group: str, has_new: bool) -> None:
    """Raise UserError if old and new are named but the model was not grown."""
    if not has_new:
        raise UserError(
            f"optim.lr_multipliers: expected a grown model for the group {group}, got one that "
            "was not grown. Leave it out, or grow first."
        )


def parse_layer_group(group: str, spec: ModelSpec) -> tuple[int, int]:
    """Return 'layers 4-7' as (4, 7). Raise UserError for anything else."""
    match = re.fullmatch(r"layers (\d+)-(\d+)", group)
    if match:
        first, last = map(int, match.groups())
        if first <= last < spec.n_layers:
            return first, last
    raise UserError(
        f"optim.lr_multipliers: expected old, new, a weight's name such as embed or gate, or "
        f"'layers 0-{spec.n_layers - 1}', got {group!r}."
    )


def layer_group_mask(group: str, spec: ModelSpec, n_dims: int) -> np.ndarray:
    """Return True for the group's layers, shape [L, 1, ...] of n_dims dimensions."""
    first, last = parse_layer_group(group, spec)
    layers = np.arange(spec.n_layers)
    is_member = (first <= layers) & (layers <= last)
    other_axes = [1] * (n_dims - 1)
    return is_member.reshape(-1, *other_axes)


def make_lr_schedule(optim: OptimConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Return the learning rate as a function of the update's number, 0 for the first.

    Warm-up rises linearly to peak_lr, which the update after it has. Then wsd stays and falls
    linearly over the last decay_frac of the steps (2405.18392), cosine and linear fall all the
    way, to peak_lr x end_lr_frac at the last step.

    Raises:
        UserError: the warm-up leaves no step.
    """
    warmup, end = optim.warmup_steps, optim.end_lr_frac
    if warmup >= steps:
        raise UserError(
            f"optim.warmup_steps: expected fewer than train.steps = {steps}, got {warmup}. "
            f"Use {max(steps // 20, 1)}, for example."
        )
    decay_start = warmup
    if optim.schedule == "wsd":
        decay_steps = max(round(steps * optim.decay_frac), 1)
        decay_start = max(steps - decay_steps, warmup)
    elif optim.schedule == "constant":
        decay_start = steps
    decay_steps = max(steps - decay_start, 1)

    def lr_at(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(step / warmup, 1.0) if warmup else 1.0
        progress = (step - decay_start) / decay_steps
        progress = jnp.clip(progress, 0.0, 1.0)
        fall = 1 - progress
        if optim.schedule == "cosine":
            fall = (1 + jnp.cos(jnp.pi * progress)) / 2
        above_end = (1 - end) * fall
        return optim.peak_lr * rise * (end + above_end)

    return lr_at
