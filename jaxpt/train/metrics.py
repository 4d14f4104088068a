"""Log a run: console lines, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxpt import io
from jaxpt.config import Config
from jaxpt.flops import DeviceCost
from jaxpt.model import transformer
from jaxpt.spec import ModelSpec, UserError
from jaxpt.text import format_duration
from jaxpt.train import writers
from jaxpt.train.meter import Meter
from jaxpt.train.records import (
    METRIC_RECORDS,
    GrowthEvent,
    HeldoutMetrics,
    MetricRecord,
    ResumeEvent,
    RunSums,
    SkippedUpdate,
    TaskMetrics,
    TrainMetrics,
)
from jaxpt.train.writers import BestEffort

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0  # a checkpoint waits for the records before it no longer than this
MAX_SKIPPED_DOCUMENTS = 32  # listed per skipped step; jaxpt trace lists all
MAX_SOURCES = 8  # in a record; epochs.json has all
MIN_COLUMNS = 80  # of a terminal; wider ones are made use of
PREFIX_COLUMNS = 11  # of a console line: time and level
# of a step, that a record has fields for; loss and n_targets are summed over the interval instead
KNOWN_SCALARS = ("loss_sum", "n_targets", "loss", "grad_norm", "lr", "n_skipped")
KNOWN_SCALARS += ("consecutive_skips",)

HostScalars = dict[str, np.ndarray]  # what a step returned, on the host


class CollectedStep(NamedTuple):
    """A step that the host has waited for."""

    step: int
    scalars: HostScalars
    sums: RunSums  # after it


class MetricsLogger:
    """Writes RUN/metrics.jsonl so that it is continuous across resumes.

    Records after the resumed step are dropped first, so no step is there twice. Every process
    makes a logger; the first one writes.
    """

    def __init__(
        self,
        run_dir: io.Path,
        n_steps: int,
        *,
        meter: Meter,
        resumed_at: int | None,
        config: Config | None = None,
    ):
        """Open the files.

        Args:
            run_dir: the run directory.
            n_steps: of the whole run.
            meter: of the run.
            resumed_at: step of the checkpoint that is resumed; None: the run begins.
            config: the recipe, for Prometheus and Weights & Biases; None: without.
        """
        self.n_steps = n_steps
        self.meter = meter
        self.last_step = resumed_at or 0
        self.last_sums = meter.sums
        self.is_writer = jax.process_index() == 0
        self.places: list[BestEffort] = []
        if not self.is_writer:
            return
        self.places = open_places(run_dir, resumed_at, config)
        self.progress_bar = tqdm(
            total=self.n_steps,
            initial=self.last_step,
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
        sums, before = self.meter.read(), self.last_sums
        n_steps = max(step - self.last_step, 1)
        self.last_step, self.last_sums = step, sums
        seconds = max(sums.productive_seconds - before.productive_seconds, 1e-9)
        flops_per_second = None
        if sums.flops is not None and before.flops is not None:
            flops_per_second = (sums.flops - before.flops) / seconds
        further = scalars.keys() - set(KNOWN_SCALARS)
        record = TrainMetrics(
            step=step,
            loss=loss,
            grad_norm=float(scalars["grad_norm"]),
            lr=float(scalars["lr"]),
            epochs=find_most_read(epochs, MAX_SOURCES),
            tokens_per_second=(sums.n_tokens - before.n_tokens) / seconds,
            step_seconds=seconds / n_steps,
            mfu=self.meter.cost.compute_mfu(flops_per_second, self.meter.n_devices),
            memory_bytes=measure_peak_memory(),
            n_skipped=int(scalars["n_skipped"]),
            scalars={name: float(scalars[name]) for name in sorted(further)},
            goodput=sums.compute_goodput(),
            **vars(sums),
        )
        self.write_record(record)
        for line in self.format_train(record):
            log.info(line)
        if self.is_writer:
            self.progress_bar.update(step - self.progress_bar.n)

    def format_train(self, record: TrainMetrics) -> list[str]:
        """Return a line, and further ones for what is not always there or does not fit."""
        left = format_duration((self.n_steps - record.step) * record.step_seconds)
        always = {
            "loss": f"loss {record.loss:.4f}",
            "norm": f"norm {record.grad_norm:.2f}",
            "lr": f"lr {record.lr:.1e}",
            "speed": f"{record.tokens_per_second:,.0f} tok/s",
            "left": f"{left} left",
        }
        head = self.format_step(record.step)
        for name in ("lr", "norm"):  # which metrics.jsonl and the page show
            if len(break_line(head, [*always.values()])) > 1:
                del always[name]
        first = break_line(head, [*always.values()])
        more = []
        if record.mfu:
            more.append(f"MFU {record.mfu:.1%}")
        if record.usd:
            more.append(f"${record.usd:,.2f}")
        if record.n_skipped:
            more.append(f"{record.n_skipped} skipped")
        if not more and not record.scalars:
            return first
        more.append(f"{record.memory_bytes / 2**30:.1f} GiB")
        more.append(f"{format_duration(record.seconds)} so far, goodput {record.goodput:.0%}")
        width = count_columns()
        second = "  " + "  ".join(more)
        if len(first) == 1 and len(first[0] + second) <= width:
            first, second = [], first[0] + second
        for name, value in record.scalars.items():
            column = f"  {name} {value:.4g}"
            if len(second + column) <= width:
                second += column
        return [*first, second]

    def format_step(self, step: int) -> str:
        """Return "step  10/300"."""
        return f"step {step:>{len(str(self.n_steps))}}/{self.n_steps}"

    def log_heldout(
        self,
        step: int,
        losses: dict[str, float],
        seq_len: int,
        parent: dict[str, float] | None,
        average: dict[str, float] | None = None,
    ) -> None:
        """Write held-out nats per token by source, the parent's and the averaged weights'."""
        sums = vars(self.meter.read())
        self.write_record(HeldoutMetrics(step, losses, seq_len, parent or None, average, **sums))
        parts = []
        for name, loss in losses.items():
            part = f"{name} {loss:.4f}"
            for label, other in (("parent", parent), ("average", average)):
                if other and name in other:
                    part += f" ({label} {other[name]:.4f})"
            parts.append(part)
        for line in break_line(f"{self.format_step(step)}  held-out loss", parts):
            log.info(line)

    def log_tasks(self, step: int, scores: dict[str, dict[str, float]]) -> None:
        """Write the scores of benchmarks, a console line for each."""
        self.write_record(TaskMetrics(step, scores, **vars(self.meter.read())))
        for task, metrics in scores.items():
            parts = []
            for name, value in metrics.items():
                error = metrics.get(f"{name}_stderr")
                if not name.endswith("_stderr"):
                    margin = "" if error is None else f" +/- {error:.4f}"
                    parts.append(f"{name} {value:.4f}{margin}")
            for line in break_line(f"{self.format_step(step)}  {task}", parts):
                log.info(line)

    def log_skipped_update(self, collected: CollectedStep, documents: list[str]) -> None:
        """Write that an update was skipped, with the first documents of its batch."""
        scalars = collected.scalars
        loss, norm = float(scalars["loss"]), float(scalars["grad_norm"])
        first = tuple(documents[:MAX_SKIPPED_DOCUMENTS])
        sums = vars(collected.sums)
        self.write_record(SkippedUpdate(collected.step, loss, norm, first, len(documents), **sums))

    def log_growth(self, step: int, operator: str, spec: ModelSpec, cost: DeviceCost) -> None:
        """Write that the model was grown."""
        self.meter.cost = cost
        n_params = transformer.count_params(spec)
        sums = vars(self.meter.read())
        self.write_record(GrowthEvent(step, operator, spec.n_layers, n_params, **sums))

    def log_resume(self, step: int) -> None:
        """Write that the run was resumed."""
        self.write_record(ResumeEvent(step, **vars(self.meter.read())))

    def write_record(self, record: MetricRecord) -> None:
        """Have a record written everywhere."""
        for place in self.places:
            place.put(record)

    def flush(self) -> None:
        """Wait for metrics.jsonl, so that a checkpoint's records are there before it."""
        for place in reversed(self.places):
            is_first = place is self.places[0]
            place.wait(FLUSH_SECONDS if is_first else 0.0)

    def close(self) -> None:
        """Close the files."""
        if self.is_writer:
            self.progress_bar.close()
            writers.close_all(self.places)


def count_columns() -> int:
    """Return the columns of a console line, without time and level."""
    columns = MIN_COLUMNS
    if sys.stderr.isatty():
        columns = max(columns, shutil.get_terminal_size().columns)
    return columns - PREFIX_COLUMNS


def break_line(head: str, parts: list[str]) -> list[str]:
    """Return the head and parts as a line, or more where they do not fit into one."""
    width = count_columns()
    lines = [head]
    for part in parts:
        if len(lines[-1]) + 2 + len(part) > width:
            lines.append("")
        lines[-1] += f"  {part}"
    return lines


def open_places(
    run_dir: io.Path, resumed_at: int | None, config: Config | None
) -> list[BestEffort]:
    """Return where records go, metrics.jsonl first, each without what this start repeats."""
    path = run_dir / "metrics.jsonl"
    keep = None
    n_dropped = 0
    try:
        dropped = find_dropped(path, resumed_at)
        keep, n_dropped = dropped.n_bytes, dropped.n_records
    except UserError as error:
        log.warning(f"{error} The run goes on; records may be there twice.")
    purge_step = 0 if resumed_at is None else resumed_at + 1

    def open_file() -> writers.MetricsFile:
        nonlocal keep
        if keep is not None and io.size(path):
            io.cut(path, keep)
        keep = None
        return writers.MetricsFile(path)

    def open_tensorboard() -> writers.TensorBoardFile:
        nonlocal purge_step
        file = writers.TensorBoardFile(run_dir / "tensorboard", purge_step)
        purge_step = None
        return file

    seconds = writers.REWRITE_SECONDS if isinstance(run_dir, io.BucketPath) else 0.0
    places = [
        BestEffort("metrics.jsonl", open_file, seconds),
        BestEffort("tensorboard", open_tensorboard, seconds),
    ]
    if config and config.train.prometheus_file:
        file = io.path(config.train.prometheus_file)
        places.append(BestEffort("prometheus", lambda: writers.PrometheusFile(file, run_dir)))
    if config and config.train.wandb_project:
        rewind_to = (resumed_at or 0) if n_dropped else None
        places.append(BestEffort("wandb", lambda: writers.open_wandb(run_dir, config, rewind_to)))
    return places


def find_most_read(epochs: dict[str, float], n: int) -> dict[str, float]:
    """Return the n sources that were read most often, in the order given."""
    if len(epochs) <= n:
        return epochs
    most = sorted(epochs, key=lambda name: epochs[name], reverse=True)[:n]
    return {name: epochs[name] for name in epochs if name in most}


# ---- reading metrics.jsonl


def read_metrics(path: io.Path) -> list[MetricRecord]:
    """Return the records of a metrics.jsonl; see `stream_metrics`."""
    return list(stream_metrics(path))


def stream_metrics(path: io.Path) -> Iterator[MetricRecord]:
    """Yield the records of a metrics.jsonl, without a last line cut by a kill.

    A line that cannot be read costs itself alone, and is named.
    """
    if io.size(path) is None:
        return
    n_bad = first_bad = 0
    with io.open_read(path) as file, io.explain("read", path):
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            record = parse_line(line)
            if record:
                yield record
                continue
            n_bad += 1
            first_bad = first_bad or number
    if n_bad:
        log.warning(
            f"{path}: {n_bad:,} of its lines cannot be read, the first is line {first_bad:,}; "
            "left out."
        )


def parse_line(line: bytes) -> MetricRecord | None:
    """Return a line as a record; None if it is none."""
    try:
        fields = json.loads(line)
        return METRIC_RECORDS[fields["kind"]].from_json(fields)
    except (ValueError, KeyError, TypeError, RecursionError, UserError):
        return None


def stream_from_end(path: io.Path) -> Iterator[tuple[int, MetricRecord]]:
    """Yield (first byte, record), the last one first; only what is asked for is read."""
    for start, line in io.read_lines_from_end(path):
        record = parse_line(line)
        if record:
            yield start, record


class Dropped(NamedTuple):
    """What a start repeats of the records that are there."""

    n_bytes: int  # that stay
    n_records: int
    last: MetricRecord | None  # with what the run had spent


def find_dropped(path: io.Path, resumed_at: int | None) -> Dropped:
    """Return the records after the step of the checkpoint that is resumed; all without one.

    A growth after that very step is made again too.
    """
    n_bytes, n_records, last = io.size(path) or 0, 0, None
    if resumed_at is None:
        last = next((record for _, record in stream_from_end(path)), None)
        return Dropped(0, int(last is not None), last)
    for start, record in stream_from_end(path):
        is_repeated = isinstance(record, GrowthEvent) and record.step == resumed_at
        if record.step <= resumed_at and not is_repeated:
            break
        n_bytes, n_records = start, n_records + 1
        last = last or record
    return Dropped(n_bytes, n_records, last)


# ---- measuring and formatting


def measure_peak_memory() -> int:
    """Return the peak bytes of the first device; of this process where devices do not count."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
