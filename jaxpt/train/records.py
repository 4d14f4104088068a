"""What a training run writes to metrics.jsonl, starts.jsonl, its checkpoints and its manifest."""

from __future__ import annotations

import dataclasses
import statistics

# MixturePhase (one entry of phases.json): step, sequence, batch_size, shares, fingerprint
from jaxpt.data.mixture import MixturePhase
from jaxpt.growth.records import NewParamsRecord
from jaxpt.spec import Record

# ---- sums over a run, in every record of metrics.jsonl, the checkpoints and the manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSums(Record):
    """What a run did and spent up to a step, whatever batch, depth or devices it had meanwhile.

    Tokens, FLOPs and productive time are of the steps that count. `seconds` and `usd` are of the
    whole: also start-up, evaluation, checkpoints and what a kill threw away. An amount of which a
    part is not known is None.
    """

    n_tokens: int  # read, padding included
    n_trained_tokens: int  # targets of the updates that were not skipped
    flops: float | None  # of the model, forward and backward
    productive_seconds: float  # in steps, data included
    productive_usd: float | None
    seconds: float  # from the start of each process
    usd: float | None
    data_seconds: float = 0.0  # of the productive ones: devices idle for want of a batch, at least
    start_seconds: float = 0.0  # before the first step of each start: imports, compilation, reading
    evaluation_seconds: float = 0.0
    save_seconds: float = 0.0  # in which steps waited for a checkpoint
    lost_seconds: float = 0.0  # that a kill threw away

    def compute_goodput(self) -> float:
        """Return the share of the time in which steps were made that count."""
        return (self.productive_seconds - self.data_seconds) / max(self.seconds, 1e-9)


NOTHING_DONE = RunSums(
    n_tokens=0,
    n_trained_tokens=0,
    flops=0.0,
    productive_seconds=0.0,
    productive_usd=0.0,
    seconds=0.0,
    usd=0.0,
)


# ---- metrics.jsonl: one record per line, distinguished by `kind`; steps count updates from 1


@dataclasses.dataclass(frozen=True)
class TrainMetrics(RunSums):
    """Metrics over the steps since the last record."""

    step: int
    loss: float  # mean nats per token, without z-loss
    grad_norm: float  # of the last step, before clipping
    lr: float  # peak group's, of the last step
    epochs: dict[str, float]  # source -> times read, of those read most; epochs.json has all
    tokens_per_second: float  # over all devices
    step_seconds: float  # mean
    mfu: float | None  # model FLOPs utilization, 0 to 1; None: peak FLOP/s not known
    memory_bytes: int  # peak of the first device; on CPU of the process
    n_skipped: int  # updates skipped since step 0
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)  # others, of the last step
    goodput: float = 0.0  # share of the run's time so far in steps that count
    kind: str = "train"


@dataclasses.dataclass(frozen=True)
class HeldoutMetrics(RunSums):
    """Held-out loss after a step."""

    step: int
    heldout_loss: dict[str, float]  # source -> nats per token
    seq_len: int  # of the parts that packed sequences are cut into
    parent_loss: dict[str, float] | None = None  # the parent's on the same parts; None: not known
    average_loss: dict[str, float] | None = None  # of the averaged weights
    kind: str = "heldout"

    @property
    def mean_loss(self) -> float:
        """Return the mean over sources, by which runs are compared."""
        return statistics.mean(self.heldout_loss.values())


@dataclasses.dataclass(frozen=True)
class TaskMetrics(RunSums):
    """Benchmarks after a step, as `jaxpt evaluate` scores them."""

    step: int
    scores: dict[str, dict[str, float]]  # task -> metric, or its name and "_stderr" -> value
    kind: str = "tasks"


@dataclasses.dataclass(frozen=True)
class SkippedUpdate(RunSums):
    """An update that was skipped: not finite, or a spike of the gradient norm."""

    step: int
    loss: float  # nats per token
    grad_norm: float
    documents: tuple[str, ...]  # ids of the first documents of the batch
    n_documents: int  # of the whole batch
    kind: str = "skipped"


@dataclasses.dataclass(frozen=True)
class GrowthEvent(RunSums):
    """The model was grown after a step."""

    step: int
    operator: str  # as in train.grow
    n_layers: int  # of the grown model, as n_params
    n_params: int
    kind: str = "growth"


@dataclasses.dataclass(frozen=True)
class ResumeEvent(RunSums):
    """The run was resumed after a step."""

    step: int
    kind: str = "resume"


MetricRecord = (
    TrainMetrics | HeldoutMetrics | TaskMetrics | SkippedUpdate | GrowthEvent | ResumeEvent
)
METRIC_RECORDS = {
    record.kind: record
    for record in (
        TrainMetrics,
        HeldoutMetrics,
        TaskMetrics,
        SkippedUpdate,
        GrowthEvent,
        ResumeEvent,
    )
}


# ---- starts.jsonl: one record per start of the run


@dataclasses.dataclass(frozen=True)
class StartRecord(Record):
    """What ran, where and from which step; program.diff holds the changes since `commit`."""

    started: str  # ISO 8601, UTC
    command: str
    working_dir: str
    host: str
    versions: dict[str, str]  # package -> version
    commit: str  # "": no git
    step: int  # updates done before this start
    n_processes: int
    n_devices: int  # over all processes
    device_kind: str  # JAX's name
    variables: dict[str, str]  # of the environment, for XLA and JAX


# ---- checkpoints


@dataclasses.dataclass(frozen=True)
class TrainProgress(Record):
    """Position of a run, from which it resumes bit by bit."""

    step: int = 0  # updates done or skipped
    n_sequences: int = 0  # read
    interval_loss_sum: float = 0.0  # nats since the last TrainMetrics
    interval_n_tokens: float = 0.0  # trained on since the last TrainMetrics
    n_growths: int = 0  # of train.grow, done
    sums: RunSums = NOTHING_DONE
    data_history: tuple[MixturePhase, ...] = ()


@dataclasses.dataclass(frozen=True)
class HeldoutRecord(Record):
    """Held-out losses and what they were measured on."""

    losses: dict[str, float]  # source -> nats per token
    fingerprint: str  # of the held-out sequences
    n_sequences: int  # per source, at most
    document_mask: bool
    seq_len: int  # of the parts that packed sequences are cut into


@dataclasses.dataclass(frozen=True)
class AverageRecord(Record):
    """What an average of the weights is of."""

    knob: float  # optim.average: steps, or the decay of a moving average
    first: int  # update after which weights join it, counted from 1
    last: int


@dataclasses.dataclass(frozen=True)
class ReplayPhases(Record):
    """mixture.phases as configured, and as train.on_forgetting=replay changed them."""

    configured: tuple[tuple[int, dict[str, float]], ...]  # (from step, {source: share})
    in_force: tuple[tuple[int, dict[str, float]], ...]


@dataclasses.dataclass(frozen=True)
class CheckpointRecord(Record):
    """Counts of a checkpoint's manifest; fields after `step` are None where unknown."""

    step: int
    progress: TrainProgress | None = None  # None: initialized, not trained by this run
    data_fingerprint: str | None = None  # of the packed sequences
    mixture_seed: int | None = None
    optimizer: str | None = None  # optim.name
    teacher: str | None = None  # fingerprint of its files; None: there is none
    reference: str | None = None  # fingerprint of DPO's, where it is no part of the model
    moment_dtype: str | None = None  # optim.moment_dtype
    lr: float | None = None  # of the last step
    new_params: NewParamsRecord | None = None
    parent: HeldoutRecord | None = None  # the parent's losses
    average: AverageRecord | None = None  # None: no weights are averaged
    replay: ReplayPhases | None = None
    heldout: HeldoutRecord | None = None  # None: not measured at this step


# ---- manifest.json of a finished run


@dataclasses.dataclass(frozen=True)
class TrainCounts(RunSums):
    """Counts of the train stage's manifest."""

    n_steps: int
    n_sequences: int
    heldout_loss: dict[str, float]  # source -> nats per token, after the last step
    n_params: int
