"""Average a run's weights on the device, over the constant-rate phase of its schedule.

The average comes near to what a decay of the learning rate would give, without one (2505.12082,
2507.17634). `jaxpt checkpoint average` writes it as a model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.config import OptimConfig
from jaxpt.model.transformer import Params
from jaxpt.train.records import AverageRecord
from jaxpt.train.schedule import find_average_window, is_moving

# The number of weights averaged, and beside it their sum or their moving average, float32, nested
# and sharded as what trains. None in a run that averages nothing.
Average = dict[str, Any]
COUNT, SUM, EMA = "count", "sum", "ema"


def describe_average(optim: OptimConfig, n_steps: int) -> AverageRecord | None:
    """Return what a run's average is of; None without one."""
    window = find_average_window(optim, n_steps)
    return AverageRecord(optim.average, window[0], window[-1]) if window else None


def make_abstract_average(optim: OptimConfig, params: Params, count: Any) -> Average | None:
    """Return the average as ShapeDtypeStructs with shardings.

    Args:
        optim: the knobs.
        params: what trains, as ShapeDtypeStructs with shardings.
        count: an int32 scalar, likewise.
    """
    if not optim.average:
        return None

    def make(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

    return {COUNT: count, EMA if is_moving(optim) else SUM: jax.tree.map(make, params)}


def init_average(abstract: Average | None) -> Average | None:
    """Return an average of no weights yet, given its ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract
    )


def add_weights(
    average: Average | None, params: Params, optim: OptimConfig, takes: jax.Array
) -> Average | None:
    """Return the average after a step, with its weights if it takes them. Use under jit."""
    if average is None:
        return None
    rate = jnp.where(average[COUNT] == 0, 1, 1 - optim.average)  # the first weights as they are

    def add(total: jax.Array, leaf: jax.Array) -> jax.Array:
        return total + jnp.where(takes, leaf.astype(total.dtype), 0)

    def move(mean: jax.Array, leaf: jax.Array) -> jax.Array:
        step = rate * (leaf.astype(mean.dtype) - mean)
        return mean + jnp.where(takes, step, 0)

    name, combine = (EMA, move) if EMA in average else (SUM, add)
    weights = jax.tree.map(combine, average[name], params)
    return {COUNT: average[COUNT] + takes, name: weights}


def read_average(average: Average | None) -> Params | None:
    """Return the averaged weights, float32; None if there are none yet."""
    if average is None or not int(average[COUNT]):
        return None
    if EMA in average:
        return average[EMA]
    divisor = np.float32(int(average[COUNT]))
    return jax.tree.map(lambda total: total / divisor, average[SUM])
