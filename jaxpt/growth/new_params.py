"""What the last growth added: which parts of a child are new, and how they learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpt.growth.growth import NO_SOURCE, AxisFlags, Growth
from jaxpt.growth.records import AxisRanges, NewParamsRecord
from jaxpt.model import transformer
from jaxpt.model.param import ParamSpec, list_param_specs


class NewParams(NamedTuple):
    """What the last growth added, and how it learns.

    Attributes:
        new: logical axis -> bool array, True where an index is new; see `find_new_params`.
        n_updates: updates since step 0, without skipped ones, when the model grew.
        rewarm: parameters that started from zero moments under a schedule that continues, and
            warm up over as many updates as the run: "none", "new" or "all".
    """

    new: AxisFlags = {}
    n_updates: int = 0
    rewarm: str = "none"

    def to_record(self) -> NewParamsRecord:
        """Return the record for a checkpoint."""
        axes = {}
        for axis, flags in self.new.items():
            axes[axis] = flags_to_ranges(flags)
        return NewParamsRecord(axes, self.n_updates, self.rewarm)

    @classmethod
    def from_record(cls, record: NewParamsRecord) -> NewParams:
        """Return what `to_record` recorded."""
        new = {}
        for axis, ranges in record.axes.items():
            new[axis] = ranges_to_flags(ranges)
        return cls(new, record.n_updates, record.rewarm)


def find_new_params(growth: Growth, before: AxisFlags | None = None) -> AxisFlags:
    """Return flags of the child's indices that have no source, or whose source occurred before.

    Along an axis that the parent lacks, as a dense model lacks experts, every index is new.

    Args:
        growth: what became of the parent.
        before: flags of the parent, from an earlier operator of the same growth. An index made
            from a new one is new as well.
    """
    before = before or {}
    parent_axes = {
        axis
        for _, param in list_param_specs(transformer.param_specs(growth.spec))
        for axis in param.axes
    }
    flags = {axis: old for axis, old in before.items() if axis not in growth.sources}
    for axis, source in growth.sources.items():
        if source.ndim == 2:  # chosen, not copied
            continue
        _, first_index = np.unique(source, return_index=True)
        is_new = np.ones(len(source), bool)
        is_new[first_index] = False
        is_new |= (source == NO_SOURCE) | (axis not in parent_axes)
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
    return {"norm": "embed", "scores": "experts"}.get(axis, axis)


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
