"""Log a run: console lines, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxpt import io
from jaxpt.config import Config
from jaxpt.flops import DeviceCost
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec, UserError
from jaxpt.stage import fingerprint
from jaxpt.train.records import (
    METRIC_RECORDS,
    GrowthEvent,
    HeldoutMetrics,
    MetricRecord,
    ResumeEvent,
    SkippedUpdate,
    TrainMetrics,
)

log = logging.getLogger(__name__)

MAX_SKIPPED_DOCUMENTS = 32  # listed per skipped step; jaxpt trace lists all
MAX_COLUMNS = 69  # of a console line; time and level take 11 of a terminal's 80
# of a step, that a record has fields for; loss and n_targets are summed over the interval instead
KNOWN_SCALARS = ("loss_sum", "n_targets", "loss", "grad_norm", "lr", "n_skipped")
KNOWN_SCALARS += ("consecutive_skips",)

HostScalars = dict[str, np.ndarray]  # what a step returned, on the host


class MetricsLogger:
    """Writes RUN/metrics.jsonl so that it is continuous across resumes.

    Records after `resumed_at` are dropped first, so no step is there twice. Every process makes a
    logger; the first one writes.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        n_steps: int,
        *,
        wandb: Any = None,
        tokens_per_step: int,
        n_devices: int,
        resumed_at: int,
        started: float,
        cost: DeviceCost,
    ):
        """Open the files.

        Args:
            run_dir: the run directory.
            n_steps: of the whole run.
            wandb: a run of Weights & Biases, see `init_wandb`.
            tokens_per_step: over all devices.
            n_devices: over all processes.
            resumed_at: updates done before this start.
            started: time.monotonic() from which seconds and money are counted.
            cost: of the model on one device.
        """
        self.run_dir = run_dir
        self.n_steps = n_steps
        self.wandb = wandb
        self.tokens_per_step = tokens_per_step
        self.n_devices = n_devices
        self.cost = cost
        self.path = run_dir / "metrics.jsonl"
        self.is_writer = jax.process_index() == 0
        earlier = [record for record in read_metrics(self.path) if record.step <= resumed_at]
        # seconds and money of a resumed run continue from its last record
        seconds = [record.seconds for record in earlier if isinstance(record, TrainMetrics)]
        self.seconds_before_resume = max(seconds, default=0.0)
        self.start = started
        self.restart_timer(resumed_at)
        if not self.is_writer:
            return
        lines = [json.dumps(record.to_json()) + "\n" for record in earlier]
        io.write_text(self.path, "".join(lines))
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        purge_step = resumed_at + 1 if resumed_at else None
        self.tensorboard = import_summary_writer()(
            str(run_dir / "tensorboard"), purge_step=purge_step
        )
        self.progress_bar = tqdm(
            total=self.n_steps,
            initial=resumed_at,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def log_train(
        self, step: int, scalars: HostScalars, *, loss: float, epochs: dict[str, float]
    ) -> None:
        """Write a record and a console line for the steps since the last one.

        Args:
            step: updates done.
            scalars: of the last step.
            loss: mean over those steps, nats per token.
            epochs: source -> times read.
        """
        now = time.monotonic()
        step_seconds = (now - self.last_time) / max(step - self.last_step, 1)
        self.last_step, self.last_time = step, now
        tokens_per_second = self.tokens_per_step / step_seconds
        seconds = self.seconds_before_resume + now - self.start
        further = scalars.keys() - set(KNOWN_SCALARS)
        record = TrainMetrics(
            step=step,
            loss=loss,
            grad_norm=float(scalars["grad_norm"]),
            lr=float(scalars["lr"]),
            n_tokens=step * self.tokens_per_step,
            epochs=epochs,
            tokens_per_second=tokens_per_second,
            step_seconds=step_seconds,
            mfu=self.cost.compute_mfu(tokens_per_second, self.n_devices),
            memory_bytes=measure_peak_memory(),
            n_skipped=int(scalars["n_skipped"]),
            seconds=seconds,
            usd=self.cost.compute_usd(seconds, self.n_devices),
            scalars={name: float(scalars[name]) for name in sorted(further)},
        )
        self.write_record(record)
        for line in self.format_train(record):
            log.info(line)
        if self.is_writer:
            self.progress_bar.update(step - self.progress_bar.n)

    def format_train(self, record: TrainMetrics) -> list[str]:
        """Return a line, and a second one for what is not always there, of MAX_COLUMNS at most."""
        left = format_duration((self.n_steps - record.step) * record.step_seconds)
        rate = f"{record.tokens_per_second:,.0f} tok/s"
        first = f"{self.format_step(record.step)}  loss {record.loss:.4f}  "
        first += f"norm {record.grad_norm:.2f}  lr {record.lr:.1e}  {rate}  {left} left"
        more = []
        if record.mfu:
            more.append(f"MFU {record.mfu:.1%}")
        if record.usd:
            more.append(f"${record.usd:,.2f}")
        if record.n_skipped:
            more.append(f"{record.n_skipped} skipped")
        if not more and not record.scalars:
            return [first]
        more.append(f"{record.memory_bytes / 2**30:.1f} GiB")
        more.append(f"{format_duration(record.seconds)} so far")
        second = "  " + "  ".join(more)
        for name, value in record.scalars.items():
            column = f"  {name} {value:.4g}"
            if len(second + column) <= MAX_COLUMNS:
                second += column
        return [first, second]

    def format_step(self, step: int) -> str:
        """Return "step  10/300"."""
        return f"step {step:>{len(str(self.n_steps))}}/{self.n_steps}"

    def log_heldout(
        self, step: int, losses: dict[str, float], parent: dict[str, float] | None
    ) -> None:
        """Write held-out nats per token by source, and the parent's on the same sequences."""
        self.write_record(HeldoutMetrics(step, losses, parent or None))
        parts = []
        for name, loss in losses.items():
            part = f"{name} {loss:.4f}"
            if parent and name in parent:
                part += f" (parent {parent[name]:.4f})"
            parts.append(part)
        log.info(f"{self.format_step(step)}  held-out loss  {'  '.join(parts)}")
        self.restart_timer(step)

    def log_skipped_update(self, step: int, scalars: HostScalars, documents: list[str]) -> None:
        """Write that an update was skipped, with the first documents of its batch."""
        loss, norm = finite_or_none(scalars["loss"]), finite_or_none(scalars["grad_norm"])
        first = tuple(documents[:MAX_SKIPPED_DOCUMENTS])
        self.write_record(SkippedUpdate(step, loss, norm, first, len(documents)))

    def log_growth(self, step: int, operator: str, spec: ModelSpec, cost: DeviceCost) -> None:
        """Write that the model was grown."""
        self.cost = cost
        n_params = transformer.count_params(spec)
        self.write_record(GrowthEvent(step, operator, spec.n_layers, n_params))
        self.restart_timer(step)

    def log_resume(self, step: int) -> None:
        """Write that the run was resumed."""
        self.write_record(ResumeEvent(step))

    def restart_timer(self, step: int) -> None:
        """Leave out of the next steps' time what happened at this one (evaluation, checkpoint)."""
        self.last_step, self.last_time = step, time.monotonic()

    def write_record(self, record: MetricRecord) -> None:
        """Write a record everywhere."""
        if not self.is_writer:
            return
        fields = record.to_json()
        self.file.write(json.dumps(fields) + "\n")
        scalars = flatten_metrics(fields)
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, record.step)
        if self.wandb:
            self.wandb.log(scalars, step=record.step)

    def close(self) -> None:
        """Close the files."""
        if self.is_writer:
            self.progress_bar.close()
            self.file.close()
            self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()


def finite_or_none(value: Any) -> float | None:
    """Return a scalar as a float; None if it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


def import_summary_writer() -> Any:
    """Return tensorboardX's SummaryWriter, without importing torch.

    Where torch is installed, its import would take a second of every start, for a type that is
    never used.
    """
    modules: dict[str, Any] = sys.modules
    is_hidden = "torch" not in modules
    if is_hidden:
        modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if is_hidden:
            del modules["torch"]
    return SummaryWriter


def init_wandb(run_dir: pathlib.Path, config: Config) -> Any:
    """Return a run of Weights & Biases that is resumed when this run is resumed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError:
        raise UserError(
            "train.wandb_project: the package wandb is not installed. pip install wandb, or leave "
            "train.wandb_project empty."
        ) from None
    name = run_dir.absolute()
    return wandb.init(
        project=config.train.wandb_project,
        id=fingerprint(str(name)),
        name=name.name,
        dir=str(run_dir),
        resume="allow",
        config=dataclasses.asdict(config),
    )


def read_metrics(path: pathlib.Path) -> list[MetricRecord]:
    """Return the records of a metrics.jsonl, without a last line cut by a kill."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            break
        kind = fields.get("kind")
        if kind not in METRIC_RECORDS:
            raise UserError(f"{path}: expected records with a kind, got {line[:80]!r}.")
        records.append(METRIC_RECORDS[kind].from_json(fields, str(path)))
    return records


def flatten_metrics(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return numbers only, {"heldout_loss": {"code": 3.1}} as {"heldout_loss/code": 3.1}."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            flat[prefix + name] = value
    return flat


def measure_peak_memory() -> int:
    """Return the peak bytes of the first device; of this process where devices do not count."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_duration(seconds: float) -> str:
    """Return 75 as "1m15s", 90,000 as "25h00m"."""
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
