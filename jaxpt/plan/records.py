"""What the planner writes to plan.json, and what its modules pass to each other."""

from __future__ import annotations

import dataclasses
import math

from jaxpt.spec import ModelSpec, Record

# ---- one step


@dataclasses.dataclass(frozen=True)
class CollectiveCount(Record):
    """Collectives of one kind that one layer runs."""

    n_ops: int
    n_bytes: float  # of the whole arrays, summed over the operations


LayerCollectives = dict[str, CollectiveCount]  # collective, such as "all-gather" -> count


@dataclasses.dataclass(frozen=True)
class StepAnalysis(Record):
    """Memory, FLOPs and traffic of one train step on a target, compiled or estimated."""

    method: str  # "compiled" or "estimated"
    missing_package: str | None  # to install before compiling; None: nothing is missing
    mesh: dict[str, int]  # axis -> devices
    n_layers: int
    attention: str  # backend: "splash", "cudnn" or "xla"
    params_bytes: int  # per device, as all bytes up to peak_bytes
    opt_state_bytes: int
    saved_activation_bytes: int  # kept for backward under the remat policy, by rule of thumb
    restore_bytes: int  # while a checkpoint is restored
    export_bytes: int  # while weights are gathered for export
    peak_bytes: int  # a lower bound where exceeds_memory
    exceeds_memory: bool  # the compiler gave up
    comm_bytes: float  # received per device per step for sharded weights, activations and sequences
    memory_traffic_bytes: float  # read and written per device per step
    executed_flops: float  # per step over all devices, recomputation included
    loop_body_flops: float | None  # per device, each loop body counted once, as compilers count
    compiler_flops: float | None  # per device, the compiler's own count; None: it has none
    # of one turn of each loop over layers, forward first; empty: unknown
    layer_collectives: tuple[LayerCollectives, ...]
    analysis_seconds: float


# ---- a plan


@dataclasses.dataclass(frozen=True)
class RunProjection(Record):
    """Speed and cost of the whole run at one assumed step time."""

    mfu: float  # model FLOPs utilization, 0 to 1
    tokens_per_second: float  # over all devices
    step_seconds: float
    hours: float
    usd: float | None  # None: no price is known
    kwh: float | None  # None: the board's power is not known


@dataclasses.dataclass(frozen=True)
class TargetPlan(Record):
    """The plan of a run on one target."""

    target: str  # as in --on, such as "v5p:4x4x4"
    method: str  # "compiled" or "estimated"
    missing_package: str | None
    n_devices: int
    mesh: dict[str, int]
    attention: str
    fits: bool
    peak_bytes: int  # per device, as all bytes but host_*
    peak_is_lower_bound: bool  # the compiler gave up
    usable_bytes: int  # of a device's memory
    params_bytes: int
    opt_state_bytes: int
    saved_activation_bytes: int
    temporary_bytes: int | None  # gradients and activations; None where peak_is_lower_bound
    restore_bytes: int
    export_bytes: int
    host_save_bytes: int  # per host, as all host_*
    host_restore_bytes: int
    host_export_bytes: int
    needs_mem_fraction: bool  # XLA_PYTHON_CLIENT_MEM_FRACTION must be raised
    flops_per_token: float  # of the model, forward and backward
    executed_flops_per_token: float  # recomputation included
    loop_body_flops: float | None
    compiler_flops: float | None
    layer_collectives: tuple[LayerCollectives, ...]
    comm_bytes_per_layer: float  # received per device per step
    compute_seconds: float  # per step, matmuls alone at peak speed
    memory_seconds: float  # per step, memory traffic alone
    network_seconds: float  # per step, communication alone
    expected: RunProjection  # in the middle of the assumptions
    slow: RunProjection  # at the low end of matmul efficiency, no transfer overlapped
    fast: RunProjection  # at the high end, transfers overlapped
    efficiency_range: tuple[float, float]  # assumed share of peak FLOP/s for matmuls (low, high)
    efficiency_source: str
    time_calibration: float  # measured / planned step seconds that times were multiplied by
    usd_per_hour: float | None  # per device
    price_source: str
    analysis_seconds: float
    overrides: tuple[str, ...] = ()  # found by --search, such as "--config.train.remat=full"


@dataclasses.dataclass(frozen=True)
class PlannedModel(Record):
    """The model and batch that a plan is for."""

    n_params: int
    seq_len: int
    batch_size: int  # sequences per step, over all devices
    grad_accum_steps: int
    spec: ModelSpec


@dataclasses.dataclass(frozen=True)
class LayoutSearch(Record):
    """Result of --search; the best layout of each target is in TrainingPlan.targets."""

    cheapest: TargetPlan | None  # None: nothing fits, or has a price
    fastest: TargetPlan | None  # None: nothing fits
    n_tried: int  # layouts estimated
    n_compiled: int


@dataclasses.dataclass(frozen=True)
class PlanCheck(Record):
    """Planned against measured for one run. Ratios are measured / planned."""

    run_dir: str
    target: str
    method: str  # "compiled" or "estimated"
    planned_step_seconds: float
    planned_step_seconds_range: tuple[float, float]  # (fast, slow)
    measured_step_seconds: float  # median
    time_ratio: float
    planned_memory_bytes: int  # peak per device
    measured_memory_bytes: float  # peak of the first device; on CPU of the process
    memory_ratio: float
    process_overhead_bytes: float  # measured - planned memory
    calibrated_time_ratio: float  # once the first run has calibrated the plan
    calibrated_memory_ratio: float


# ---- grow or scratch


@dataclasses.dataclass(frozen=True)
class ScalingLaw(Record):
    """L = E + A / N^alpha + B / D^beta: nats per token of N parameters after D tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    source: str
    params_range: tuple[float, float]  # fewest and most parameters of the runs it was fitted to
    max_tokens: float  # of the longest of these runs

    def predict_loss(self, n_params: float, tokens: float) -> float:
        """Return the loss in nats per token; infinite for 0 tokens."""
        if not tokens:
            return math.inf
        return self.compute_loss_floor(n_params) + self.B / tokens**self.beta

    def compute_loss_floor(self, n_params: float) -> float:
        """Return the loss that a model of this size approaches with infinite tokens."""
        return self.E + self.A / n_params**self.alpha

    def compute_tokens_to_loss(self, n_params: float, loss: float) -> float:
        """Return the tokens needed to reach a loss; infinite if the size cannot reach it."""
        left = loss - self.compute_loss_floor(n_params)
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf

    def describe_extrapolation(self, n_params: float, tokens: float) -> list[str]:
        """Describe how far a size and a token budget lie outside of the fitted runs."""
        smallest, largest = self.params_range
        notes = []
        if not smallest <= n_params <= largest:
            nearest = largest if n_params > largest else smallest
            notes.append(f"{n_params / nearest:.3g} times the size of its runs")
        if tokens > self.max_tokens:
            notes.append(f"{tokens / self.max_tokens:.3g} times their tokens")
        return notes


@dataclasses.dataclass(frozen=True)
class BaseModelSummary(Record):
    """The model that could be grown."""

    n_params: int
    tokens: float  # trained on
    tokens_per_param: float
    usd: float | None  # what it cost; 0: free; None: computed from its tokens


@dataclasses.dataclass(frozen=True)
class StrategyCost(Record):
    """Cost of one strategy to the target loss, as (best case, worst case) unless stated.

    A None inside a pair means never.
    """

    name: str  # such as "scratch" or "stacking"
    tokens: tuple[float | None, float | None]
    flops: tuple[float | None, float | None]
    flops_with_base: tuple[float | None, float | None]  # the base's training included
    # share of the FLOPs from scratch (worst case, best case); None: scratch never gets there
    saved_frac: tuple[float | None, float | None] | None
    saved_with_base_frac: tuple[float | None, float | None] | None
    loss: tuple[float | None, float | None]  # nats per token after the whole token budget
    source: str
    notes: tuple[str, ...] = ()
    hours: tuple[float | None, float | None] | None = None  # None: no target was planned for
    usd: tuple[float | None, float | None] | None = None  # None: no target, or no price
    usd_with_base: tuple[float | None, float | None] | None = None


@dataclasses.dataclass(frozen=True)
class StrategyComparison(Record):
    """Strategies to train or grow a model of one size."""

    n_params: int
    token_budget: float
    target_loss: float  # nats per token
    target_loss_given: bool  # False: what scratch reaches with token_budget
    law: ScalingLaw
    base: BaseModelSummary | None
    strategies: tuple[StrategyCost, ...]
    stack_tokens: float  # of the smaller model before stacking, by G_stack's fit (2405.15319)
    notes: tuple[str, ...]
    verdict: str


@dataclasses.dataclass(frozen=True)
class TrainingPlan(Record):
    """plan.json."""

    targets: tuple[TargetPlan, ...] = ()
    model: PlannedModel | None = None  # None: only runs were checked, or strategies compared
    tokens: float | None = None  # token budget of the run
    notes: tuple[str, ...] = ()
    checks: tuple[PlanCheck, ...] = ()  # --check
    search: LayoutSearch | None = None  # --search
    comparison: StrategyComparison | None = None  # --base, --target-loss or --fit
