"""Read other packages' JSON: what the report needs of each file, whatever else the file holds.

Every name of a JSON key stands in this module. A key may be missing where a field has a default.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Self

from jaxpt.report.format import finite_or_none
from jaxpt.spec import Record, UserError, field_names


class View(Record):
    """A record of some keys of a JSON object; other keys are ignored.

    `class X(View, key="field")` names the field that a key of the file fills, where they differ.
    """

    keys: ClassVar[dict[str, str]]

    def __init_subclass__(cls, **keys: str):
        """Note which keys differ from their fields."""
        cls.keys = keys

    @classmethod
    def from_json(cls, fields: Any, where: str = "") -> Self:
        """Build the view. Raise UserError if a key is missing or a value has another type."""
        if isinstance(fields, dict):
            names = field_names(cls)
            renamed = {cls.keys.get(key, key): value for key, value in fields.items()}
            fields = {key: value for key, value in renamed.items() if key in names}
        return super().from_json(fields, where)


# ---- manifest.json, spec.json, starts.jsonl, spent.json


@dataclasses.dataclass(frozen=True)
class StageSummary(View):
    """manifest.json of a finished stage."""

    stage: str = ""
    fingerprint: str = ""
    created: str = ""  # ISO 8601, UTC
    seconds: float | None = None
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PackedSource(View, rows="n_sequences", tokens="n_tokens"):
    """Packed sequences of one source."""

    n_sequences: int
    n_tokens: int
    unigram_nats: float | None = None  # entropy of the tokens' frequencies, nats per token


@dataclasses.dataclass(frozen=True)
class PackedCounts(View):
    """Counts of packed/manifest.json, by source."""

    seq_len: int
    train: dict[str, PackedSource]
    heldout: dict[str, PackedSource]


@dataclasses.dataclass(frozen=True)
class Sizes(View):
    """Sizes of a model, from spec.json."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    n_experts: int = 0
    n_experts_per_token: int = 0
    d_shared: int = 0


@dataclasses.dataclass(frozen=True)
class RunStart(View):
    """A start of a run: what ran, and where."""

    n_devices: int  # over all processes
    device_kind: str  # JAX's name
    n_processes: int = 1
    host: str = ""
    command: str = ""
    commit: str = ""  # "": no git
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SignOfLife(View):
    """spent.json: when a run that goes on last said so."""

    at: str = ""  # ISO 8601, UTC


# ---- metrics.jsonl, phases.json


@dataclasses.dataclass(frozen=True)
class TrainPoint(View, tokens="n_tokens"):
    """Training metrics at a step."""

    step: int
    loss: float | None = None  # nats per token
    lr: float | None = None
    grad_norm: float | None = None
    n_tokens: float | None = None  # since step 0, as flops, seconds and usd
    flops: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    memory_bytes: float | None = None
    n_skipped: float | None = None
    productive_seconds: float | None = None  # in steps
    productive_usd: float | None = None
    seconds: float | None = None  # in all
    goodput: float | None = None  # share of it in steps that count
    usd: float | None = None
    epochs: dict[str, float] | None = None  # source -> times read
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)  # others, by name


@dataclasses.dataclass(frozen=True)
class HeldoutPoint(View, heldout="heldout_loss", parent="parent_loss"):
    """Held-out losses after a step, nats per token by source."""

    step: int
    heldout_loss: dict[str, float | None]
    parent_loss: dict[str, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class TaskPoint(View):
    """Scores of benchmarks after a step."""

    step: int
    scores: dict[str, dict[str, float | None]]  # task -> metric -> value


@dataclasses.dataclass(frozen=True)
class SkippedPoint(View):
    """A skipped update."""

    step: int
    documents: tuple[str, ...]  # ids of the first documents of the batch
    n_documents: int
    loss: float | None = None  # None: not finite
    grad_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class RunEvent(View, operator="grown"):
    """A resumption or a growth of a run."""

    step: int
    grown: str = ""  # the operator; "": the run was resumed

    @property
    def label(self) -> str:
        """What happened."""
        return f"grown by {self.grown}" if self.grown else "resumed"


MetricRecord = TrainPoint | HeldoutPoint | TaskPoint | SkippedPoint | RunEvent


def parse_metric(fields: dict[str, Any]) -> MetricRecord:
    """Return one record of metrics.jsonl. Raise UserError if it is malformed."""
    kind = fields.get("kind", "")
    if kind in ("growth", "resume") or "grown" in fields or "resumed" in fields:
        return RunEvent.from_json(fields)
    if kind == "heldout" or "heldout" in fields:
        return HeldoutPoint.from_json(fields)
    if kind == "tasks":
        return TaskPoint.from_json(fields)
    if isinstance(fields.get("skipped"), dict):
        return SkippedPoint.from_json({"step": fields.get("step"), **fields["skipped"]})
    if kind == "skipped":
        return SkippedPoint.from_json(fields)
    return TrainPoint.from_json(fields)


@dataclasses.dataclass(frozen=True)
class Phase(View):
    """The mixture from a step on."""

    step: int
    shares: dict[str, float]  # source -> share of the sequences


# ---- sweep.json


@dataclasses.dataclass(frozen=True)
class SweepRun(View):
    """What distinguishes a run of a sweep."""

    arm: str  # its values but those below
    seeds: str
    n_steps: int


@dataclasses.dataclass(frozen=True)
class Sweep(View):
    """The runs of a sweep, the control's first."""

    runs: dict[str, SweepRun]  # by directory


# ---- corpus/funnel.json


@dataclasses.dataclass(frozen=True)
class TextAmount(View, rows="n_documents", bytes="n_bytes", tokens="n_tokens"):
    """Text of one source."""

    n_documents: int = 0
    n_bytes: int = 0
    n_tokens: float | None = None  # estimated from the bytes


@dataclasses.dataclass(frozen=True)
class FunnelStep(View, edits="n_edits"):
    """What one rule kept, by source."""

    rule: str
    kept: dict[str, TextAmount]
    n_edits: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class SkippedRecords(View, first="messages"):
    """Inputs of one source that could not be read."""

    counts: dict[str, int]  # reason -> times
    messages: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DroppedDocument(View):
    """A document that a rule dropped."""

    id: str
    source: str
    text: str
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Funnel(View, unread="skipped"):
    """funnel.json, with samples of what each rule dropped."""

    sources: tuple[str, ...]
    steps: tuple[FunnelStep, ...]
    train: dict[str, TextAmount] = dataclasses.field(default_factory=dict)
    heldout: dict[str, TextAmount] = dataclasses.field(default_factory=dict)
    skipped: dict[str, SkippedRecords] = dataclasses.field(default_factory=dict)
    dropped: dict[str, tuple[DroppedDocument, ...]] = dataclasses.field(default_factory=dict)


# ---- growth.json


@dataclasses.dataclass(frozen=True)
class CountPair(View):
    """A count of parent and child."""

    parent: float
    child: float


@dataclasses.dataclass(frozen=True)
class SizePair(View):
    """Sizes of parent and child."""

    parent: Sizes
    child: Sizes


@dataclasses.dataclass(frozen=True)
class LossPair(View, steps="n_steps"):
    """Held-out losses of parent and child, nats per token by source."""

    parent: dict[str, float]
    child: dict[str, float]
    n_steps: int = 0  # of training before they were measured
    n_sequences: int = 0  # per source, at most


@dataclasses.dataclass(frozen=True)
class LayerStats(View):
    """What a layer does to the residual stream."""

    rms: float
    influence: float


@dataclasses.dataclass(frozen=True)
class LayerPair(View):
    """Layers of parent and child."""

    parent: tuple[LayerStats, ...]
    child: tuple[LayerStats, ...]


@dataclasses.dataclass(frozen=True)
class CopySimilarity(View):
    """Mean cosine between the outputs of two copies of a parent layer."""

    source: int
    layers: tuple[int, ...]
    cosine: float


@dataclasses.dataclass(frozen=True)
class Growth(View):
    """growth.json."""

    parent: str
    operators: tuple[str, ...]
    at_step: int | None
    layer_map: tuple[int | None, ...]  # the parent layer of each child layer
    new_layers: tuple[int, ...]
    n_params: CountPair
    spec: SizePair
    verdict: str
    preserves_function: bool
    flops_per_token: CountPair | None = None
    heldout_sequences: int | None = None
    heldout_loss: LossPair | None = None
    probe: LossPair | None = None
    max_logit_difference: float | None = None
    moments: str | None = None
    layers: LayerPair | None = None
    copy_similarity: tuple[CopySimilarity, ...] | None = None
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---- eval/*.json

OVERLAP_KEYS = {"items": "n_items", "overlapping": "n_overlapping", "short": "n_short"}
OVERLAP_KEYS |= {"without": "clean_scores"}
DIFFERENCE_KEYS = {"id": "document_id", "first_token": "window_start", "pieces": "token_texts"}
DIFFERENCE_KEYS |= {"losses": "token_losses", "tokens": "n_tokens", "nats": "mean_losses"}


@dataclasses.dataclass(frozen=True)
class OverlapExample(View, item="item_id", document="document_id", shared="shared_words"):
    """Words that a benchmark item shares with a training document."""

    item_id: str
    document_id: str
    shared_words: str


@dataclasses.dataclass(frozen=True)
class TaskContamination(View, **OVERLAP_KEYS):
    """Benchmark items of a task that were seen in training."""

    n_items: int
    n_overlapping: int
    n_short: int  # too short to be compared
    examples: tuple[OverlapExample, ...]
    clean_scores: dict[str, Any]  # lm-eval's metrics without these items


@dataclasses.dataclass(frozen=True)
class Contamination(View, unknown="unchecked"):
    """Overlap of benchmarks with the text that a model was trained on."""

    unchecked: tuple[str, ...]
    tasks: dict[str, TaskContamination]


@dataclasses.dataclass(frozen=True)
class EvaluatedModel(View):
    """The model that was evaluated."""

    step: int | None = None


@dataclasses.dataclass(frozen=True)
class TaskScore(View):
    """One metric of one task."""

    task: str
    metric: str
    filter: str  # lm-eval's filter of answers; "none": unfiltered
    score: float | None  # None: there is no right number
    stderr: float | None = None  # None: not estimated
    n_items: int | None = None
    higher_is_better: bool | None = None  # None: unknown
    reason: str = ""  # why there is no number


@dataclasses.dataclass(frozen=True)
class Evaluation(View, lineage="evaluated"):
    """Scores of one model by one backend."""

    scores: tuple[TaskScore, ...]
    model: str | None = None  # path; None: the run's own
    backend: str = ""  # "jax" or "hf"
    seconds: float | None = None
    evaluated: EvaluatedModel | None = None
    contamination: Contamination | None = None

    @classmethod
    def from_json(cls, fields: Any, where: str = "") -> Self:
        """Build the view, also from lm-eval's own form."""
        if isinstance(fields, dict) and "scores" not in fields:
            scores = []
            for task, metrics in expect_dict(fields.get("results"), "results").items():
                n_samples = get_object(fields, "n-samples", task).get("effective")
                better = get_object(fields, "higher_is_better", task)
                reasons = get_object(fields, "reasons", task)
                scores += parse_scores(task, metrics, n_samples, better, reasons)
            fields = {**fields, "scores": [score.to_json() for score in scores]}
        found = super().from_json(fields, where)
        if not found.scores:
            raise UserError('results: no score "METRIC,FILTER" of any task in it')
        return found


def expect_dict(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object. Raise UserError if it is none."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {value!r:.80}.")
    return value


def get_object(fields: dict[str, Any], key: str, task: str) -> dict[str, Any]:
    """Return a task's object under a key, {} if there is none. Raise UserError for any other."""
    by_task = expect_dict(fields.get(key) or {}, key)
    return expect_dict(by_task.get(task) or {}, f"{key}.{task}")


def parse_scores(
    task: str,
    metrics: Any,
    n_items: Any = None,
    higher_is_better: dict[str, Any] = {},
    reasons: dict[str, Any] = {},
) -> list[TaskScore]:
    """Return the scores that lm-eval reports as "metric,filter" and "metric_stderr,filter".

    Args:
        task: the task.
        metrics: of the task.
        n_items: that were scored.
        higher_is_better: by metric.
        reasons: why a score is null, by "metric,filter".
    """
    scores = []
    metrics = expect_dict(metrics, task)
    for name, value in metrics.items():
        metric, _, rule = name.partition(",")
        is_score = value is None or isinstance(value, (int, float))
        if not rule or metric.endswith("_stderr") or not is_score:
            continue
        score = TaskScore(
            task=task,
            metric=metric,
            filter=rule,
            score=finite_or_none(value),
            stderr=finite_or_none(metrics.get(f"{metric}_stderr,{rule}")),
            n_items=n_items,
            higher_is_better=higher_is_better.get(metric),
            reason=reasons.get(name, ""),
        )
        scores.append(score)
    return scores


@dataclasses.dataclass(frozen=True)
class Continuation(View, tokens="n_tokens"):
    """A model's continuation of a prompt."""

    model: str
    text: str
    n_tokens: int | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Prompt(View, outputs="continuations"):
    """A prompt and its continuations."""

    prompt: str
    continuations: tuple[Continuation, ...]


@dataclasses.dataclass(frozen=True)
class Samples(View):
    """samples.json."""

    prompts: tuple[Prompt, ...]
    settings: dict[str, Any] | None = None
    bits_per_byte: dict[str, dict[str, float | None]] | None = None  # file -> model -> score
    # file -> model -> why it has no score
    reasons: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DocumentDifference(View, **DIFFERENCE_KEYS):
    """One document's losses by two models, nats per token."""

    source: str
    document_id: str
    window_start: int  # index of the first of these tokens
    n_tokens: int
    token_texts: tuple[str, ...]
    token_losses: tuple[tuple[float, ...], tuple[float, ...]]
    mean_losses: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Differences(View, documents="n_documents"):
    """differences.json."""

    models: tuple[str, str]
    n_documents: int
    max_length: int  # tokens read of each document
    better: tuple[DocumentDifference, ...]
    worse: tuple[DocumentDifference, ...]


# ---- plan.json


@dataclasses.dataclass(frozen=True)
class Projection(View):
    """Speed and cost of a whole run."""

    mfu: float | None = None
    tokens_per_second: float | None = None
    hours: float | None = None
    usd: float | None = None


@dataclasses.dataclass(frozen=True)
class Target(View, on="target", devices="n_devices", peak_bytes_per_device="peak_bytes"):
    """The plan for one machine."""

    target: str
    expected: Projection
    slow: Projection | None = None
    fast: Projection | None = None
    method: str = ""
    n_devices: int | None = None
    fits: bool = False
    peak_bytes: float | None = None  # per device
    overrides: tuple[str, ...] | None = None

    @classmethod
    def from_json(cls, fields: Any, where: str = "") -> Self:
        """Build the view. The expected speed and cost may stand beside the target's own keys."""
        if isinstance(fields, dict) and "expected" not in fields:
            ends = {"slow": fields.get("low"), "fast": fields.get("high")}
            fields = {**fields, **ends, "expected": fields}
        return super().from_json(fields, where)


@dataclasses.dataclass(frozen=True)
class Search(View):
    """Result of jaxpt plan --search."""

    cheapest: Target | None = None
    fastest: Target | None = None


Ends = tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Strategy(View, saved="saved_frac", saved_with_base="saved_with_base_frac"):
    """Cost of one way to a loss, each as (best case, worst case); None inside: never."""

    name: str = ""
    tokens: Ends | None = None
    saved_frac: Ends | None = None
    saved_with_base_frac: Ends | None = None
    hours: Ends | None = None
    usd: Ends | None = None


@dataclasses.dataclass(frozen=True)
class Comparison(View, ways="strategies"):
    """Growing compared with training from scratch."""

    strategies: tuple[Strategy, ...] = ()
    target_loss: float = 0.0  # nats per token
    verdict: str = ""


@dataclasses.dataclass(frozen=True)
class Check(View, run="run_dir"):
    """A plan compared with a run. Ratios are measured / planned."""

    run_dir: str = ""
    description: str = ""  # of the run: its directory, size and origin
    planned_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    time_ratio: float | None = None
    calibrated_time_ratio: float | None = None
    memory_ratio: float | None = None
    calibrated_memory_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan(View, ways="comparison", check="checks"):
    """plan.json."""

    targets: tuple[Target, ...]
    tokens: float | None = None
    search: Search | None = None
    comparison: Comparison | None = None
    checks: tuple[Check, ...] | None = None
    notes: tuple[str, ...] = ()
