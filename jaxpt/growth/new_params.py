"""Find which parts of a child are new."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.growth.growth import NO_SOURCE, AxisFlags, Growth
from jaxpt.model.param import ParamSpec


def find_new_params(growth: Growth, before: AxisFlags | None = None) -> AxisFlags:
    """Return flags of the child's indices that have no source, or whose source occurred before.

    Args:
        growth: what became of the parent.
        before: flags of the parent, from an earlier operator of the same growth. An index made
            from a new one is new as well.
    """
    before = before or {}
    flags = {axis: old for axis, old in before.items() if axis not in growth.sources}
    for axis, source in growth.sources.items():
        if source.ndim == 2:  # chosen, not copied
            continue
        _, first_index = np.unique(source, return_index=True)
        is_new = np.ones(len(source), bool)
        is_new[first_index] = False
        is_new |= source == NO_SOURCE
        if axis in before:
            was_new = before[axis]
            is_new |= was_new[np.maximum(source, 0)]
        flags[axis] = is_new
    return flags


def find_new_params_through(growths: Iterable[Growth]) -> AxisFlags:
    """Return flags of what several operators in a row added."""
    flags: AxisFlags = {}
    for growth in growths:
        flags = find_new_params(growth, flags)
    return flags


def new_param_mask(param: ParamSpec, flags: AxisFlags) -> jax.Array | None:
    """Return True where an element is new along any axis; None if the weight has nothing new.

    Use it under jit, where the whole mask never exists.

    Returns:
        bool, of the weight's rank, 1 along axes without new parts.
    """
    mask = None
    for i, axis in enumerate(param.axes):
        is_new = flags.get(source_axis(axis))
        if is_new is None or not is_new.any():
            continue
        shape = [1] * len(param.axes)
        shape[i] = -1
        along_axis = jnp.asarray(is_new.reshape(shape))
        if mask is not None:
            along_axis = mask | along_axis
        mask = along_axis
    return mask


def source_axis(axis: str) -> str:
    """Return the axis whose sources a weight's axis follows: a norm's are the embedding's."""
    return "embed" if axis == "norm" else axis
