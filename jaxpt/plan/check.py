"""Compare plans with what runs measured: step time and peak memory, calibrated by a first run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxpt import config, hardware, io, stage
from jaxpt.config import Config
from jaxpt.hardware import GIB, Target
from jaxpt.model import transformer
from jaxpt.plan import compile, cost
from jaxpt.plan.cost import abbreviate_count, format_memory
from jaxpt.spec import ModelSpec, Record, UserError
from jaxpt.train.metrics import stream_metrics
from jaxpt.train.records import GrowthEvent, MetricRecord, TrainMetrics
from jaxpt.train.shapes import StepShape, find_shape, plan_largest

log = logging.getLogger(__name__)

MIN_RECORDS = 3


@dataclasses.dataclass(frozen=True)
class PlanCheck(Record):
    """Planned against measured for one run. Ratios are measured / planned."""

    run_dir: str
    description: str  # of the run: its directory, size and origin
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


def compare_plan_to_runs(run_dirs: Sequence[str | io.Path]) -> tuple[PlanCheck, ...]:
    """Return planned against measured of each run; the first run calibrates the plan.

    It calibrates time by a factor, and memory by the bytes that a process holds beside the step.

    Raises:
        UserError: a directory holds no run, or one on a device that the table of chips lacks.
    """
    checks: list[PlanCheck] = []
    for run_dir in run_dirs:
        checks.append(compare_plan_to_run(run_dir, checks[0] if checks else None))
    return tuple(checks)


def compare_plan_to_run(run_dir: str | io.Path, first: PlanCheck | None) -> PlanCheck:
    """Return planned against measured of one run, calibrated by the first one (None: by itself)."""
    run = read_run(run_dir, "--check")
    devices = read_devices(run)
    target = find_run_target(run.path, devices.n_devices, devices.kind)
    records = list_speeds(run, devices)
    if len(records) < MIN_RECORDS:
        raise UserError(
            f"--check {run.path}: expected at least {MIN_RECORDS} training records in "
            "metrics.jsonl of its batch, depth and devices as they are now, got "
            f"{len(records)}. Train on, or with a smaller train.log_every."
        )
    # the first record's steps include the first one, which is slower
    measured_seconds = statistics.median(record.step_seconds for record in records[1:])
    measured_bytes = max(record.memory_bytes for record in records)

    log.info(f"check: {run.path}: compiling its step")
    analysis = compile.analyze_step(run.spec, run.settings, target)
    plan = cost.project_target(run.spec, run.settings, target, analysis, 1.0)
    planned_seconds, planned_bytes = plan.expected.step_seconds, plan.peak_bytes
    time_ratio = measured_seconds / planned_seconds
    overhead_bytes = measured_bytes - planned_bytes
    calibration = first.time_ratio if first else time_ratio
    calibration_bytes = first.process_overhead_bytes if first else overhead_bytes
    return PlanCheck(
        run_dir=str(run_dir),
        description=run.describe(),
        target=plan.target,
        method=plan.method,
        planned_step_seconds=planned_seconds,
        planned_step_seconds_range=(plan.fast.step_seconds, plan.slow.step_seconds),
        measured_step_seconds=measured_seconds,
        time_ratio=time_ratio,
        planned_memory_bytes=planned_bytes,
        measured_memory_bytes=measured_bytes,
        memory_ratio=measured_bytes / planned_bytes,
        process_overhead_bytes=overhead_bytes,
        calibrated_time_ratio=measured_seconds / (planned_seconds * calibration),
        calibrated_memory_ratio=measured_bytes / (planned_bytes + calibration_bytes),
    )


class Speed(NamedTuple):
    """What a record measured."""

    step_seconds: float
    memory_bytes: int


def list_speeds(run: Run, devices: RunDevices) -> list[Speed]:
    """Return what was measured since batch, sequence length, depth and devices are as they are."""
    speeds: list[Speed] = []
    before = 0  # steps done at the record before
    for record in run.stream_records():
        if isinstance(record, GrowthEvent):
            speeds.clear()
        elif isinstance(record, TrainMetrics):
            is_of_shape = run.had_shape(before) and run.had_shape(record.step - 1)
            before = record.step
            tokens_per_step = record.tokens_per_second * record.step_seconds
            is_of_batch = is_of_shape and round(tokens_per_step) == run.tokens_per_step
            if is_of_batch and record.step > devices.since_step:
                speeds.append(Speed(record.step_seconds, record.memory_bytes))
    return speeds


def find_run_target(run_dir: str | io.Path, n_devices: int, device_kind: str) -> Target:
    """Return the target of a run's devices.

    Raises:
        UserError: the table has no such chip, or no such slice is offered.
    """
    chip = hardware.find_chip(device_kind)
    if chip is None:
        raise UserError(
            f"--check {run_dir}: ran on {device_kind}, which is not in the table of chips "
            f"({', '.join(hardware.CHIPS)})."
        )
    if chip.platform != "tpu":
        target = hardware.parse_target(f"{chip.name}:{n_devices}")
        return share_cores(target) if chip.platform == "cpu" else target
    for name in hardware.list_target_names(chip):
        target = hardware.parse_target(name)
        if target.n_devices == n_devices:
            return target
    raise UserError(
        f"--check {run_dir}: ran on {n_devices} x {device_kind}, which is no slice that is offered."
    )


def share_cores(target: Target) -> Target:
    """Return a CPU target whose devices share the cores of this machine."""
    n_cores = (os.cpu_count() or 1) / target.n_devices
    core = target.chip
    chip = dataclasses.replace(
        core,
        bfloat16_flops=core.bfloat16_flops * n_cores,
        float32_flops=core.float32_flops * n_cores,
        memory_bandwidth=core.memory_bandwidth * n_cores,
        link_bandwidth=core.link_bandwidth * n_cores,
        memory_bytes=int(core.memory_bytes * n_cores),
    )
    return dataclasses.replace(target, chip=chip)


def compute_time_calibrations(checks: Sequence[PlanCheck]) -> dict[str, float]:
    """Return chip -> measured / planned step seconds of its first run."""
    calibrations: dict[str, float] = {}
    for check in checks:
        chip_name, _, _ = check.target.partition(":")
        calibrations.setdefault(chip_name, check.time_ratio)
    return calibrations


def format_plan_checks(checks: Sequence[PlanCheck]) -> str:
    """Return the comparisons as text."""
    lines = ["measured / planned"]
    for check in checks:
        fast, slow = check.planned_step_seconds_range
        planned = format_memory(check.planned_memory_bytes)
        measured = format_memory(check.measured_memory_bytes)
        lines += [
            f"{check.description} on {check.target} ({check.method})",
            f"  step, s      planned {check.planned_step_seconds:.3g} ({fast:.3g} to {slow:.3g}), "
            f"measured {check.measured_step_seconds:.3g}: ratio {check.time_ratio:.2f}",
            f"  peak memory  planned {planned}, measured {measured}: "
            f"ratio {check.memory_ratio:.2f}",
        ]
        if check is checks[0]:
            overhead_gib = check.process_overhead_bytes / GIB
            lines.append(
                f"  calibrates the others: times x {check.time_ratio:.2f}, "
                f"process overhead {overhead_gib:.2f} GiB"
            )
        else:
            lines.append(
                f"  calibrated   ratio of time {check.calibrated_time_ratio:.2f}, "
                f"of memory {check.calibrated_memory_ratio:.2f}"
            )
    return "\n".join(lines)


# ---- what the planner needs of a run directory


class Run(NamedTuple):
    """A run directory that jaxpt train wrote.

    Attributes:
        path: the directory.
        recipe: as it trains.
        settings: the recipe of its largest step, which is planned.
        spec: the model as it is now.
    """

    path: io.Path
    recipe: Config
    settings: Config
    spec: ModelSpec

    def describe(self) -> str:
        """Return what the run is: "runs/child (3.94M parameters, grown by stack)"."""
        n_params = abbreviate_count(transformer.count_params(self.spec))
        growth = read_growth(self)
        source = self.settings.initialize.source
        origin = "from scratch" if source == "random" else f"from {source}"
        if growth:
            origin = f"grown by {growth.operator}"
        return f"{self.path} ({n_params} parameters, {origin})"

    def stream_records(self) -> Iterator[MetricRecord]:
        """Yield the records of its metrics.jsonl."""
        return stream_metrics(self.path / "metrics.jsonl")

    def had_shape(self, step: int) -> bool:
        """Return whether the batch that is read after so many steps has the planned shape."""
        planned = StepShape(self.settings.train.batch_size, self.settings.pack.seq_len)
        return find_shape(self.recipe, step) == planned

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch as it is now, padding included."""
        return self.settings.train.batch_size * self.settings.pack.seq_len


class Growth(NamedTuple):
    """How a run's model was grown."""

    call: str  # of the last operator, such as "stack(g=2)"
    n_tokens: int  # of the run before it; 0: before training

    @property
    def operator(self) -> str:
        """The operator's name."""
        return self.call.partition("(")[0]


def read_run(run_dir: str | io.Path, flag: str) -> Run:
    """Read a run directory.

    Args:
        run_dir: the directory.
        flag: of the command line, for the error message.

    Raises:
        UserError: there is no run.
    """
    path = io.path(run_dir)
    text = io.read_text_if_there(path / "config.json")
    if text is None:
        raise UserError(
            f"{flag} {path}: no config.json there. Give run directories that jaxpt train wrote."
        )
    recipe = config.build_config(io.read_json(path / "config.json"))
    return Run(path, recipe, plan_largest(recipe), stage.read_spec(path / "spec.json"))


class RunDevices(NamedTuple):
    """The devices of a run's last start."""

    n_devices: int
    kind: str  # JAX's name
    since_step: int  # that the run has had these


def read_devices(run: Run) -> RunDevices:
    """Return the devices of the run's last start. A line that cannot be read is left out."""
    starts: list[RunDevices] = []
    for line in io.read_lines(run.path / "starts.jsonl"):
        try:
            start = json.loads(line)
            found = RunDevices(start["n_devices"], start["device_kind"], start["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if not starts or starts[-1][:2] != found[:2]:
            starts.append(found)
    if not starts:
        raise UserError(
            f"{run.path / 'starts.jsonl'}: no start of a run there. Give a run directory that "
            "jaxpt train wrote."
        )
    return starts[-1]


def read_growth(run: Run) -> Growth | None:
    """Return how the run's model was grown; None if it was not."""
    path = run.path / "growth.json"
    if not io.exists(path):
        return None
    report = io.read_json(path)
    at_step = report["at_step"] or 0
    n_tokens = 0
    for record in run.stream_records():
        if record.step <= at_step:
            n_tokens = max(n_tokens, record.n_tokens)
    return Growth(report["operators"][-1], n_tokens)
