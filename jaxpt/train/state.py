"""Everything that a train step changes, as plain pytrees: described first, then made sharded."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpt import io
from jaxpt.config import OptimConfig
from jaxpt.growth.growth import Growth
from jaxpt.growth.moments import PathEntries, find_sharded, grow_all_moments
from jaxpt.growth.new_params import NewParams, find_new_params
from jaxpt.model import transformer
from jaxpt.model.param import subtree_like
from jaxpt.model.transformer import Params
from jaxpt.sharding import fit_sharding, make_replicated_sharding
from jaxpt.spec import ModelSpec
from jaxpt.stage import read_manifest
from jaxpt.train import optimizer
from jaxpt.train.average import Average, init_average, make_abstract_average
from jaxpt.train.low_precision import pack_state, unpack_state
from jaxpt.train.records import AverageRecord, CheckpointRecord
from jaxpt.weights import checkpoint

log = logging.getLogger(__name__)


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
        average: of the weights; None without optim.average.
    """

    step: Any
    params: Any
    opt_state: Any
    skip_state: Any
    average: Any = None


def make_abstract_state(
    spec: ModelSpec, optim: OptimConfig, mesh: Mesh, param_dtype: Any = "float32"
) -> TrainState:
    """Return the state as ShapeDtypeStructs with shardings. A moment is sharded as its weight."""
    params = transformer.make_abstract_params(spec, mesh, jnp.dtype(param_dtype))
    opt_state = make_abstract_opt_state(spec, optim, params, mesh)
    replicated = make_replicated_sharding(mesh)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    skip_state = SkipState(norm, count, count)
    average = make_abstract_average(optim, select_trained(spec, params), count)
    return TrainState(count, params, opt_state, skip_state, average)


def make_abstract_opt_state(spec: ModelSpec, optim: OptimConfig, params: Params, mesh: Mesh) -> Any:
    """Return the optimizer's state as ShapeDtypeStructs with shardings.

    Args:
        spec: the architecture.
        optim: the optimizer.
        params: as ShapeDtypeStructs with shardings.
        mesh: of both.
    """
    replicated = make_replicated_sharding(mesh)
    weights = dict(jax.tree_util.tree_leaves_with_path(params))

    def with_sharding(path: PathEntries, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        weight = find_sharded(path, leaf, weights)
        sharding = replicated
        if weight:
            sharding = fit_sharding(weights[weight].sharding, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    tx = optimizer.make_optimizer(optim, spec)
    opt_state = jax.eval_shape(tx.init, select_trained(spec, params))
    return jax.tree_util.tree_map_with_path(with_sharding, opt_state)


def select_trained(spec: ModelSpec, params: Params) -> Params:
    """Return the parameters that a run trains: all, or a model's adapters alone."""
    return subtree_like(transformer.trained_param_specs(spec), params)


def state_shardings(state: TrainState) -> TrainState:
    """Return the shardings of an abstract or concrete state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def init_state(params: Params, spec: ModelSpec, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """Return a state at step 0 with zero moments. The parameters are taken over, not copied."""
    abstract = make_abstract_state(spec, optim, mesh)
    target = state_shardings(abstract)
    tx = optimizer.make_optimizer(optim, spec)

    def make_rest(params: Params) -> tuple[Any, Any, SkipState]:
        zero = jnp.int32(0)
        skip_state = SkipState(jnp.float32(0), zero, zero)
        return zero, tx.init(select_trained(spec, params)), skip_state

    shardings = (target.step, target.opt_state, target.skip_state)
    make = jax.jit(make_rest, out_shardings=shardings)
    step, opt_state, skip_state = make(params)
    return TrainState(step, params, opt_state, skip_state, init_average(abstract.average))


def rest_of_state(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint stores beside the parameters and their average."""
    rest = state._asdict()
    del rest["params"], rest["average"]
    return rest


def restore_state(
    directory: io.Path,
    params: Params,
    abstract: TrainState,
    average: AverageRecord | None = None,
) -> TrainState:
    """Return a checkpoint's state around parameters that are already loaded, and perhaps grown.

    Args:
        directory: the checkpoint.
        params: the parameters.
        abstract: `make_abstract_state` of what is stored.
        average: what an average is to be of.
    """
    rest = checkpoint.restore_tree(directory, checkpoint.TRAIN_STATE, rest_of_state(abstract))
    restored = restore_average(directory, abstract.average, average)
    return TrainState(params=params, average=restored, **rest)


def restore_average(
    directory: io.Path, abstract: Average | None, expected: AverageRecord | None
) -> Average | None:
    """Return a checkpoint's average; one of no weights yet unless it is of the same updates.

    Another number of steps moves them, and weights from before are then no part of the mean.
    """
    if abstract is None:
        return None
    record = CheckpointRecord.from_json(read_manifest(directory).counts, str(directory))
    if record.average == expected:
        return checkpoint.restore_tree(directory, checkpoint.AVERAGE, abstract)
    if record.average:
        log.warning(f"optim.average: {directory} averages other updates; the average begins anew")
    return init_average(abstract)


class GrownState(NamedTuple):
    """The parts of a grown state beside step and parameters."""

    opt_state: Any
    skip_state: SkipState
    new_params: NewParams


def grow_state(
    state: TrainState,
    grown: Growth,
    optim: OptimConfig,
    policy: str,
    mesh: Mesh,
    before: NewParams = NewParams(),
) -> GrownState:
    """Return what the child's state has beside step and parameters; the schedule continues.

    The running mean of gradient norms is reset: a larger model has other norms.

    Args:
        state: the parent's; its parameters are not read.
        grown: the growth.
        optim: the optimizer.
        policy: for moments, see `grow_moments`; the operator's own one wins.
        mesh: of both.
        before: what earlier operators of the same growth added.
    """
    policy = grown.moments or policy
    dtype = jax.tree.leaves(state.params)[0].dtype
    params = transformer.make_abstract_params(grown.child, mesh, dtype)
    opt_state = grow_opt_state(state.opt_state, grown, optim, policy, params, mesh)
    rewarm = {"fresh": "all", "reset_new": "new"}.get(policy, "none")
    flags = find_new_params(grown, before.new)
    skips = state.skip_state
    n_updates = int(state.step - skips.n_skipped)
    new_params = NewParams(flags, n_updates, rewarm)
    norm_mean = skips.norm_mean * 0
    n_skips = skips.consecutive_skips * 0
    skips = skips._replace(norm_mean=norm_mean, consecutive_skips=n_skips)
    return GrownState(opt_state, skips, new_params)


def grow_opt_state(
    opt_state: Any,
    grown: Growth,
    optim: OptimConfig,
    policy: str,
    params: Params,
    mesh: Mesh,
) -> Any:
    """Return the child's optimizer state, whatever the optimizer.

    Moments grow with their weights, packed ones in float32. The rest is kept where its shape is
    (counts), unless the policy is "fresh"; what cannot be kept is initialized again.

    Args:
        opt_state: the parent's.
        grown: the growth.
        optim: the optimizer.
        policy: for moments.
        params: the child's, as ShapeDtypeStructs with shardings.
        mesh: of both.
    """
    whole = dataclasses.replace(optim, moment_dtype="params")
    found = dict(jax.tree_util.tree_leaves_with_path(unpack_state(opt_state)))
    moments = grow_all_moments(found, grown, policy, mesh)
    found = moments if policy == "fresh" else {**found, **moments}
    goal = make_abstract_opt_state(grown.child, whole, params, mesh)
    goal_leaves, structure = jax.tree.flatten(goal)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(goal)]
    missing = {}
    for path, leaf in zip(paths, goal_leaves, strict=True):
        if path not in found or found[path].shape != leaf.shape:
            missing[path] = leaf
    if missing and policy != "fresh":
        names = ", ".join(map(jax.tree_util.keystr, missing))
        log.info(f"growth: optimizer state of the parent's shape, initialized again: {names}")

    def init_missing() -> list[jax.Array]:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
        initial = optimizer.make_optimizer(whole, grown.child).init(zeros)
        leaves = dict(jax.tree_util.tree_leaves_with_path(initial))
        return [leaves[path] for path in missing]

    shardings = [leaf.sharding for leaf in missing.values()]
    initial = jax.jit(init_missing, out_shardings=shardings)()
    found = {**found, **dict(zip(missing, initial, strict=True))}
    child = jax.tree.unflatten(structure, [found[path] for path in paths])
    if optim.moment_dtype == "params":
        return child
    goal = make_abstract_opt_state(grown.child, optim, params, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, goal)

    def pack(child: Any) -> Any:
        return pack_state(child, params, optim.moment_dtype, 0)

    return jax.jit(pack, out_shardings=shardings)(child)
