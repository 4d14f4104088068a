"""What a growth writes to growth.json, and a checkpoint of what it added."""

from __future__ import annotations

import dataclasses

from jaxpt.spec import ModelSpec, Record

Measured = int | list[int] | list[float]


@dataclasses.dataclass(frozen=True)
class LayerRecord(Record):
    """Statistics of one layer over held-out tokens."""

    rms: float  # root mean square of the residual stream after the layer
    influence: float  # 1 - cosine between the residual before and after; 0: it does nothing


@dataclasses.dataclass(frozen=True)
class CopySimilarity(Record):
    """How alike two neighboring copies of one layer still are."""

    source: int  # the parent's layer
    layers: tuple[int, int]  # of the child
    cosine: float  # mean over tokens, between what the two add to the residual


@dataclasses.dataclass(frozen=True)
class ProbeRecord(Record):
    """Held-out losses after a short training of parent and child."""

    n_steps: int
    n_sequences: int  # per source, at most: fewer than behind heldout_loss where time is short
    parent: dict[str, float]  # source -> nats per token
    child: dict[str, float]


@dataclasses.dataclass(frozen=True)
class GrowthReport(Record):
    """The content of growth.json. The keys of figures of both models are "parent" and "child"."""

    parent: str  # where its weights come from
    operators: tuple[str, ...]  # as configured, in order
    at_step: int | None  # of the run that grew; None: before training
    layer_map: tuple[int | None, ...]  # the parent's layer of each child layer; None: no source
    new_layers: tuple[int, ...]  # of the child
    n_params: dict[str, int]
    flops_per_token: dict[str, float]  # forward and backward
    spec: dict[str, ModelSpec]
    heldout_loss: dict[str, dict[str, float]] | None  # model -> source -> nats per token
    heldout_sequences: int | None  # per source, at most, behind heldout_loss
    heldout_seq_len: int | None  # of the parts that they are cut into, which both models read
    preserves_function: bool  # the operators promise it, and it was checked
    max_logit_difference: float | None  # None: not promised
    layers: dict[str, tuple[LayerRecord, ...]] | None  # None: no sequences that both models read
    copy_similarity: tuple[CopySimilarity, ...] | None
    measured: dict[str, Measured]  # what the operators measured and chose
    moments: str | None  # policy for Adam's moments; None: not trained yet
    probe: ProbeRecord | None = None
    verdict: str = ""  # "healthy: ..." and the like, one sentence


@dataclasses.dataclass(frozen=True)
class AxisRanges(Record):
    """The new indices of one logical axis."""

    size: int  # of the axis
    new: tuple[tuple[int, int], ...]  # [start, stop) of each range


@dataclasses.dataclass(frozen=True)
class NewParamsRecord(Record):
    """What the last growth added, by logical axis."""

    axes: dict[str, AxisRanges]  # logical axis -> its new indices
    n_updates: int  # since step 0, without skipped ones, when the model grew
    rewarm: str  # parameters re-warmed from zero moments: "none", "new" or "all"
