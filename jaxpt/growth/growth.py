"""What an operator is given, and what it makes of it: for each axis of the child, its sources.

An operator says which parent layer, head or channel each of the child's copies. Weights and moments
of the optimizer are then the same gathers (growth/apply.py).
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxpt.growth import vocabulary
from jaxpt.growth.records import Measured
from jaxpt.model.transformer import Params
from jaxpt.spec import Batch, ModelSpec

AxisSources = dict[str, np.ndarray]  # logical axis -> the parent's index of each of the child's
AxisScales = dict[str, np.ndarray]  # logical axis -> factor of each of the child's indices
AxisFlags = dict[str, np.ndarray]  # logical axis -> True where the child's index is new
Path = tuple[str, ...]
ReadBatches = Callable[[], Iterable[Batch]]  # the same at every call

NO_SOURCE = -1  # in AxisSources: randomly initialized, or predicted


class Parent(NamedTuple):
    """What an operator may look at. Most look at the spec alone.

    Without parameters, operators that measure return a Growth that has the right sizes only.
    """

    spec: ModelSpec
    params: Params | None = None
    batches: ReadBatches | None = None  # training data, for those that measure
    tokenizer_dir: pathlib.Path | None = None


class Growth(NamedTuple):
    """What an operator makes of a parent.

    Attributes:
        spec: the parent's.
        child: the child's.
        sources: for the axes that change, NO_SOURCE where there is none. [n], or [L, n] where
            every layer has its own ("heads", "kv_heads" and "mlp" of `narrow`).
        zero_output_layers: the child's layers that write zeros into the residual: they start as
            identity.
        divide_copies: copied inputs are divided by their number of copies, so that sums keep
            their value.
        preserves_function: the child computes the same logits.
        predicted_gaps: i for each predicted layer that stands between the parent's i and i + 1,
            in the order of NO_SOURCE in sources["layers"].
        token_mapping: the new vocabulary as old ids.
        n_shards: parts that the parent's MLP is cut into along its width, as if it had so many
            experts.
        drop_frac: share of each new expert's channels that is redrawn.
        noise_std: standard deviation of the noise on new weights, in those of their initialization.
        seed: of noise and of randomly initialized layers.
        moments: the policy for Adam's moments that the operator needs, whatever the run's is.
        measured: what the operator measured, for the report.
    """

    spec: ModelSpec
    child: ModelSpec
    sources: AxisSources
    zero_output_layers: tuple[int, ...] = ()
    divide_copies: bool = False
    preserves_function: bool = False
    predicted_gaps: tuple[int, ...] = ()
    token_mapping: vocabulary.TokenMapping | None = None
    n_shards: int = 1
    drop_frac: float = 0.0
    noise_std: float = 0.0
    seed: int = 0
    moments: str | None = None
    measured: dict[str, Measured] = {}

    @property
    def layer_map(self) -> list[int | None]:
        """The parent's layer of each of the child's; None: no source."""
        layer_map = []
        for source in self.sources.get("layers", range(self.spec.n_layers)):
            has_source = source != NO_SOURCE
            layer_map.append(int(source) if has_source else None)
        return layer_map

    @property
    def is_identity(self) -> bool:
        """Whether the child is the parent: nothing was added, left out or moved."""
        is_same = self.child == self.spec and not self.token_mapping
        for source in self.sources.values():
            is_same &= bool(np.all(source == np.arange(source.shape[-1])))
        return is_same

    @property
    def group_size(self) -> int:
        """The number of new experts that make up one MLP, each chosen with the others."""
        return len(np.unique(self.sources["experts"])) if self.n_shards > 1 else 1

    @property
    def changes_width(self) -> bool:
        """Whether an axis other than the layers changes."""
        return bool(self.sources.keys() - {"layers"})


def format_layer_map(layer_map: Iterable[int | None]) -> str:
    """Return the sources of layers as text: "0 1 new 2"."""
    names = ["new" if layer is None else str(layer) for layer in layer_map]
    return " ".join(names)
