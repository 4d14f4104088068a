"""Everything that a train step changes, as plain pytrees: described first, then made sharded."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpt.config import Config
from jaxpt.model import transformer
from jaxpt.sharding import make_replicated_sharding
from jaxpt.spec import ModelSpec
from jaxpt.train import optimizer
from jaxpt.train.optimizer import AdamState, NewParams
from jaxpt.weights import checkpoint, growth
from jaxpt.weights.measure import Params

PathEntries = tuple[Any, ...]


class SkipState(NamedTuple):
    """What decides whether an update is skipped. Scalars.

    Attributes:
        norm_mean: float32, running mean of gradient norms; 0 before the first update.
        n_skipped: int32, since step 0.
        consecutive_skips: int32, up to the last step.
    """

    norm_mean: Any
    n_skipped: Any
    consecutive_skips: Any


class TrainState(NamedTuple):
    """The argument and result of a train step.

    Attributes:
        step: int32 scalar, updates done or skipped.
        params: nested dict of weights, see model/transformer.py.
        opt_state: the optax chain's state.
        skip_state: SkipState.
    """

    step: Any
    params: Any
    opt_state: Any
    skip_state: Any


def make_abstract_state(spec: ModelSpec, settings: Config, mesh: Mesh) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings. A moment is sharded as its weight."""
    dtype = jnp.dtype(settings.initialize.param_dtype)
    params = transformer.make_abstract_params(spec, mesh, dtype)
    replicated = make_replicated_sharding(mesh)
    shardings = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shardings[jax.tree_util.keystr(path)] = leaf.sharding

    def with_sharding(path: PathEntries, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # a moment's path ends in its weight's names; what has none (a count) is replicated
        names = tuple(part for part in path if isinstance(part, jax.tree_util.DictKey))
        name = jax.tree_util.keystr(names)
        sharding = shardings.get(name, replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    tx = optimizer.make_optimizer(settings.optim, spec)
    opt_state = jax.eval_shape(tx.init, params)
    opt_state = jax.tree_util.tree_map_with_path(with_sharding, opt_state)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    skip_state = SkipState(norm, count, count)
    return TrainState(count, params, opt_state, skip_state)


def state_shardings(state: TrainState) -> TrainState:
    """Return the shardings of an abstract or concrete state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(params: Params, spec: ModelSpec, settings: Config, mesh: Mesh) -> TrainState:
    """Return a state at step 0 with zero moments. The parameters are taken over, not copied."""
    target = state_shardings(make_abstract_state(spec, settings, mesh))
    tx = optimizer.make_optimizer(settings.optim, spec)

    def make_rest(params: Params) -> tuple[Any, Any, SkipState]:
        zero = jnp.int32(0)
        skip_state = SkipState(jnp.float32(0), zero, zero)
        return zero, tx.init(params), skip_state

    shardings = (target.step, target.opt_state, target.skip_state)
    make = jax.jit(make_rest, out_shardings=shardings)
    step, opt_state, skip_state = make(params)
    return TrainState(step, params, opt_state, skip_state)


def rest_of_state(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint stores beside the parameters."""
    rest = state._asdict()
    del rest["params"]
    return rest


def restore_state(directory: pathlib.Path, params: Params, abstract: TrainState) -> TrainState:
    """Return a checkpoint's state around parameters that are already loaded, and perhaps grown.

    Args:
        directory: the checkpoint.
        params: the parameters.
        abstract: `make_abstract_state` of what is stored.
    """
    rest = checkpoint.restore_tree(directory, checkpoint.TRAIN_STATE, rest_of_state(abstract))
    return TrainState(params=params, **rest)


class GrownState(NamedTuple):
    """The parts of a grown state beside step and parameters."""

    opt_state: Any
    skip_state: SkipState
    new_params: NewParams


def grow_state(
    opt_state: Any,
    skip_state: SkipState,
    grown: growth.Growth,
    policy: str,
    mesh: Mesh,
    before: NewParams = NewParams(),
) -> GrownState:
    """Return the child's optimizer state under a schedule that continues.

    Adam's count continues as well, except under "fresh". The running mean of gradient norms is
    reset: a larger model has other norms.

    Args:
        opt_state: the parent's.
        skip_state: the parent's.
        grown: the growth.
        policy: for Adam's moments, see `growth.grow_moments`; the operator's own one wins.
        mesh: of both.
        before: what earlier operators of the same growth added.
    """
    policy = grown.moments or policy
    is_fresh = policy == "fresh"
    adam = next(part for part in opt_state if isinstance(part, AdamState))
    adam_count = adam.count * 0 if is_fresh else adam.count
    mu = growth.grow_moments(grown, adam.mu, policy, 1, mesh)
    nu = growth.grow_moments(grown, adam.nu, policy, 2, mesh)
    grown_adam = AdamState(adam_count, mu, nu)
    opt_state = tuple(grown_adam if part is adam else part for part in opt_state)
    rewarm = {"fresh": "all", "reset_new": "new"}.get(policy, "none")
    flags = growth.find_new_params(grown, before.new)
    new_params = NewParams(flags, int(adam_count), rewarm)
    norm_mean = skip_state.norm_mean * 0
    n_skips = skip_state.consecutive_skips * 0
    skip_state = skip_state._replace(norm_mean=norm_mean, consecutive_skips=n_skips)
    return GrownState(opt_state, skip_state, new_params)
