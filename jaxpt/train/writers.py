"""Write records where a run is watched, each place by a thread of its own that nothing waits for.

A place that fails (a full disk, a quota, a stale mount, a server that is down) is named once, and
what it missed is written as soon as it can be. Training goes on meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import json
import logging
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from jaxpt import io
from jaxpt.config import Config
from jaxpt.spec import UserError, field_names
from jaxpt.train.records import MetricRecord, RunSums, TrainMetrics

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
CLOSE_SECONDS = 10.0  # the most that the end of a run waits for what is not written
REWRITE_SECONDS = 30.0  # how often a file in a bucket, which cannot append, is written anew
MAX_PENDING = 100_000  # records that wait for a place that fails


class Writer(Protocol):
    """One place to which records go."""

    def write(self, record: MetricRecord) -> None:
        """Write a record."""
        ...

    def flush(self) -> None:
        """Make what was written last: it is there when this returns."""
        ...

    def close(self) -> None:
        """Close the place."""
        ...


class BestEffort:
    """Writes records by a thread of its own."""

    def __init__(self, name: str, open_writer: Callable[[], Writer], flush_seconds: float = 0.0):
        """Open the place, by the thread.

        Args:
            name: for messages.
            open_writer: opens it, and opens it again after a failure.
            flush_seconds: from one flush to the next; 0: after each record.
        """
        self.name = name
        self.open_writer = open_writer
        self.flush_seconds = flush_seconds
        self.pending: collections.deque[MetricRecord] = collections.deque()  # until flushed
        self.n_written = 0  # of the pending ones
        self.flushed = time.monotonic()
        self.must_flush = False
        self.is_failing = False
        self.is_ending = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.thread.start()

    def put(self, record: MetricRecord) -> None:
        """Have a record written."""
        with self.changed:
            if len(self.pending) < MAX_PENDING:
                self.pending.append(record)
            self.changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until all is written, not where the place fails. Return whether it is."""
        with self.changed:
            self.must_flush = True
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.pending or self.is_failing, seconds)
            return not self.pending

    def end(self) -> None:
        """Write what is left, then close the place."""
        with self.changed:
            self.is_ending = True
            self.changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait for the thread after `end`, and say what is not written."""
        self.thread.join(max(seconds, 0.0))
        if self.pending:
            log.warning(f"{self.name}: the last {len(self.pending)} records are not written.")

    def run(self) -> None:
        """Write until `end`. After a failure, open the place again."""
        writer = None
        while self.wait_for_work():
            try:
                writer = writer or self.open_writer()
                self.write_pending(writer)
            except Exception as error:  # whatever a library of strangers raises
                writer = None
                self.n_written = 0
                if not self.handle_failure(error):
                    return
        if writer:
            with contextlib.suppress(Exception):
                writer.close()

    def wait_for_work(self) -> bool:
        """Wait for a record, or until what is written must be flushed. Return False at the end."""
        with self.changed:
            seconds = self.flushed + self.flush_seconds - time.monotonic()
            self.changed.wait_for(self.has_work, max(seconds, 0.0) if self.pending else None)
            return bool(self.pending)

    def has_work(self) -> bool:
        """Return whether there is something to write or to flush, or the end has come."""
        is_new = self.n_written < len(self.pending)
        is_asked = self.must_flush and bool(self.pending)
        return is_new or is_asked or self.is_ending

    def write_pending(self, writer: Writer) -> None:
        """Write all records, and flush them as often as is due."""
        while self.pending:
            if self.n_written < len(self.pending):
                writer.write(self.pending[self.n_written])
                self.n_written += 1
            is_last = self.n_written == len(self.pending)
            is_asked = self.must_flush or self.is_ending
            is_due = time.monotonic() >= self.flushed + self.flush_seconds
            if is_due or (is_last and is_asked):
                writer.flush()
                self.remove_written()
            elif is_last:
                return

    def remove_written(self) -> None:
        """Note that what was written is flushed."""
        with self.changed:
            for _ in range(self.n_written):
                self.pending.popleft()
            self.n_written = 0
            self.flushed = time.monotonic()
            self.must_flush = self.must_flush and bool(self.pending)
            if self.is_failing:
                log.info(f"{self.name}: written again, with what was missing")
            self.is_failing = False
            self.changed.notify_all()

    def handle_failure(self, error: Exception) -> bool:
        """Say a failure once, and wait before the next attempt. Return False at the end."""
        with self.changed:
            if not self.is_failing:
                lines = str(error).splitlines() or [type(error).__name__]
                log.warning(
                    f"{self.name}: cannot be written ({lines[0]}). The run goes on; what is "
                    "missing is written once it can be."
                )
            self.is_failing = True
            self.changed.notify_all()
            return not self.changed.wait_for(lambda: self.is_ending, RETRY_SECONDS)


def close_all(places: list[BestEffort]) -> None:
    """Write what is left to all places, for CLOSE_SECONDS at most."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for place in places:
        place.end()
    for place in places:
        place.join(deadline - time.monotonic())


# ---- metrics.jsonl


class MetricsFile:
    """Appends records to metrics.jsonl."""

    def __init__(self, path: io.Path):
        """Open the file, without a last line that was cut."""
        self.lines = io.LineLog(path)

    def write(self, record: MetricRecord) -> None:
        """Append a line."""
        self.lines.append(json.dumps(record.to_json()))

    def flush(self) -> None:
        """Write a bucket's file anew."""
        self.lines.flush()

    def close(self) -> None:
        """Close the file."""
        self.lines.close()


# ---- TensorBoard


class TensorBoardFile:
    """Writes the numbers of records into an event file, without tensorboardX's own thread.

    That thread dies of one failed write, or of a clock set back, and its queue then blocks whoever
    writes. For a bucket the file lies on this machine's disk, and `flush` uploads it.
    """

    def __init__(self, directory: io.Path, purge_step: int | None):
        """Open a new event file.

        Args:
            directory: of the event files.
            purge_step: what earlier files hold from this step on is hidden; None: nothing.
        """
        tensorboard = import_tensorboard()
        self.make_scalar = tensorboard.summary.scalar
        self.event = tensorboard.proto.event_pb2.Event
        self.directory = directory
        self.local = open_local(directory)
        self.name = name_event_file(io.list_names(directory))
        self.file = tensorboard.record_writer.RecordWriter(str(self.local / self.name))
        self.add(file_version="brain.Event:2")
        if purge_step is not None:
            session_log = tensorboard.proto.event_pb2.SessionLog
            start = session_log(status=session_log.START)
            self.add(step=purge_step, session_log=start)

    def write(self, record: MetricRecord) -> None:
        """Write each number of a record."""
        for name, value in list_scalars(record).items():
            self.add(step=record.step, summary=self.make_scalar(name, value))

    def flush(self) -> None:
        """Give what was written to the disk, or to the bucket."""
        self.file.flush()
        if isinstance(self.directory, io.BucketPath):
            io.copy_file(self.local / self.name, self.directory / self.name)

    def add(self, **fields: Any) -> None:
        """Write an event."""
        event = self.event(wall_time=time.time(), **fields)
        self.file.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        if self.local != self.directory:
            io.remove_working(self.local)


def open_local(directory: io.Path) -> pathlib.Path:
    """Return a directory on a disk, made, for what belongs into `directory`.

    It is that one or, for a bucket, an empty one of this machine, from which it is uploaded.
    """
    if isinstance(directory, pathlib.Path):
        io.make_directory(directory)
        return directory
    local = io.working_directory(directory)
    io.remove_working(local)
    io.make_directory(local)
    return local


def upload(local: pathlib.Path, directory: io.Path) -> None:
    """Move what a library wrote on this disk into a bucket; log what fails."""
    try:
        for name in io.list_files(local):
            io.copy_file(local / name, directory / name)
        io.remove_working(local)
    except UserError as error:
        log.warning(f"{error} The run goes on.")


def name_event_file(names: list[str]) -> str:
    """Return a name that sorts after those of earlier event files, as TensorBoard reads them.

    The clock may have been set back, and two starts may fall into one second.
    """
    last = 0
    for name in names:
        _, _, rest = name.partition(".tfevents.")
        seconds, _, _ = rest.partition(".")
        if seconds.isdecimal():
            last = max(last, int(seconds))
    seconds = max(int(time.time()), last + 1)
    return f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}"


def import_tensorboard() -> Any:
    """Return tensorboardX, imported without torch.

    Where torch is installed, its import would take a second of every start, for a type that is
    never used.
    """
    modules: dict[str, Any] = sys.modules
    is_hidden = "torch" not in modules
    if is_hidden:
        modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if is_hidden:
            del modules["torch"]
    return tensorboardX


def list_scalars(record: MetricRecord) -> dict[str, float]:
    """Return a record's numbers by name; sums over the run once per step, from TrainMetrics."""
    fields = record.to_json()
    if not isinstance(record, TrainMetrics):
        sums = field_names(RunSums)
        fields = {name: value for name, value in fields.items() if name not in sums}
    return flatten_metrics(fields)


def flatten_metrics(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return numbers only, {"heldout_loss": {"code": 3.1}} as {"heldout_loss/code": 3.1}."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= flatten_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            flat[prefix + name] = value
    return flat


# ---- Prometheus


class PrometheusFile:
    """Keeps the newest numbers of a run in a file that node_exporter's textfile collector reads.

    Source: Prometheus' text format 0.0.4; the collector refuses timestamps, and reads *.prom.
    """

    def __init__(self, path: io.Path, run_dir: io.Path):
        """Write to `path` what is known of the run."""
        self.path = path
        self.run = str(run_dir)
        self.samples: dict[str, float] = {}

    def write(self, record: MetricRecord) -> None:
        """Take a record's numbers over."""
        self.samples |= list_scalars(record)
        self.samples |= {"step": record.step, "record_time_seconds": time.time()}

    def flush(self) -> None:
        """Write the file anew: a reader finds the old one or the new one."""
        io.write_unsynced(self.path, format_prometheus(self.samples, self.run))

    def close(self) -> None:
        """Leave the file: the newest numbers stay, with their time."""


def format_prometheus(samples: dict[str, float], run: str) -> str:
    """Return samples in Prometheus' text format.

    {"heldout_loss/code": 3.1} of a run "runs/x" is

        # TYPE jaxpt_heldout_loss gauge
        jaxpt_heldout_loss{run="runs/x",name="code"} 3.1
    """
    families: dict[str, list[str]] = {}
    for key, value in samples.items():
        family, _, name = key.partition("/")
        family = "jaxpt_" + re.sub(r"\W", "_", family, flags=re.ASCII)
        labels = f'run="{escape_label(run)}"'
        if name:
            labels += f',name="{escape_label(name)}"'
        families.setdefault(family, []).append(f"{family}{{{labels}}} {value}\n")
    lines = [f"# TYPE {family} gauge\n{''.join(rows)}" for family, rows in families.items()]
    return "".join(lines)


def escape_label(text: str) -> str:
    """Return a label's value as the format writes it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# ---- Weights & Biases


class WandbRun:
    """Writes the numbers of records into a run of Weights & Biases."""

    def __init__(self, run: Any):
        """Write into an open run."""
        self.run = run

    def write(self, record: MetricRecord) -> None:
        """Log the numbers of a record."""
        scalars = list_scalars(record)
        if scalars:
            self.run.log(scalars, step=record.step)

    def flush(self) -> None:
        """Do nothing: the package uploads by itself."""

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()


def check_wandb() -> None:
    """Raise UserError if the package wandb is not installed."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "train.wandb_project: the package wandb is not installed. pip install wandb, or leave "
            "train.wandb_project empty."
        )


def open_wandb(run_dir: io.Path, config: Config, rewind_to: int | None) -> WandbRun:
    """Return this run's run of Weights & Biases, gone on with if there is one.

    Args:
        run_dir: the run directory. RUN/wandb_id names the run there; a directory made anew is
            another one, whatever its path.
        config: the recipe.
        rewind_to: a step after which the run there has records that this one dropped; None: none.
            At step 0 another run is begun.
    """
    import wandb  # pyright: ignore[reportMissingImports]  (optional)

    name_file = run_dir / "wandb_id"
    identity = (io.read_text_if_there(name_file) or "").strip()
    if not identity or rewind_to == 0:
        identity = secrets.token_hex(8)
        rewind_to = None
        io.write_text(name_file, identity)
    place: dict[str, Any] = {"id": identity, "resume": "allow"}
    if rewind_to is not None:
        place = {"resume_from": f"{identity}?_step={rewind_to}"}
    run = wandb.init(
        project=config.train.wandb_project,
        name=run_dir.name,
        dir=str(open_local(run_dir)),
        config=dataclasses.asdict(config),
        **place,
    )
    return WandbRun(run)
