"""Optimizers as optax transformations, by name; learning rates by group.

The contract is optax's: the gradient of the mean loss, clipped, goes in; what comes out is added
to the parameters.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from jaxpt.config import OptimConfig, check_choice
from jaxpt.growth.moments import ITERATES, PathEntries
from jaxpt.growth.new_params import NewParams, new_param_mask
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, ParamSpecs, list_param_specs, map_param_specs
from jaxpt.model.transformer import Params
from jaxpt.spec import ModelSpec, UserError
from jaxpt.train.low_precision import pack_moments

MUON_RMS = 0.2  # of an update: Adam's (Moonlight, 2502.16982)
MIN_FACTORED = 32  # optax's 128 would leave all matrices of heads of 64 whole


class OptimizerInputs(NamedTuple):
    """What a factory of OPTIMIZERS may read.

    Attributes:
        optim: the knobs.
        specs: ParamSpec of every weight that trains, nested like the parameters.
        new_params: what the last growth added.
        learning_rate: of this update, float32 scalar. It follows the run's step, so that a skipped
            update does not delay the schedule.
        n_updates: int32 scalar, updates since step 0, this one included and skipped ones not.
        n_warmup: int32 scalar, steps of the run's warm-up, which new parameters repeat.
    """

    optim: OptimConfig
    specs: ParamSpecs
    new_params: NewParams
    learning_rate: Any
    n_updates: Any
    n_warmup: Any


def make_adamw(inputs: OptimizerInputs) -> optax.GradientTransformation:
    """Return AdamW (1711.05101)."""
    adam = scale_by_adam(inputs)
    adam = correct_new_bias(adam, inputs)
    return descend(adam, inputs)


def make_muon(inputs: OptimizerInputs) -> optax.GradientTransformation:
    """Return Muon on the matrices of each layer and Adam on the rest.

    Embedding, head and other classifiers, norms and biases stay with Adam
    (kellerjordan.github.io/posts/muon). Updates are scaled to the size of Adam's, so that learning
    rate and decay keep their meaning.
    """
    specs = inputs.specs

    def is_matrix(param: ParamSpec, leaf: Any) -> bool:
        return param.is_layered and param.n_in > 0 and not param.is_classifier

    def dimensions(param: ParamSpec, leaf: Any) -> MuonDimensionNumbers:
        return MuonDimensionNumbers(param.in_dims, param.out_dims)

    def scale_like_adam(param: ParamSpec, orthogonal: jax.Array) -> jax.Array:
        n_in = math.prod(param.shape[dim] for dim in param.in_dims)
        n_out = math.prod(param.shape[dim] for dim in param.out_dims)
        # lr_ratio divides by in_ratio: Adam's update has a spectral norm that grows with the width,
        # and this one with its root (2310.17813)
        transfer = param.in_ratio**0.5
        return MUON_RMS * transfer * max(n_in, n_out) ** 0.5 * orthogonal

    def matrices(tree: Any) -> Any:
        return map_with_specs(is_matrix, specs, tree)

    def others(tree: Any) -> Any:
        return jax.tree.map(operator.not_, matrices(tree))

    def dimension_numbers(tree: Any) -> Any:
        return map_with_specs(dimensions, specs, tree)

    def scale_all(updates: Any, params: Any) -> Any:
        return map_with_specs(scale_like_adam, specs, updates)

    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=cast(Any, dimension_numbers)),
        optax.stateless(scale_all),
    )
    adam = correct_new_bias(scale_by_adam(inputs), inputs)
    both = optax.chain(optax.masked(muon, matrices), optax.masked(adam, others))
    return descend(both, inputs)


def make_adafactor(inputs: OptimizerInputs) -> optax.GradientTransformation:
    """Return Adafactor (1804.04235) with the rates and the decay of AdamW.

    Mean squares are kept by row and by column of each layer's matrices, and whole of norms and
    biases. The mean of the updates is kept too, as in 2106.04560 (section 3.4), so that learning
    rates keep their meaning; b1 = 0 saves its memory.
    """
    specs = inputs.specs
    depths = map_param_specs(find_depth, specs)
    parts = []
    for depth in sorted(set(jax.tree.leaves(depths))):
        rms = optax.scale_by_factored_rms(depth >= 0, min_dim_size_to_factor=MIN_FACTORED)
        for _ in range(depth):
            rms = map_stacked(rms)
        is_part = jax.tree.map(functools.partial(operator.eq, depth), depths)
        parts.append(optax.masked(rms, is_part))
    clip = optax.stateless(lambda updates, params: map_with_specs(clip_rms, specs, updates))
    mean = optax.ema(inputs.optim.b1) if inputs.optim.b1 else optax.identity()
    return descend(optax.chain(*parts, clip, mean), inputs)


# Name -> factory: the valid values of optim.name. A new optimizer is a function and its entry:
#
#     def make_lion(inputs):
#         return descend(optax.scale_by_lion(inputs.optim.b1, inputs.optim.b2), inputs)
#
# `descend` turns directions into updates. A transformation that applies the learning rate itself,
# such as schedule_free_adamw, takes inputs.learning_rate and is returned as it is: decay, the
# ratios of model.base_shape and the warm-up of new parameters are then its own. Either way the step
# skips bad updates, a moment is sharded and grows as its parameter (growth/moments.py), and the
# other state is kept.
OPTIMIZERS: dict[str, Callable[[OptimizerInputs], optax.GradientTransformation]] = {
    "adamw": make_adamw,
    "muon": make_muon,
    "adafactor": make_adafactor,
}


def make_optimizer(
    optim: OptimConfig,
    spec: ModelSpec,
    new_params: NewParams = NewParams(),
    learning_rate: Any = 0.0,
    n_updates: Any = 0,
    n_warmup: Any = 0,
) -> optax.GradientTransformation:
    """Return the transformation that optim.name names.

    The step makes it anew while it is traced, with the learning rate of that step; the state does
    not depend on it.

    Raises:
        UserError: there is no such optimizer.
    """
    check_name(optim)
    specs = transformer.trained_param_specs(spec)
    inputs = OptimizerInputs(optim, specs, new_params, learning_rate, n_updates, n_warmup)
    tx = OPTIMIZERS[optim.name](inputs)
    if optim.moment_dtype == "params":
        return tx
    return pack_moments(tx, optim.moment_dtype, n_updates)


def check_name(optim: OptimConfig) -> None:
    """Raise UserError if there is no such optimizer."""
    check_choice("optim.name", optim.name, tuple(OPTIMIZERS))


def descend(
    direction: optax.GradientTransformation, inputs: OptimizerInputs
) -> optax.GradientTransformation:
    """Return updates along a direction: with warm-up of new parameters, decay, learning rate."""
    optim = inputs.optim
    decay = optax.identity()
    if optim.weight_decay:
        decay = optax.add_decayed_weights(optim.weight_decay, mask=decay_mask(inputs.specs))
    scale = optax.scale_by_learning_rate(inputs.learning_rate)
    transferred = optax.stateless(lambda updates, params: transfer_rates(updates, inputs.specs))
    return optax.chain(direction, transferred, warm_up_new_params(inputs), decay, scale)


def transfer_rates(updates: Any, specs: ParamSpecs) -> Any:
    """Return the updates with each weight's own rate, by model.base_shape; decay comes after."""

    def scale(param: ParamSpec, update: jax.Array) -> jax.Array:
        return update if param.lr_ratio == 1 else param.lr_ratio * update

    return map_with_specs(scale, specs, updates)


def decay_mask(specs: ParamSpecs) -> Params:
    """Return True for each weight that decays."""
    return map_param_specs(lambda path, param: param.decays, specs)


def map_with_specs(function: Callable, specs: ParamSpecs, tree: Any, *others: Any) -> Any:
    """Return function(ParamSpec, leaves...) for the weights that the trees hold."""

    def call(path: PathEntries, *leaves: Any) -> Any:
        param: Any = specs
        for entry in path:
            param = param[entry.key]
        return function(param, *leaves)

    return jax.tree_util.tree_map_with_path(call, tree, *others)


# ---- directions


def scale_by_adam(inputs: OptimizerInputs) -> optax.GradientTransformation:
    """Return optax's scale_by_adam, with moments updated in place.

    It is bound by memory where a step has few tokens: each moment is read by one loop that writes
    it, and directions are read from the new ones (the barrier). Optax's form makes XLA copy both
    moments first, as three loops read the old ones.
    """
    b1, b2, eps = inputs.optim.b1, inputs.optim.b2, inputs.optim.eps

    def init(params: Any) -> optax.ScaleByAdamState:
        mu = jax.tree.map(jnp.zeros_like, params)
        nu = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def update_mu(g: jax.Array, mu: jax.Array) -> jax.Array:
            new = (1 - b1) * g + b1 * mu
            return new.astype(mu.dtype)

        def update_nu(g: jax.Array, nu: jax.Array) -> jax.Array:
            new = (1 - b2) * g**2 + b2 * nu
            return new.astype(nu.dtype)

        count = state.count + 1
        mu = jax.tree.map(update_mu, updates, state.mu)
        nu = jax.tree.map(update_nu, updates, state.nu)
        # packed ones are read and written by one loop anyway
        if inputs.optim.moment_dtype == "params":
            mu, nu = jax.lax.optimization_barrier((mu, nu))
        mu_scale = 1 / (1 - b1**count)
        mu_scale = mu_scale.astype(jnp.float32)
        nu_scale = 1 / (1 - b2**count)
        nu_scale = nu_scale.astype(jnp.float32)

        def direction(param: ParamSpec, mu: jax.Array, nu: jax.Array) -> jax.Array:
            corrected = mu_scale * mu
            return corrected / (jnp.sqrt(nu_scale * nu) + param.grad_ratio * eps)

        directions = map_with_specs(direction, inputs.specs, mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def find_depth(path: tuple[str, ...], param: ParamSpec) -> int:
    """Return the stacked axes of a matrix; -1 for a norm or a bias, which is not factored."""
    is_matrix = param.n_in > 0 or "vocab" in param.axes
    return param.n_stacked if is_matrix else -1


def map_stacked(rms: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return optax's scale_by_factored_rms of weights with one more stacked axis, one by one.

    It factors the two largest axes of an array, and of many layers one of these is the layer's.
    """
    axes = optax.FactoredState(cast(Any, None), 0, 0, 0)  # one count for all
    init = jax.vmap(rms.init, out_axes=axes)
    update = jax.vmap(rms.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    return optax.GradientTransformation(init, update)


def clip_rms(param: ParamSpec, update: jax.Array) -> jax.Array:
    """Return a weight's update, of each layer and expert with a root mean square of at most 1."""
    dims = tuple(range(param.n_stacked, update.ndim))
    mean_square = jnp.mean(update**2, dims, keepdims=True)
    return update / jnp.maximum(jnp.sqrt(mean_square), 1)


# ---- new parameters


def correct_new_bias(
    adam: optax.GradientTransformation, inputs: OptimizerInputs
) -> optax.GradientTransformation:
    """Return Adam whose new parameters correct their bias by their own count.

    Their moments were 0 when the model grew. eps is that of the old count, which matters below
    1e-8.
    """
    if inputs.new_params.rewarm != "new":
        return adam
    b1, b2 = inputs.optim.b1, inputs.optim.b2

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        directions, state = adam.update(updates, state, params)
        count = state.count.astype(jnp.float32)
        own = count_own_updates(inputs)
        nu_ratio = (1 - b2**own) / (1 - b2**count)
        factor = jnp.sqrt(nu_ratio) * (1 - b1**count) / (1 - b1**own)
        return scale_new_params(directions, factor, inputs), state

    return optax.GradientTransformation(adam.init, update)


def warm_up_new_params(inputs: OptimizerInputs) -> optax.GradientTransformation:
    """Return a transformation that warms new parameters up, as the run did its own."""
    if inputs.new_params.rewarm == "none":
        return optax.identity()

    def warm_up(updates: Any, params: Any) -> Any:
        own = count_own_updates(inputs)
        factor = jnp.minimum(own / jnp.maximum(inputs.n_warmup, 1), 1)
        return scale_new_params(updates, factor, inputs)

    return optax.stateless(warm_up)


def count_own_updates(inputs: OptimizerInputs) -> jax.Array:
    """Return the updates since the model grew, float32."""
    own = inputs.n_updates - inputs.new_params.n_updates
    return own.astype(jnp.float32)


def scale_new_params(updates: Any, factor: jax.Array, inputs: OptimizerInputs) -> Any:
    """Return the updates, those of new parameters times a factor."""
    new_params = inputs.new_params

    def scale(param: ParamSpec, update: jax.Array) -> jax.Array:
        is_new: Any = True
        if new_params.rewarm == "new":
            is_new = new_param_mask(param, new_params.new)
        if is_new is None:
            return update
        scaled = factor.astype(update.dtype) * update
        return jnp.where(is_new, scaled, update)

    return map_with_specs(scale, inputs.specs, updates)


# ---- learning rates by group


def lr_multiplier_tree(optim: OptimConfig, spec: ModelSpec, new_params: NewParams) -> Params | None:
    """Return each weight's multiplier of the learning rate, broadcastable to it. Use under jit.

    Returns:
        None without optim.lr_multipliers.

    Raises:
        UserError: this model has no such group.
    """
    if not optim.lr_multipliers:
        return None
    specs = transformer.trained_param_specs(spec)
    names = {path[-1] for path, _ in list_param_specs(specs)}
    has_new = any(flags.any() for flags in new_params.new.values())
    for group, _ in optim.lr_multipliers:
        if group in ("old", "new"):
            check_has_new(group, has_new)
        elif group not in names:
            parse_layer_group(group, spec)

    def multiply(path: tuple[str, ...], param: ParamSpec) -> jax.Array:
        result = jnp.float32(1)
        for group, multiplier in optim.lr_multipliers:
            if group in ("old", "new"):
                is_new = new_param_mask(param, new_params.new)
                if is_new is None:
                    is_new = jnp.bool_(False)
                is_member = is_new if group == "new" else ~is_new
                result *= jnp.where(is_member, multiplier, 1)
            elif group in names:
                is_member = path[-1] == group
                result *= multiplier if is_member else 1
            elif param.is_layered:
                is_member = layer_group_mask(group, spec, len(param.shape))
                result *= jnp.where(is_member, multiplier, 1)
        return result

    return map_param_specs(multiply, specs)


def check_lr_multipliers(optim: OptimConfig, opt_state: Any) -> None:
    """Raise UserError if the optimizer's state holds iterates, which no multiplier reaches.

    Multipliers apply to the updates of the parameters; an iterate moves inside the transformation.
    """
    if not optim.lr_multipliers:
        return
    fields: set[str] = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(opt_state):
        fields |= {part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)}
    iterates = ", ".join(sorted(fields & ITERATES))
    if iterates:
        raise UserError(
            f"optim.lr_multipliers: expected an optimizer that moves the parameters alone, got "
            f"optim.name={optim.name}, which keeps them at another point too ({iterates}) and "
            "moves that one at the full rate. Leave the multipliers out, or use adamw or muon."
        )


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
