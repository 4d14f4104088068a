"""What a run says of itself: console lines, metrics.jsonl, TensorBoard. Rates, MFU, memory, time left, money."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import resource
import sys
import time
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from jaxpt.config import Config
from jaxpt.model import llama
from jaxpt.spec import ModelSpec, UserError
from jaxpt.stage import fingerprint, write_atomic

log = logging.getLogger(__name__)

MAX_SKIPPED_DOCUMENTS = 32  # named of a skipped step; trace.py names them all


class DeviceCost(NamedTuple):
    """What turns speed into MFU and money; None where the hardware is not in the table."""

    flops_per_token: float | None = None  # forward and backward, by plan/flops.py
    peak_flops: float | None = None  # of one device, in FLOP/s at the compute dtype
    usd_per_hour: float | None = None  # of one device


class MetricsLogger:
    """Writes RUN/metrics.jsonl so that it is continuous across resumes: records after `resumed_at` are dropped first, no step stands twice.

    started  time.monotonic() from which on seconds and money are counted

    Every process makes one; the first one writes and speaks.
    """

    def __init__(
        self,
        run: pathlib.Path,
        settings: Config,
        *,
        tokens_per_step: int,
        resumed_at: int,
        started: float,
        cost: DeviceCost,
    ):
        self.run_dir, self.config, self.steps, self.tokens_per_step, self.cost = (
            run,
            settings,
            settings.train.steps,
            tokens_per_step,
            cost,
        )
        self.path = run / "metrics.jsonl"
        self.writes = jax.process_index() == 0
        earlier = [record for record in read_metrics(self.path) if record["step"] <= resumed_at]
        # seconds and money of a resumed run go on from its last record
        self.seconds_before_resume = max(
            (record.get("seconds", 0.0) for record in earlier), default=0.0
        )
        self.start = started
        self.restart_timer(resumed_at)
        if not self.writes:
            return
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in earlier))
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115  (closed by close)
        self.tensorboard = import_summary_writer()(
            str(run / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None
        )
        self.wandb = init_wandb(run, settings) if settings.train.wandb_project else None
        self.progress_bar = tqdm(
            total=self.steps,
            initial=resumed_at,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def log_train(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        n_skipped: int,
        epochs: dict[str, float],
    ) -> None:
        """One record and one console line for the steps since the last one."""
        now = time.monotonic()
        step_seconds = (now - self.last_time) / max(step - self.last_step, 1)
        self.last_step, self.last_time = step, now
        tokens_per_second = self.tokens_per_step / step_seconds
        seconds = self.seconds_before_resume + now - self.start
        n = jax.device_count()
        mfu = usd = None
        if self.cost.peak_flops and self.cost.flops_per_token:
            mfu = tokens_per_second * self.cost.flops_per_token / (n * self.cost.peak_flops)
        if self.cost.usd_per_hour:
            usd = seconds / 3600 * n * self.cost.usd_per_hour
        self.write_record(
            {
                "step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": step * self.tokens_per_step, "epochs": epochs,
                "tokens_per_second": tokens_per_second, "step_seconds": step_seconds, "mfu": mfu, "memory_bytes": measure_peak_memory(),
                "n_skipped": n_skipped, "seconds": seconds, "usd": usd,
            }
        )  # fmt: skip
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  norm {grad_norm:.2f}  lr {lr:.2e}  {tokens_per_second:,.0f} tok/s"
        line += f"  MFU {mfu:.1%}" if mfu else ""
        line += f"  {measure_peak_memory() / 2**30:.1f} GiB  {format_duration(seconds)} so far, {format_duration((self.steps - step) * step_seconds)} left"
        line += f"  ${usd:,.2f}" if usd else ""
        line += f"  {n_skipped} skipped" if n_skipped else ""
        log.info(line)
        if self.writes:
            self.progress_bar.update(step - self.progress_bar.n)

    def log_heldout(
        self, step: int, losses: dict[str, float], parent: dict[str, float] | None
    ) -> None:
        """Held-out nats per token by source; beside the parent's on the same rows, where there is one."""
        self.write_record(
            {"step": step, "heldout": losses} | ({"parent": parent} if parent else {})
        )
        beside = lambda name: f" (parent {parent[name]:.4f})" if parent and name in parent else ""  # noqa: E731
        log.info(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  held-out "
            + "  ".join(f"{name} {loss:.4f}{beside(name)}" for name, loss in losses.items())
        )
        self.restart_timer(step)

    def log_skipped_update(
        self, step: int, *, loss: float, grad_norm: float, documents: list[str]
    ) -> None:
        """This step's update was skipped: its loss and norm, null where they are no numbers, and the first of the documents that it read."""
        loss, grad_norm = (value if math.isfinite(value) else None for value in (loss, grad_norm))
        first = {"documents": documents[:MAX_SKIPPED_DOCUMENTS], "n_documents": len(documents)}
        self.write_record(
            {"step": step, "skipped": {"loss": loss, "grad_norm": grad_norm, **first}}
        )

    def log_growth(self, step: int, operator: str, spec: ModelSpec, cost: DeviceCost) -> None:
        """The model is another from here on."""
        self.cost = cost
        self.write_record(
            {
                "step": step,
                "grown": operator,
                "n_layers": spec.n_layers,
                "n_params": llama.count_params(spec),
            }
        )
        self.restart_timer(step)

    def log_resume(self, step: int) -> None:
        self.write_record({"step": step, "resumed": True})

    def restart_timer(self, step: int) -> None:
        """What happened at this step (a measurement, a checkpoint, a compilation) is no part of the next steps' time."""
        self.last_step, self.last_time = step, time.monotonic()

    def profile_step(self, step: int, found: Any = None) -> None:
        """Before each step, and after it with what it found: the JAX profiler records train.profile_steps's first to last step into RUN/tensorboard."""
        first, last = self.config.train.profile_steps or (0, 0)
        if step == first and found is None:
            jax.profiler.start_trace(str(self.run_dir / "tensorboard"))
        if step == last and found is not None:
            jax.block_until_ready(found)
            jax.profiler.stop_trace()
            log.info(
                f"profile of steps {first} to {last}: tensorboard --logdir {self.run_dir / 'tensorboard'}"
            )

    def write_record(self, record: dict[str, Any]) -> None:
        if self.writes:
            self.file.write(json.dumps(record) + "\n")
            for name, value in flatten_metrics(record).items():
                self.tensorboard.add_scalar(name, value, record["step"])
            if self.wandb:
                self.wandb.log(flatten_metrics(record), step=record["step"])

    def close(self) -> None:
        if self.writes:
            self.progress_bar.close()
            self.file.close()
            self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()


def import_summary_writer() -> type:
    """TensorboardX's SummaryWriter. Where torch is installed its import would take a second of every start, for a type that we never give it."""
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in hidden:
            del sys.modules[name]
    return SummaryWriter


def init_wandb(run: pathlib.Path, settings: Config):
    """A run of Weights & Biases that goes on when this run goes on."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "train.wandb_project: the package wandb is not installed. pip install wandb, or leave train.wandb_project empty."
        ) from None
    name = run.absolute()
    return wandb.init(
        project=settings.train.wandb_project,
        id=fingerprint(str(name)),
        name=name.name,
        dir=str(run),
        resume="allow",
        config=dataclasses.asdict(settings),
    )


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def flatten_metrics(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """{"heldout": {"code": 3.1}} -> {"heldout/code": 3.1}; numbers only."""
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flatten_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = value
    return found


def measure_peak_memory() -> int:
    """Peak on the first device; where devices do not count (CPU), peak of this process."""
    stats = jax.local_devices()[0].memory_stats()
    return (
        stats["peak_bytes_in_use"]
        if stats
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def format_duration(seconds: float) -> str:
    """75 -> "1m15s"; 90,000 -> "25h00m"."""
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
