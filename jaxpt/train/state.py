"""TrainState: everything that a step changes, as plain pytrees; described first, then born sharded."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpt.config import Config
from jaxpt.model import llama
from jaxpt.sharding import replicated
from jaxpt.spec import ModelSpec
from jaxpt.train import optimizer


class TrainState(NamedTuple):
    step: Any  # int32 scalar: updates done or skipped
    params: Any  # nested dict of weights, see model/llama.py
    opt: Any  # the optax chain's state
    guard: Any  # {"norm_mean": running mean of gradient norms, "n_skipped": in all, "n_in_a_row": lately}


def abstract_state(spec: ModelSpec, settings: Config, mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: nothing is allocated. Moments lie where their weights lie."""
    params = llama.abstract_params(spec, mesh, jnp.dtype(settings.initialize.dtype))
    whole = replicated(mesh)
    tx = optimizer.build(settings.optim)
    opt = optax.tree.map_params(
        tx,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)  # noqa: E731
    guard = {"norm_mean": scalar(jnp.float32), "n_skipped": scalar(jnp.int32), "n_in_a_row": scalar(jnp.int32)}
    return TrainState(scalar(jnp.int32), params, opt, guard)


def shardings(state: TrainState) -> TrainState:
    """Of an abstract or living state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def born(params, spec: ModelSpec, settings: Config, mesh) -> TrainState:
    """A fresh state around given parameters: step 0, zero moments. The parameters are taken over, not copied."""
    goal = shardings(abstract_state(spec, settings, mesh))

    def rest(params):
        guard = {"norm_mean": jnp.float32(0), "n_skipped": jnp.int32(0), "n_in_a_row": jnp.int32(0)}
        return jnp.int32(0), optimizer.build(settings.optim).init(params), guard

    step, opt, guard = jax.jit(rest, out_shardings=(goal.step, goal.opt, goal.guard))(params)
    return TrainState(step, params, opt, guard)
