"""The optimizer: AdamW or Muon as an optax chain, decay by name, rates by group and age, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from jaxpt.config import OptimConfig
from jaxpt.model import llama
from jaxpt.spec import ModelSpec, UserError
from jaxpt.weights import growth

# By name: "decay what has two dimensions" would decay stacked norm scales, which are [L, D].
DECAYED_PARAMS = frozenset({"q", "k", "v", "o", "gate", "up", "down", "unembed"})
# What Muon orthogonalizes, layer by layer, and which axes of a stacked weight are inputs and outputs of its matrix. Embedding, head,
# norms and biases stay with Adam (kellerjordan.github.io/posts/muon).
MATRIX_DIMS = {
    **dict.fromkeys(("q", "k", "v"), MuonDimensionNumbers(1, (2, 3))),
    "o": MuonDimensionNumbers((1, 2), 3),
    **dict.fromkeys(("gate", "up", "down"), MuonDimensionNumbers(1, 2)),
}


class NewParams(NamedTuple):
    """What the last growth made new, and how it learns.

    new      {logical axis: True where an index is new}, see growth.young
    updates  Adam's count when the model grew
    rewarm   what starts from zero moments under a schedule that goes on, and rises over optim.warmup_steps: none, new, all
    """

    new: dict[str, np.ndarray] = {}  # noqa: RUF012  (never changed)
    adam_count: int = 0
    rewarm: str = "none"

    def to_json(self) -> dict[str, Any]:
        return {
            "new": growth.flags_to_ranges(self.new),
            "updates": self.adam_count,
            "rewarm": self.rewarm,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> NewParams:
        return cls(growth.ranges_to_flags(found["new"]), found["updates"], found["rewarm"])


def make_optimizer(
    optim: OptimConfig, spec: ModelSpec, young: NewParams = NewParams()
) -> optax.GradientTransformation:
    """Gradients -> update directions; the step multiplies them by -learning_rate(step) and the group's rate.

    The learning rate stays outside so that it follows the run's step even when an update is skipped.
    """
    adam = scale_by_adam(optim)
    core = split_muon_adam(adam) if optim.name == "muon" else adam
    return optax.chain(
        core if young.rewarm == "none" else rewarm_new_params(core, optim, spec, young),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask)
        if optim.weight_decay
        else optax.identity(),
    )


def scale_by_adam(optim: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """optax's, with gradients that are taken `scale` times, and moments that stay where a step is not `good`.

    Bound by memory where a step has few tokens: each moment is read by one loop that writes it in place, and directions are
    read from the new ones (the barrier). optax's form makes XLA copy both moments first, as three loops read the old ones.
    """
    b1, b2, eps = optim.b1, optim.b2, optim.eps

    def update(grads, state, params=None, *, scale, good):
        count = state.count + good
        mu = jax.tree.map(
            lambda g, m: jnp.where(good, (1 - b1) * (scale * g) + b1 * m, m).astype(m.dtype),
            grads,
            state.mu,
        )
        nu = jax.tree.map(
            lambda g, n: jnp.where(good, (1 - b2) * (scale * g) ** 2 + b2 * n, n).astype(n.dtype),
            grads,
            state.nu,
        )
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        by = [(1 / (1 - b**count)).astype(jnp.float32) for b in (b1, b2)]
        directions = jax.tree.map(lambda m, n: (by[0] * m) / (jnp.sqrt(by[1] * n) + eps), mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def split_muon_adam(
    adam: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Muon on the MATRICES of each layer, adam on the rest; the state is Adam's, whose nu holds the rest alone.

    Directions are brought to the size of Adam's (RMS 0.2), so that learning rate and decay mean what they mean there.
    Source: optax.contrib; Moonlight, 2502.16982, for the size.
    """

    def of(path) -> bool:
        return path[-1].key in MATRIX_DIMS

    def sizes(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRIX_DIMS[path[-1].key], tree)

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=sizes)

    def as_large_as_adams(path, direction):
        fans = (
            [direction.shape[i] for i in np.atleast_1d(axes)] for axes in MATRIX_DIMS[path[-1].key]
        )
        return 0.2 * max(map(math.prod, fans)) ** 0.5 * direction

    def init(params):
        _, rest = split_tree(params, of)
        state = adam.init(params)
        return state._replace(nu=adam.init(rest).nu)

    def update(grads, state, params=None, *, scale, good):
        (matrices, rest), (momenta, means) = split_tree(grads, of), split_tree(state.mu, of)
        ours = muon.init(momenta)._replace(count=state.count, mu=momenta)
        orthogonal, ours = muon.update(jax.tree.map(lambda g: scale * g, matrices), ours)
        momenta = jax.tree.map(lambda new, old: jnp.where(good, new, old), ours.mu, momenta)
        orthogonal = jax.tree_util.tree_map_with_path(as_large_as_adams, orthogonal)
        directions, theirs = adam.update(rest, state._replace(mu=means), scale=scale, good=good)
        return merge_trees(orthogonal, directions), theirs._replace(
            mu=merge_trees(momenta, theirs.mu)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def split_tree(
    tree: dict[str, Any], chosen: Callable[[tuple], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves whose path is chosen, the others), each a nested dict that holds only those."""
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        inner = parts[0 if chosen(path) else 1]
        for part in path[:-1]:
            inner = inner.setdefault(part.key, {})
        inner[path[-1].key] = leaf
    return parts


def merge_trees(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What `parted` took apart."""
    both = {name: merge_trees(a[name], b[name]) for name in a.keys() & b.keys()}
    return {name: both.get(name, a.get(name, b.get(name))) for name in sorted(a.keys() | b.keys())}


def rewarm_new_params(
    adam: optax.GradientTransformationExtraArgs,
    optim: OptimConfig,
    spec: ModelSpec,
    young: NewParams,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose new parts count their own updates: their moments began at 0 when the model grew, so the bias is corrected
    by their own count, and their directions rise over optim.warmup_steps. eps is that of the old count (it matters below 1e-8).
    """

    def update(grads, state, params=None, **how):
        directions, state = adam.update(grads, state, params, **how)
        count, own = (x.astype(jnp.float32) for x in (state.count, state.count - young.adam_count))
        share = (
            jnp.sqrt((1 - optim.b2**own) / (1 - optim.b2**count))
            * (1 - optim.b1**count)
            / (1 - optim.b1**own)
        )
        rise = jnp.minimum(own / max(optim.warmup_steps, 1), 1)

        def one(path, row, direction):
            new = True if young.rewarm == "all" else growth.new_param_mask(row, young.new)
            # an orthogonalized direction has one size whatever its momentum's: there is no bias to correct
            factor = rise if optim.name == "muon" and path[-1].key in MATRIX_DIMS else share * rise
            return (
                direction
                if new is None
                else jnp.where(new, factor.astype(direction.dtype) * direction, direction)
            )

        return jax.tree_util.tree_map_with_path(
            one, llama.param_specs(spec), directions, is_leaf=llama.is_param_spec
        ), state

    return optax.GradientTransformationExtraArgs(adam.init, update)


def lr_multiplier_tree(
    optim: OptimConfig, spec: ModelSpec, young: NewParams
) -> dict[str, Any] | None:
    """Each weight's factor of the learning rate by optim.lr_multipliers, broadcastable to it; None where every factor is 1.

    For use under jit. Raises UserError for a group that this model does not have.
    """
    if not optim.lr_multipliers:
        return None
    names = {
        path[-1].key
        for path, _ in jax.tree_util.tree_leaves_with_path(
            llama.param_specs(spec), is_leaf=llama.is_param_spec
        )
    }

    def one(path, row):
        factor = jnp.float32(1)
        for group, rate in optim.lr_multipliers:
            if group in ("old", "new"):
                new = growth.new_param_mask(row, young.new)
                new = jnp.bool_(False) if new is None else new
                factor *= jnp.where(new if group == "new" else ~new, rate, 1)
            elif group in names:
                factor *= rate if path[-1].key == group else 1
            elif row.axes[0] == "layers":
                first, last = parse_layer_group(group, spec)
                within = np.isin(np.arange(spec.n_layers), np.arange(first, last + 1))
                factor *= jnp.where(within.reshape(-1, *[1] * (len(row.shape) - 1)), rate, 1)
        return factor

    for group, _ in optim.lr_multipliers:
        if group in ("old", "new") and not any(flags.any() for flags in young.new.values()):
            raise UserError(
                f"optim.lr_multipliers: names the group {group}, but nothing in this model is new: it was not grown. Leave it out, or grow first."
            )
        if group not in names | {"old", "new"}:
            parse_layer_group(group, spec)
    return jax.tree_util.tree_map_with_path(
        one, llama.param_specs(spec), is_leaf=llama.is_param_spec
    )


def parse_layer_group(group: str, spec: ModelSpec) -> tuple[int, int]:
    """ "layers 4-7" -> (4, 7)"""
    found = re.fullmatch(r"layers (\d+)-(\d+)", group)
    first, last = map(int, found.groups()) if found else (1, 0)
    if not first <= last < spec.n_layers:
        raise UserError(
            f"optim.lr_multipliers: there is no group {group!r}; wanted old, new, a weight's name such as embed or gate, or 'layers 0-{spec.n_layers - 1}'."
        )
    return first, last


def decay_mask(params):
    """True where a weight is a matrix that decays."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED_PARAMS, params)


def make_lr_schedule(optim: OptimConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of update number `step` (0 for the first).

    Warm-up rises linearly to peak_lr, which the update after it has. Then wsd stays and falls linearly over the last
    decay_frac of the steps (2405.18392), cosine and linear fall all the way, to peak_lr x end_lr_frac at the last step.
    Raises UserError when there is no room for the schedule.
    """
    warmup, end = optim.warmup_steps, optim.end_lr_frac
    if warmup >= steps:
        raise UserError(
            f"optim.warmup_steps: {warmup} steps of warm-up leave nothing of train.steps = {steps}. Use fewer, such as {max(steps // 20, 1)}."
        )
    first = {
        "wsd": steps - max(round(steps * optim.decay_frac), 1),
        "cosine": warmup,
        "linear": warmup,
        "constant": steps,
    }[optim.schedule]
    first = max(first, warmup)

    def at(step):
        rise = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
        passed = jnp.clip((step - first) / max(steps - first, 1), 0.0, 1.0)
        fall = (1 + jnp.cos(jnp.pi * passed)) / 2 if optim.schedule == "cosine" else 1 - passed
        return optim.peak_lr * rise * (end + (1 - end) * fall)

    return at
