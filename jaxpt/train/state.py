"""TrainState: everything that a step changes, as plain pytrees; described first, then born sharded."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.config import Config
from jaxpt.model import llama
from jaxpt.sharding import make_replicated_sharding
from jaxpt.spec import ModelSpec
from jaxpt.train import optimizer
from jaxpt.train.optimizer import NewParams
from jaxpt.weights import checkpoint, growth


class TrainState(NamedTuple):
    step: Any  # int32 scalar: updates done or skipped
    params: Any  # nested dict of weights, see model/llama.py
    opt_state: Any  # the optax chain's state
    skip_state: Any  # {"norm_mean": running mean of gradient norms, "n_skipped": in all, "n_in_a_row": lately}


def make_abstract_state(spec: ModelSpec, settings: Config, mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: nothing is allocated. Moments lie where their weights lie."""
    params = llama.make_abstract_params(spec, mesh, jnp.dtype(settings.initialize.param_dtype))
    whole = make_replicated_sharding(mesh)
    stored = {
        jax.tree_util.keystr(path): leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def placed(path, leaf):
        """A moment's path ends in that of its weight, by names; what has none (a count) is whole everywhere."""
        names = jax.tree_util.keystr(
            tuple(part for part in path if isinstance(part, jax.tree_util.DictKey))
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=stored.get(names, whole))

    opt = jax.tree_util.tree_map_with_path(
        placed, jax.eval_shape(optimizer.make_optimizer(settings.optim, spec).init, params)
    )
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)  # noqa: E731
    guard = {
        "norm_mean": scalar(jnp.float32),
        "n_skipped": scalar(jnp.int32),
        "n_in_a_row": scalar(jnp.int32),
    }
    return TrainState(scalar(jnp.int32), params, opt, guard)


def state_shardings(state: TrainState) -> TrainState:
    """Of an abstract or living state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(params, spec: ModelSpec, settings: Config, mesh) -> TrainState:
    """A fresh state around given parameters: step 0, zero moments. The parameters are taken over, not copied."""
    goal = state_shardings(make_abstract_state(spec, settings, mesh))

    def rest(params):
        guard = {"norm_mean": jnp.float32(0), "n_skipped": jnp.int32(0), "n_in_a_row": jnp.int32(0)}
        return jnp.int32(0), optimizer.make_optimizer(settings.optim, spec).init(params), guard

    step, opt, guard = jax.jit(rest, out_shardings=(goal.step, goal.opt_state, goal.skip_state))(
        params
    )
    return TrainState(step, params, opt, guard)


def restore_state(directory: pathlib.Path, params, goal: TrainState) -> TrainState:
    """The state of a checkpoint around its parameters, which are there already (grown ones, perhaps); `goal`: abstract_state of what is stored."""
    rest = checkpoint.restore_tree(
        directory, "rest", {"step": goal.step, "opt": goal.opt_state, "guard": goal.skip_state}
    )
    return TrainState(rest["step"], params, rest["opt"], rest["guard"])


def grow_state(
    opt: Any, guard: Any, grew: growth.Growth, policy: str, mesh, before: NewParams = NewParams()
) -> tuple[Any, Any, NewParams]:
    """(opt, guard, what is new) of the child under a schedule that goes on: Adam's moments by `policy` (see growth.moments),
    or by the operator's own.

    The count goes on, but for fresh, where it begins again. The running gradient norm is forgotten: a larger model's is another.
    before  what earlier operators of the same growth made new
    """
    policy = grew.moments or policy
    count = next(int(part.count) for part in opt if isinstance(part, optax.ScaleByAdamState))

    def carried(part):
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        mean, square = (
            growth.grow_moments(grew, moment, policy, power, mesh)
            for power, moment in ((1, part.mu), (2, part.nu))
        )
        return optax.ScaleByAdamState(
            part.count * 0 if policy == "fresh" else part.count, mean, square
        )

    rewarm = {"fresh": "all", "reset_new": "new"}.get(policy, "none")
    young = NewParams(
        growth.find_new_params(grew, before.new), 0 if policy == "fresh" else count, rewarm
    )
    guard = {**guard, "norm_mean": guard["norm_mean"] * 0, "n_in_a_row": guard["n_in_a_row"] * 0}
    return tuple(carried(part) for part in opt), guard, young
