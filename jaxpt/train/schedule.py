"""The learning rate and the averaging window of each step of a run.

A step reads them as inputs of its compiled program, so that runs which differ in their rates or in
their number of steps are compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.config import OptimConfig, TrainConfig
from jaxpt.spec import UserError
from jaxpt.train import shapes


def count_warmup_steps(optim: OptimConfig, steps: int) -> int:
    """Return the steps of the warm-up of a run: a share of its steps, never all of them."""
    return min(round(optim.warmup_frac * steps), steps - 1)


def find_constant_phase(optim: OptimConfig, steps: int) -> range:
    """Return the updates between warm-up and decay, counted from 1."""
    warmup = count_warmup_steps(optim, steps)
    decay_start = warmup
    if optim.schedule == "wsd":
        decay_steps = max(round(steps * optim.decay_frac), 1)
        decay_start = max(steps - decay_steps, warmup)
    elif optim.schedule == "constant":
        decay_start = steps
    return range(warmup + 1, decay_start + 1)


def find_average_window(optim: OptimConfig, n_steps: int) -> range:
    """Return the updates, counted from 1, after which the weights join the average, if any.

    Raises:
        UserError: the schedule has no constant phase of so many steps.
    """
    if not optim.average:
        return range(0)
    phase = find_constant_phase(optim, n_steps)
    n = len(phase) if is_moving(optim) else int(optim.average)
    if not 0 < n <= len(phase):
        raise UserError(
            f"optim.average: expected at most {len(phase)}, the steps at the constant rate of this "
            f"schedule ({optim.schedule}, {n_steps:,} steps), got {optim.average:g}. Set fewer, or "
            "optim.schedule=wsd."
        )
    return phase[-n:]


def is_moving(optim: OptimConfig) -> bool:
    """Return whether the average is an exponential moving one."""
    return optim.average < 1


class Schedule(NamedTuple):
    """What a step reads of its run's schedule. Steps are int32, the rest float32 scalars.

    Attributes:
        n_steps: of the run.
        n_warmup: steps of the warm-up.
        decay_start: steps before the decay.
        n_decay: steps of the decay.
        peak_lr: the highest learning rate.
        end: the last one, as a share of it.
        above_end: 1 - end.
        average_start: the first update, counted from 1, whose weights optim.average takes.
        average_stop: the first one after those.
    """

    n_steps: Any
    n_warmup: Any
    decay_start: Any
    n_decay: Any
    peak_lr: Any
    end: Any
    above_end: Any
    average_start: Any
    average_stop: Any


def make_schedule(optim: OptimConfig, steps: int) -> Schedule:
    """Return the schedule of a run of so many steps, as numpy scalars."""
    decay_start = find_constant_phase(optim, steps).stop - 1
    window = find_average_window(optim, steps)
    counts = steps, count_warmup_steps(optim, steps), decay_start, max(steps - decay_start, 1)
    rates = optim.peak_lr, optim.end_lr_frac, 1 - optim.end_lr_frac
    return Schedule(
        *map(np.int32, counts), *map(np.float32, rates), *map(np.int32, (window.start, window.stop))
    )


def compute_lr(
    schedule: Schedule, n_updates: Any, optim: OptimConfig, train: TrainConfig
) -> jax.Array:
    """Return the learning rate after so many updates: 0 for the first one.

    Updates count from 1, as in torchtitan ("0-indexed step, hence + 1 adjustments",
    components/lr_scheduler.py) and in the formula of 2405.18392: update n of a warm-up of N has
    peak_lr x n / N, so that the first one moves the weights and the last one has peak_lr. Then wsd
    stays and falls linearly over the last decay_frac of the steps, cosine and linear fall all the
    way. The last update has peak_lr x end_lr_frac. train.shape_schedule multiplies it by factors
    of its own, see optim.batch_power.
    """
    n = n_updates + 1
    rise = jnp.minimum(n / jnp.maximum(schedule.n_warmup, 1), 1.0)
    progress = (n - schedule.decay_start) / schedule.n_decay
    progress = jnp.clip(progress, 0.0, 1.0)
    fall = 1 - progress
    if optim.schedule == "cosine":
        fall = (1 + jnp.cos(jnp.pi * progress)) / 2
    factor: Any = 1.0
    for start, of_shape in shapes.list_rate_factors(train, optim.batch_power):
        factor = jnp.where(n_updates >= start, of_shape, factor)
    return factor * schedule.peak_lr * rise * (schedule.end + schedule.above_end * fall)


def make_lr_schedule(optim: OptimConfig, train: TrainConfig) -> Callable[[Any], jax.Array]:
    """Return `compute_lr` as a function of the updates done before."""
    schedule = make_schedule(optim, train.steps)
    return lambda n_updates: compute_lr(schedule, n_updates, optim, train)
